"""Checkpoints and data of the worked examples' form, small enough to run here.

A look-alike has the architecture, the kind of tokenizer and the files of the real one, in the hub's layout: byte-level
BPE, the same special tokens, a vocabulary that is padded as there, tied weights where they are tied. Its weights are
random and its text is made up, so that a run shows that everything fits together, and nothing about quality.
"""

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

CHATML = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END = "<|endoftext|>"
CATEGORIES = ("closed_qa", "open_qa", "brainstorming", "classification", "summarization", "creative_writing")


def dolly(number: int = 48) -> list[dict]:
    """Records with the columns of databricks-dolly-15k."""
    draws = np.random.default_rng(0)
    records = []
    for index in range(number):
        category = CATEGORIES[index % len(CATEGORIES)]
        first, second = draws.integers(2, 90, 2).tolist()
        with_context = category in ("closed_qa", "summarization")
        records.append(
            {
                "instruction": f"Which of the {first} sheds near gate {second} is the larger?",
                "context": f"Shed {first} holds {first * second} sacks, and shed {second} holds none."
                if with_context
                else "",
                "response": f"Shed {first}, because it holds {first * second} sacks.",
                "category": category,
            }
        )
    return records


def gsm8k(number: int = 48) -> list[dict]:
    """Records with the columns of gsm8k."""
    draws = np.random.default_rng(1)
    records = []
    for _ in range(number):
        first, second = draws.integers(2, 90, 2).tolist()
        records.append(
            {
                "question": f"Mia has {first} pears and buys {second} more. How many pears has she now?",
                "answer": f"She has {first} + {second} = <<{first}+{second}={first + second}>>{first + second} pears.\n"
                f"#### {first + second}",
            }
        )
    return records


def write_records(path: Path, records: list[dict]) -> str:
    """As JSON Lines; the path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def byte_level_tokenizer(special: list[str], **named: str | None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with 320 entries and more, the special tokens after the others as at Qwen and GPT-2."""
    texts = [value for record in dolly() + gsm8k() for value in record.values()]
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    tokens.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=tokens, **named)


def qwen(folder: Path) -> dict[str, str]:
    """Qwen2.5: the small model's head is tied, the large one's is not and has more rows; a chat template."""
    tokenizer = byte_level_tokenizer([END, "<|im_start|>", "<|im_end|>"], eos_token=END, pad_token=END)
    tokenizer.chat_template = CHATML
    shared = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    small = Qwen2Config(
        vocab_size=336,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        tie_word_embeddings=True,
        **shared,
        **ends,
    )
    large = Qwen2Config(
        vocab_size=344,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        tie_word_embeddings=False,
        **shared,
        **ends,
    )
    return _saved(folder, Qwen2ForCausalLM, small, large, tokenizer, torch.bfloat16)


def smollm(folder: Path) -> dict[str, str]:
    """SmolLM2: Llama with tied heads; one token is beginning, end and unknown."""
    tokenizer = byte_level_tokenizer([END, "<|im_start|>", "<|im_end|>"], bos_token=END, eos_token=END, unk_token=END)
    shared = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    small = LlamaConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        **shared,
    )
    large = LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        **shared,
    )
    return _saved(folder, LlamaForCausalLM, small, large, tokenizer, torch.bfloat16)


def gpt2(folder: Path) -> dict[str, str]:
    """GPT-2: learnt positions, 1024 of them; one token is beginning, end and unknown; no token fills up batches."""
    tokenizer = byte_level_tokenizer([END], bos_token=END, eos_token=END, unk_token=END)
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    small = GPT2Config(vocab_size=len(tokenizer), n_embd=24, n_layer=2, n_head=2, **ends)
    large = GPT2Config(vocab_size=len(tokenizer), n_embd=40, n_layer=3, n_head=5, **ends)
    return _saved(folder, GPT2LMHeadModel, small, large, tokenizer, torch.float32)


def _saved(folder, architecture, small, large, tokenizer, dtype) -> dict[str, str]:
    """The two models and their tokenizer as the hub has them; the run-config keys that name them."""
    for seed, (name, config) in enumerate({"small": small, "large": large}.items()):
        torch.manual_seed(seed)
        architecture(config).to(dtype).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {f"model.{name}": str(folder / name) for name in ("small", "large")}
