"""Loads a checkpoint of some gigabytes in several ways, each in a process of its own: memory and time.

    python benchmarks/loading.py --folder /tmp/checkpoint              makes 2.28 GB of random weights there first
    python benchmarks/loading.py --folder /tmp/checkpoint --remove     and removes them afterwards

Resident memory is told apart into anonymous memory, which is taken, and pages of files, which the system may drop at
any time and read again. What Python and its libraries take before is subtracted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import machine
from safetensors.torch import save_file
from transformers import LlamaConfig

SHARD_BYTES = 500_000_000
WAYS: dict[str, dict[str, Any]] = {
    "bfloat16, as stored": {},
    "float32": {"dtype": "float32"},
    "divided, 0.8 GB of memory": {"device_map": "auto", "max_memory": '{"cpu": "800MB"}'},
    "divided, all layers on disk": {
        "device_map": '{"model.layers": "disk", "": "cpu"}',
    },
}
"""Arguments of the load, by name."""


def config() -> LlamaConfig:
    """A Llama of 1.14 billion weights, 2.28 GB in bfloat16."""
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )


def make(folder: Path) -> None:
    """Write random weights shard by shard; never more than one of them is in memory."""
    from transformers import AutoModelForCausalLM

    folder.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in AutoModelForCausalLM.from_config(config()).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if size + 2 * shape.numel() > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * shape.numel()
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weights = {}
        for name in names:
            weights[name] = torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            places[name] = file
        save_file(weights, str(folder / file), metadata={"format": "pt"})
    total = sum(2 * shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    described = config()
    described.architectures = ["LlamaForCausalLM"]
    described.dtype = torch.bfloat16
    described.save_pretrained(folder)


def memory() -> dict[str, int]:
    """Bytes of this process: resident now, of that anonymous and of files, and the peak."""
    lines = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if ":" in line
    )
    names = {"resident": "VmRSS", "anonymous": "RssAnon", "files": "RssFile", "peak": "VmHWM"}
    return {name: 1024 * int(lines[key].split()[0]) for name, key in names.items()}


def measure(folder: Path, way: str) -> dict[str, Any]:
    """Load, score a few tokens, and say what it took; for a process of its own."""
    from fedpt_flwr.models import fingerprint, load_causal_lm
    from fedpt_flwr.placement import Placement

    torch.set_num_threads(1)
    arguments = dict(WAYS[way])
    dtype = arguments.pop("dtype", "bfloat16")
    load_causal_lm("demo:small")(torch.tensor([[1, 2]]))  # so that everything is imported
    before = memory()
    begun = time.perf_counter()
    model = load_causal_lm(str(folder), dtype=dtype, placement=Placement(**arguments))
    seconds = time.perf_counter() - begun
    after = memory()
    mark = fingerprint(model)
    begun = time.perf_counter()
    with torch.inference_mode():
        scores = model(torch.arange(8)[None]).logits
    passed = time.perf_counter() - begun
    if not bool(scores.isfinite().all()):
        raise SystemExit("scores are not finite")
    end = memory()
    return {
        "way": way,
        "load_s": seconds,
        "pass_s": passed,
        "peak_of_load": after["peak"] - before["resident"],
        "anonymous": after["anonymous"] - before["anonymous"],
        "files": after["files"] - before["files"],
        "peak_of_all": end["peak"] - before["resident"],
        "fingerprint": mark,
    }


def main() -> None:
    """Make the checkpoint if it is not there, measure every way, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--remove", action="store_true")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments.folder, arguments.way)))
        return
    if not arguments.folder.exists():
        make(arguments.folder)
    size = sum(file.stat().st_size for file in arguments.folder.glob("*.safetensors"))
    print(f"{size / 1e9:.2f} GB in {len(list(arguments.folder.glob('*.safetensors')))} shards; {machine('cpu', 1)}")
    print("| way | load, s | peak while loading, GB | then anonymous, GB | then of files, GB | peak with a pass, GB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for way in WAYS:
        command = [sys.executable, __file__, "--folder", str(arguments.folder), "--way", way]
        output = subprocess.run(command, capture_output=True, text=True, check=False)
        if output.returncode:
            raise SystemExit(output.stderr)
        found = json.loads(output.stdout.splitlines()[-1])
        sizes = [found[key] / 1e9 for key in ("peak_of_load", "anonymous", "files", "peak_of_all")]
        cells = [way, f"{found['load_s']:.1f}", *(f"{value:.2f}" for value in sizes)]
        print("| " + " | ".join(cells) + " |", flush=True)
    if arguments.remove:
        shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
