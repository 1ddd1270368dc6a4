"""What the service costs beside plain ``ProxyModel.generate()``: throughput, time to first token, speed of one text.

    python benchmarks/serving.py

Makes a pair of random models (the large one of about 270 million parameters), saves them as a run, starts a real
``fedpt serve`` on it and asks it over HTTP from this process. The reference runs in this process, with as many threads,
while the service is idle; the two take turns, and only ratios inside one run are printed as results:

- throughput: new tokens per second of 8 requests at once, against ``generate()`` on the same 8 prompts as one batch;
- first token: from sending a prompt of 512 tokens to its first streamed token, against one forward pass over it of each
  of the three models;
- one text: new tokens per second of a single request, against ``generate()``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import httpx
import torch
from common import spread, timed
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from fedpt_flwr.config import flat_values, parse_run_config
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.proxy_folder import BUNDLED
from fedpt_flwr.runs import write_json

VOCAB = 32_000


def llama(seed: int, *, hidden: int, layers: int) -> LlamaForCausalLM:
    """A random model that never ends a text by itself."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def make_run(folder: Path, *, hidden: int, layers: int) -> ProxyModel:
    """Random models, saved as a run that has completed a round."""
    large = llama(1, hidden=hidden, layers=layers)
    large.save_pretrained(folder / "large")
    proxy = ProxyModel(large, llama(2, hidden=384, layers=6), llama(3, hidden=384, layers=6))
    tokens = Tokenizer(models.WordLevel({f"w{index} ": index for index in range(VOCAB)}, unk_token="w0 "))  # noqa: S106
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="w1 ", pad_token="w0 ")  # noqa: S106
    run = folder / "run"
    checkpoint = run / "rounds" / "0001" / "proxy"
    proxy.save_pretrained(checkpoint, large_ref=str(folder / "large"), untuned_ref=BUNDLED, tokenizer=tokenizer)
    (run / "proxy").symlink_to("rounds/0001/proxy")
    write_json(run / "config.json", {"run_config": flat_values(parse_run_config({}))})
    num_parameters = sum(weight.numel() for weight in large.parameters())
    print(f"large model: {num_parameters / 1e6:.0f} million parameters, float32", flush=True)
    return proxy


@contextmanager
def service(run: Path, num_threads: int) -> Iterator[str]:
    """A running service; its address."""
    command = [sys.executable, "-m", "fedpt_flwr.cli", "serve", str(run), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--threads", str(num_threads)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    errors = cast(IO[str], process.stderr)
    try:
        for line in errors:
            if found := re.search(r"Serving \S+ at (\S+)", line):
                threading.Thread(target=errors.read, daemon=True).start()
                yield found[1]
                break
        else:
            raise SystemExit("the service did not start")
    finally:
        process.terminate()
        process.wait()


def ask(client: httpx.Client, prompt: list[int], num_tokens: int) -> list[float]:
    """The times at which a streamed text's tokens came."""
    body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "stream": True, "logprobs": 0}
    times = []
    with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["logprobs"]:
                times.append(time.perf_counter())
    if len(times) != num_tokens:
        raise SystemExit(f"{len(times)} tokens came instead of {num_tokens}")
    return times


def ratio(name: str, ours: list[float], theirs: list[float], *, goal: str, of_speed: bool) -> dict[str, float | str]:
    """Print and return the median of the turns' ratios: of speeds, or of times."""
    pairs = [b / a if of_speed else a / b for a, b in zip(ours, theirs, strict=True)]
    found = spread(pairs)
    print(
        f"{name}: {found['ratio']:.2f}x (goal {goal}; {min(pairs):.2f} to {max(pairs):.2f} in {len(pairs)} turns; "
        f"medians {statistics.median(ours):.3f} s and {statistics.median(theirs):.3f} s)",
        flush=True,
    )
    return {"name": name, **found, "goal": goal}


def main() -> None:
    """Measure in turns and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each measurement")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the service and of the reference")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size of the large model")
    parser.add_argument("--layers", type=int, default=16, help="layers of the large model")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each text")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers_logging.disable_progress_bar()
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, VOCAB, (8, 64), generator=generator)
    long_prompt = torch.randint(2, VOCAB, (1, 512), generator=generator)
    results = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        proxy = make_run(Path(folder), hidden=args.hidden, layers=args.layers)

        def generate(ids: torch.Tensor) -> None:
            proxy.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.tokens, do_sample=False)

        def prefill() -> None:
            for model in (proxy.large, proxy.tuned, proxy.untuned):
                model(long_prompt, logits_to_keep=1)

        with service(Path(folder) / "run", args.threads) as url, httpx.Client(base_url=url, timeout=600) as client:

            def ask_all() -> None:
                with ThreadPoolExecutor(len(prompts)) as pool:
                    list(pool.map(lambda row: ask(client, row.tolist(), args.tokens), prompts))

            for warm_up in (ask_all, lambda: generate(prompts), prefill):
                warm_up()
            batch, first, single = ([], []), ([], []), ([], [])
            for _ in range(args.repeats):
                batch[0].append(timed(ask_all))
                batch[1].append(timed(lambda: generate(prompts)))
                first[0].append(timed(lambda: ask(client, long_prompt[0].tolist(), 1)))
                first[1].append(timed(prefill))
                single[0].append(timed(lambda: ask(client, prompts[0].tolist(), args.tokens)))
                single[1].append(timed(lambda: generate(prompts[:1])))
    results.append(ratio("throughput of 8 requests", *batch, goal="at least 0.85", of_speed=True))
    results.append(ratio("time to first token, 512 tokens", *first, goal="at most 1.3", of_speed=False))
    results.append(ratio("speed of one text", *single, goal="at least 0.9", of_speed=True))
    if args.json:
        write_json(args.json, {"threads": args.threads, "results": results})


if __name__ == "__main__":
    main()
