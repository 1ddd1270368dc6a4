"""A real ``fedpt serve`` in a process of its own, and the run that it serves."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from federation import federate

TRAINED = {
    "num-server-rounds": 3,
    "train.max-steps": 12,
    "train.batch-size": 16,
    "distillation.mode": "off",
    "scoring.num-items": 24,
    "scoring.max-new-tokens": 24,
    "keep-rounds": 0,
}
"""A run of some seconds whose rounds all stay, and whose proxy says something else than the large model."""


def make_run(root: Path, run_config: dict | None = None) -> Path:
    """A run on the demo world; its folder."""
    return federate(root, run_config=TRAINED | (run_config or {}))


@dataclass
class Serving:
    """A service that answers."""

    url: str
    process: subprocess.Popen
    log: list[str] = field(default_factory=list)
    """Lines of its error output so far."""


@contextmanager
def serving(run: Path, *options: str, environment: dict | None = None) -> Iterator[Serving]:
    """Serve a run on a free port until the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fedpt_flwr.cli", "serve", str(run), "--port", "0", *options],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | (environment or {}),
    )
    service = Serving("", process)
    ready = threading.Event()

    def read() -> None:
        for line in process.stderr:
            service.log.append(line)
            if found := re.search(r"Serving \S+ at (\S+)", line):
                service.url = found[1]
                ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert ready.wait(120)
        assert service.url, "".join(service.log)
        yield service
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            reader.join(10)
            process.stderr.close()


def generated(proxy, tokenizer, prompt, *, max_tokens=16, model="proxy", **arguments):
    """What ``generate`` writes: ids and text."""
    models = {"proxy": proxy, "large": proxy.large, "tuned": proxy.tuned, "untuned": proxy.untuned}
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if arguments.get("temperature"):
        arguments |= {"do_sample": True, "top_k": 0, "top_p": arguments.get("top_p", 1.0)}
    else:
        arguments["do_sample"] = False
    output = models[model].generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        eos_token_id=proxy.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **arguments,
    )
    new = output[0, ids.shape[1] :].tolist()
    return new, tokenizer.decode(new, skip_special_tokens=True)


def wait_for_metric(http, name, value, timeout_s=60):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        lines = http.get("/metrics").text.splitlines()
        if f"{name} {value}" in lines:
            return
        time.sleep(0.05)
    raise AssertionError([line for line in lines if line.startswith(name)])
