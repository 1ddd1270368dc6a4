"""How much memory a device's round takes, beside what it was estimated to take before it began.

    python benchmarks/limits.py

Each round is the ClientApp's own, in a fresh process: what it grows by is measured from the moment at which the round's
message arrives. Two rounds are of the demo's small model, the others of a model with a larger vocabulary, which is made
here and thrown away. Linux only, because the system must tell what a process had at most.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import client_app  # noqa: E402
from fedpt_flwr.config import flat_values, parse_run_config  # noqa: E402
from fedpt_flwr.grid import LocalGrid  # noqa: E402
from fedpt_flwr.models import load_causal_lm, load_tokenizer, make_tunable, tunable_arrays  # noqa: E402
from fedpt_flwr.records import to_array_record  # noqa: E402

NO_LIMIT_MB = 50_000
"""With a limit the estimate is made; this one refuses nothing."""

SMALL = {"train.batch-size": 4, "train.max-length": 128, "train.max-steps": 2}
ROUNDS: dict[str, dict[str, Any]] = {
    "`demo:small`, full, 16 examples of up to 64 tokens": {"train.max-length": 64, "train.max-steps": 2},
    "{size}, LoRA, 4 of up to 128": SMALL | {"model.small": "{model}", "tuning.mode": "lora"},
    "{size}, full, 4 of up to 128": SMALL | {"model.small": "{model}"},
}


def measure(settings: dict[str, Any]) -> dict[str, int]:
    """One round of device 0 in this process; bytes by which it grew, and was estimated to grow."""
    config = parse_run_config(settings)
    model = make_tunable(load_causal_lm(config.model.small), config.tuning, seed=0)
    arrays = to_array_record(tunable_arrays(model))
    del model
    node_config = {"partition-id": 0, "num-partitions": 8, "memory-limit-mb": NO_LIMIT_MB}
    grid = LocalGrid(client_app.app, 1, flat_values(config), node_config=lambda _: dict(node_config))
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1})})
    (node,) = grid.get_node_ids()
    (reply,) = grid.pull_messages(grid.push_messages([Message(content, dst_node_id=node, message_type="train")]))
    metrics = reply.content["metrics"]
    return {"growth": metrics["memory-growth-bytes"], "estimate": metrics["memory-estimate-bytes"]}


def measured(settings: dict[str, Any]) -> dict[str, int]:
    """The same in a fresh process.

    Raises:
        subprocess.CalledProcessError: It failed, and has said why.
    """
    command = [sys.executable, str(Path(__file__)), "--round", json.dumps(settings)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    figures: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return figures


def save_model(folder: Path) -> int:
    """A model with a large vocabulary and the demo's tokenizer; how many weights it has."""
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=320, intermediate_size=800, num_hidden_layers=6, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    load_tokenizer("demo:small").save_pretrained(folder)
    return model.num_parameters()


def main() -> None:
    """Print the table of the rounds."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--round", metavar="JSON", help="only one round, with these run-config keys, in this process")
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    if arguments.round:
        print(json.dumps(measure(json.loads(arguments.round))))
        return
    print('| round | estimate without "before the round", MB | measured growth, MB |\n| --- | --- | --- |')
    with tempfile.TemporaryDirectory() as folder:
        size = f"{save_model(Path(folder)) / 1e6:.0f} M weights"
        for title, settings in ROUNDS.items():
            found = measured({key: folder if value == "{model}" else value for key, value in settings.items()})
            print(f"| {title.format(size=size)} | {found['estimate'] / 1e6:.0f} | {found['growth'] / 1e6:.0f} |")


if __name__ == "__main__":
    main()
