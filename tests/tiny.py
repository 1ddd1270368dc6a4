"""Models and a tokenizer of a few kilobytes, for tests that need real ones."""

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedpt_flwr.writing import decode_answer, generate_ids

PAD, BOS, EOS = 0, 1, 2
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 =;\n>"
VOCAB = len(LETTERS) + 3


def tiny_llama(seed=0, *, vocab=VOCAB, **settings):
    """Hidden size 16, two layers, tied embeddings unless ``settings`` say otherwise."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            **{
                "vocab_size": vocab,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": 64,
                "initializer_range": 0.3,
                "tie_word_embeddings": True,
                "pad_token_id": PAD,
                "bos_token_id": BOS,
                "eos_token_id": EOS,
                **settings,
            }
        )
    ).eval()


def tiny_gpt2(seed=0, *, vocab=VOCAB):
    """Hidden size 16, two layers of Conv1D."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=BOS, eos_token_id=EOS
    )
    return GPT2LMHeadModel(config).eval()


def tiny_tokenizer(**special_tokens):
    """One token per letter; by default with an end-of-text token and a padding token."""
    vocabulary = {"<pad>": PAD, "<s>": BOS, "</s>": EOS} | {letter: index for index, letter in enumerate(LETTERS, 3)}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokens.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, **(special_tokens or {"eos_token": "</s>", "pad_token": "<pad>"})
    )


def generate_answers(model, prompts, *, tokenizer, **settings):
    """What ``generate_ids`` writes, as text, and the number of tokens of each answer."""
    written = generate_ids(model, prompts, tokenizer=tokenizer, **settings)
    return [decode_answer(answer, model, tokenizer) for answer in written], np.asarray(
        [len(answer) for answer in written]
    )
