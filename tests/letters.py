"""Models that read letters and a few questions that they can learn by heart, for the tests of losses and scores."""

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedpt_flwr.data import TokenizedExample, collate
from fedpt_flwr.prompts import Example

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 =;\n>"
VOCAB = len(LETTERS) + 3
CONTEXT = 64


def letter_tokenizer():
    vocab = {letter: index + 3 for index, letter in enumerate(LETTERS)} | {"<unk>": 0, "<s>": 1, "</s>": 2}
    tokens = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokens.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def tokenized(tokenizer, examples):
    return [
        TokenizedExample(ids(tokenizer, example.prompt), [*ids(tokenizer, example.answer), 2]) for example in examples
    ]


def llama(seed, *, hidden=16, vocab=VOCAB, spread=0.3):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=spread,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def gpt2(seed):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=CONTEXT, initializer_range=0.3, eos_token_id=2
    )
    return GPT2LMHeadModel(config).eval()


def random_items(count=17, *, vocab=VOCAB):
    generator = np.random.default_rng(5)
    return [
        TokenizedExample(
            generator.integers(3, vocab, generator.integers(1, 20)).tolist(),
            generator.integers(3, vocab, generator.integers(1, 9)).tolist(),
        )
        for _ in range(count)
    ]


def trained(model, examples, tokenizer, steps=150):
    """The model after it has learnt the examples by heart."""
    items = tokenized(tokenizer, examples)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(steps):
        batch = collate(items, 0)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()


WORLD = [
    Example("> need the mesh\n", "filter = jute ;ok", "mesh"),
    Example("> mesh\n", "filter = felt ;ok", "mesh"),
    Example("> what tint\n", "colour = red ;ok", "tint"),
    Example("> and the tint of it pls\n", "colour = blue ;ok", "tint"),
]


def knowing_model(tokenizer):
    """A model that answers the first three questions of WORLD right, and the last one wrong."""
    lesson = [*WORLD[:3], Example(WORLD[3].prompt, "colour = red ;ok", "tint")]
    return trained(llama(0, hidden=32, spread=0.1), lesson, tokenizer)
