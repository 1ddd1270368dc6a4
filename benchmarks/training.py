"""How much the project's local training costs over a bare loop of the same steps, and its bytes over the arrays' own.

    python benchmarks/training.py

Both loops tune the demo's small model on the same batches; they take turns and the medians are compared, so that what
else the machine does falls on both.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import numpy as np
import torch
from flwr.app import RecordDict
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from fedpt_flwr.config import DataConfig, TrainConfig
from fedpt_flwr.data import TokenizedExample, batches, collate, load_records, tokenize_examples
from fedpt_flwr.models import load_causal_lm, load_tokenizer, tunable_arrays
from fedpt_flwr.prompts import Template
from fedpt_flwr.records import message_bytes, to_array_record
from fedpt_flwr.shapes import TemplateShape
from fedpt_flwr.training import train_locally


def bare(model: PreTrainedModel, examples: list[TokenizedExample], config: TrainConfig, pad_id: int) -> float:
    """The same steps with nothing around them; seconds."""
    begun = time.perf_counter()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, config.beta2), weight_decay=0.0, fused=True
    )
    model.train()
    for indices in batches(len(examples), config.batch_size, config.max_steps, np.random.default_rng(0)):
        batch = collate([examples[index] for index in indices], pad_id)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        targets = batch["labels"][:, 1:]
        counted = targets != -100
        loss = F.cross_entropy(logits[:, :-1][counted].float(), targets[counted])
        loss.backward()
        loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - begun


def ours(model: PreTrainedModel, examples: list[TokenizedExample], config: TrainConfig, pad_id: int) -> float:
    """What a device does; seconds."""
    begun = time.perf_counter()
    train_locally(model, examples, config, learning_rate=config.learning_rate, fedprox_mu=0.0, pad_id=pad_id, seed=0)
    return time.perf_counter() - begun


def main() -> None:
    """Time both in turns and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:small", help="reference of the model that is tuned")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    data, config = DataConfig(), TrainConfig(max_steps=arguments.steps)
    tokenizer = load_tokenizer(arguments.model)
    start = load_causal_lm(arguments.model).requires_grad_(True)
    shape = TemplateShape(Template(data.template), data.answer_field)
    written = [example for item in load_records(data.train, shape)[:240] for example in item.examples]
    examples, _ = tokenize_examples(written, tokenizer, max_length=config.max_length)
    seconds: dict[str, list[float]] = {"bare": [], "ours": []}
    for _ in range(arguments.repeats):
        for name, loop in (("bare", bare), ("ours", ours)):
            seconds[name].append(loop(copy.deepcopy(start), examples, config, tokenizer.pad_token_id))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{arguments.steps} steps: bare {medians['bare']:.3f} s, ours {medians['ours']:.3f} s, "
          f"ratio {medians['ours'] / medians['bare']:.3f} (median of {arguments.repeats})")  # fmt: skip
    for label, arrays in (
        ("the demo's small model", tunable_arrays(start)),
        ("16 arrays of 256 kB", {f"layer.{index}": torch.randn(256, 256) for index in range(16)}),
    ):
        own = sum(values.numel() * 4 for values in arrays.values())
        sent = message_bytes(RecordDict({"arrays": to_array_record(arrays)}))
        print(f"{label}: {own:,} bytes of float32, {sent:,} bytes as serialised, ratio {sent / own:.4f}")


if __name__ == "__main__":
    main()
