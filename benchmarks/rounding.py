"""How much of a device's change each type on the wire loses, in one round, on the demo world's small model.

    python benchmarks/rounding.py

Device 0's shard of the demo, 20 steps. Down: the tuned weights, rounded (stored ones are bfloat16 already); up: the
change, rounded. Both errors are shares of the size of the change (root mean squares). The bias is the mean error over
the mean magnitude of the change.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.utils import logging as transformers_logging

from fedpt_flwr.config import parse_run_config
from fedpt_flwr.data import tokenize_examples
from fedpt_flwr.models import load_causal_lm, load_tokenizer, make_tunable, tunable_arrays
from fedpt_flwr.quantise import quantised, restored
from fedpt_flwr.sources import device_shard
from fedpt_flwr.training import train_locally

TYPES = ("float16", "bfloat16", "int8")


def rounded(arrays: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Arrays as they come out of the wire."""
    if dtype != "int8":
        return {name: part.to(getattr(torch, dtype)).float() for name, part in arrays.items()}
    return {
        name: torch.from_numpy(restored(quantised(part.numpy()), tuple(part.shape))) for name, part in arrays.items()
    }


def flat(arrays: Mapping[str, Tensor]) -> NDArray[np.float64]:
    """All values beside each other."""
    return np.concatenate([part.numpy().ravel() for part in arrays.values()]).astype(np.float64)


def rms(values: NDArray[np.float64]) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.mean(values**2)))


def main() -> None:
    """Train once and print the table."""
    transformers_logging.disable_progress_bar()
    config = parse_run_config({})
    model = make_tunable(load_causal_lm("demo:small"), config.tuning, seed=0)
    before = tunable_arrays(model)
    tokenizer = load_tokenizer("demo:small")
    shard = device_shard(config.data, device=0, num_devices=8, seed=0)
    examples, _ = tokenize_examples(shard, tokenizer, max_length=config.train.max_length)
    train_locally(
        model, examples, config.train, learning_rate=config.train.learning_rate, fedprox_mu=0.0, pad_id=0, seed=0
    )
    after = tunable_arrays(model)
    changes = {name: weights - before[name] for name, weights in after.items()}
    change, weights = flat(changes), flat(after)
    size = rms(change)
    print(f"root mean square of the change {size:.3g}, of the weights {rms(weights):.3g}")
    print("| type | error of the weights sent down, of the change | error of the change sent up | its bias |")
    print("| --- | --- | --- | --- |")
    for dtype in TYPES:
        errors = [flat(rounded(arrays, dtype)) - flat(arrays) for arrays in (after, changes)]
        down, up = (rms(error) / size for error in errors)
        bias = float(np.mean(errors[1]) / np.mean(np.abs(change)))
        print(f"| {dtype} | {100 * down:.3f} % | {100 * up:.3f} % | {100 * bias:+.4f} % |")


if __name__ == "__main__":
    main()
