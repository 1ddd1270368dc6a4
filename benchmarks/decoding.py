"""How fast proxy decoding is: against the large model alone, and against three models one after the other.

    python benchmarks/decoding.py

Makes its own models (trio.py tells how, and how often their drafter is right), decodes with them by every method in
turns, and prints a table of each setting and the ratios that matter beside their goals. Only ratios inside one turn are
results; each is the median over the turns. Times include the prompt's forward pass. The methods:

- ``stock``: ``generate()`` of the large model, as transformers has it; ``stock, prepared`` on packed weights, or on a
  GPU ``stock, compiled``, with transformers' static cache and compiled passes; and ``own plain``, a bare loop over the
  step function of the prepared large model. The fastest is "our best plain".
- ``reference``: the formula, written as a loop over three models of transformers. All tokens are compared with its.
- ``three-forward``: ``ProxyModel.generate()`` that drafts nothing;
- ``draft 1`` to ``draft 6``, ``adaptive``: the same with drafts, of a fixed and of the adapting length.

``ProxyModel`` is prepared unless the method says otherwise. The workloads differ in how often the drafter is right:
``high``, ``middle`` and ``never``; in the setting ``adapter`` the tuned model is the untuned one with an adapter. The
limit of a method is the bandwidth with which this machine sums a large tensor, over the bytes of weights that a token
makes it read. Peak memory is that of a fresh process each, less what importing takes.

A full run takes about three quarters of an hour on one core, ``--size small`` a third of that, ``--quick`` less than a
minute.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import trio
from common import machine, resident_bytes, spread, timed
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging as transformers_logging

from fedpt_flwr import packing
from fedpt_flwr.graphs import graphed
from fedpt_flwr.huge_pages import Room
from fedpt_flwr.lean import step_function
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.runs import write_json

DRAFTS = (1, 2, 3, 4, 6)


@dataclass(frozen=True)
class Setting:
    """One batch size with one kind of drafter."""

    workload: str
    batch: int
    drafts: tuple[int, ...] = DRAFTS
    against_plain: bool = False
    """Whether the large model alone takes part."""
    unprepared: bool = False
    """Whether the proxy on stock weights takes part."""
    ragged: bool = False
    """Whether prompts of unequal lengths take part."""
    adapter: bool = False
    """Whether the tuned model is the untuned one with an adapter, and both are one copy of the weights."""


SETTINGS = {
    "batch1": Setting("high", 1, against_plain=True, unprepared=True),
    "middle": Setting("middle", 1),
    "never": Setting("never", 1),
    "adapter": Setting("high", 1, against_plain=True, unprepared=True, adapter=True),
    "batch8": Setting("high", 8, (1, 2, 3), against_plain=True, ragged=True),
    "batch32": Setting("high", 32, (1,), against_plain=True),
}
MEMORY = "memory"


class Comparison(NamedTuple):
    """A ratio of speeds that is to reach a goal."""

    text: str
    settings: tuple[str, ...]
    ours: str
    theirs: str
    """The name of a method, or one of :data:`BEST`."""
    of_llama: float | None
    """The goal for Llama-type models; None only reports."""
    of_others: float | None


BEST = {
    "best plain": ("stock", "stock, prepared", "stock, compiled", "own plain"),
    "best fixed": tuple(f"draft {length}" for length in DRAFTS),
}
"""Sets of methods of which the one with the best median counts."""

COMPARISONS = (
    Comparison("adaptive / stock generate()", ("batch1",), "adaptive", "stock", 3.0, 2.6),
    Comparison("adaptive / our best plain", ("batch1",), "adaptive", "best plain", 1.5, 1.4),
    Comparison("adaptive / reference loop", ("batch1",), "adaptive", "reference", 3.5, 3.0),
    Comparison("three-forward / our best plain", ("batch1",), "three-forward", "best plain", 0.83, 0.72),
    Comparison("adaptive / best fixed", ("batch1", "middle", "never"), "adaptive", "best fixed", 0.95, 0.95),
    Comparison("adaptive / three-forward", ("batch1", "middle", "never"), "adaptive", "three-forward", 0.85, 0.85),
    Comparison("adaptive / stock generate()", ("adapter",), "adaptive", "stock", None, None),
    Comparison("adaptive / our best plain", ("adapter",), "adaptive", "best plain", None, None),
    Comparison("adaptive / reference loop", ("adapter",), "adaptive", "reference", None, None),
    Comparison("adaptive / best fixed", ("adapter",), "adaptive", "best fixed", None, None),
    Comparison("adaptive / three-forward", ("adapter",), "adaptive", "three-forward", None, None),
    Comparison("three-forward / our best plain", ("adapter",), "three-forward", "best plain", None, None),
    Comparison("adaptive / stock generate()", ("batch8",), "adaptive", "stock", 1.9, None),
    Comparison("adaptive / stock generate()", ("batch32",), "adaptive", "stock", 1.35, None),
    Comparison("ragged / equal prompts", ("batch8",), "adaptive, ragged", "adaptive", 0.9, 0.9),
    Comparison("ragged / equal, three-forward", ("batch8",), "three-forward, ragged", "three-forward", 0.9, 0.9),
)
ACCEPTANCE, SHARE_OF_LIMIT = 0.7, 0.6
PEAK_OF_PROXY, PEAK_OF_LORA_PAIR = 1.05, 1.0


@dataclass(frozen=True)
class Goal:
    """A figure beside what it should be."""

    what: str
    family: str
    dtype: str
    setting: str
    value: float
    goal: float | None
    at_most: bool = False
    lowest: float | None = None
    highest: float | None = None

    @property
    def is_met(self) -> bool | None:
        """Whether it is; None where nothing is asked for."""
        if self.goal is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal


class Prompts(NamedTuple):
    """Prompts of equal lengths, or padded on the left; both ``(rows, seq)``."""

    ids: Tensor
    mask: Tensor


class Reference(NamedTuple):
    """What every method must write, and by how much each token was ahead of the next best; both ``(rows, new)``."""

    new: Tensor
    margins: Tensor


@dataclass
class Method:
    """One way of decoding, and what was seen of it."""

    name: str
    decode: Callable[[Prompts, int], Tensor]
    """From prompts and a number of tokens to the new tokens, ``(rows, new)``."""
    bytes_per_round: int = 0
    """Weights that are read for one token, or for one round of drafting; 0 if unknown."""
    draft: int = 0
    """Tokens drafted per round."""
    is_proxy: bool = True
    """Whether its tokens must be the reference's."""
    is_ragged: bool = False
    seconds: list[float] = field(default_factory=list)
    num_rows: int = 0
    differing: list[dict[str, float]] = field(default_factory=list)
    """The rows that are not the reference's: the first other token, and the reference's margin there."""


def progress(text: str) -> None:
    """Say what is going on."""
    print(text, file=sys.stderr, flush=True)


# Decoding


def stock(model: PreTrainedModel, prompts: Prompts, num_new: int, **settings: Any) -> Tensor:
    """``generate()``, greedy."""
    output = model.generate(
        prompts.ids, attention_mask=prompts.mask, max_new_tokens=num_new, do_sample=False, pad_token_id=0, **settings
    )
    return output[:, prompts.ids.shape[1] :]


def plain_loop(step: Any, prompts: Prompts, num_new: int) -> Tensor:
    """The large model alone, with nothing around its step function."""
    cache = step.new_cache()
    cache.add_rows(len(prompts.ids))
    tokens, new = prompts.ids, []
    for _ in range(num_new):
        tokens = step(cache, tokens)[:, -1].argmax(-1, keepdim=True)
        new.append(tokens)
    return torch.cat(new, 1)


def reference_loop(models: Sequence[PreTrainedModel], prompts: Prompts, num_new: int) -> Reference:
    """The formula: for each token a forward pass of ``large``, ``tuned`` and ``untuned``."""
    caches = [DynamicCache(config=model.config) for model in models]
    tokens, mask, new, margins = prompts.ids, prompts.mask, [], []
    for _ in range(num_new):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        large, tuned, untuned = (
            model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                cache=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            .logits[:, -1]
            .float()
            for model, cache in zip(models, caches, strict=True)
        )
        scores = large + (tuned - untuned)
        tokens = scores.argmax(-1, keepdim=True)
        best, next_best = scores.topk(2).values.unbind(-1)
        new.append(tokens)
        margins.append(best - next_best)
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)
    return Reference(torch.cat(new, 1), torch.stack(margins, 1))


def make_prompts(seed: int, batch: int, length: int, model: PreTrainedModel) -> Prompts:
    """Random prompts: for these models, as good as any text."""
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
    return Prompts(ids.to(model.device), torch.ones_like(ids).to(model.device))


def make_ragged(prompts: Prompts) -> Prompts:
    """The same tokens in rows of a quarter to seven quarters of the length."""
    batch, length = prompts.ids.shape
    lengths = [round(length * (0.25 + 1.5 * row / (batch - 1))) for row in range(batch)]
    lengths[-1] += batch * length - sum(lengths)
    ids = prompts.ids.new_zeros((batch, lengths[-1]))
    mask = torch.zeros_like(ids)
    for row, part in enumerate(prompts.ids.flatten().split(lengths)):
        ids[row, -len(part) :], mask[row, -len(part) :] = part, 1
    return Prompts(ids, mask)


# Measuring


class Models:
    """The models of one family in one dtype, once as they were loaded and once prepared.

    Args:
        folder: Where :func:`trio.make` wrote them.
        dtype: Of their weights.
        device: Where they are to be.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: str) -> None:
        self._folder, self._dtype, self._device = folder, dtype, device
        self.large = self._load("large")
        self.prepared = self._load("large")
        self._used = ("", False)

    def use(self, workload: str, adapter: bool) -> None:
        """Take the small models of this workload, or its untuned one with an adapter."""
        if (workload, adapter) == self._used:
            return
        self._used = workload, adapter
        self.stock = (self.large, self._tuned(workload, adapter), self._load(f"{workload}/untuned"))
        self.bytes_read = [trio.bytes_read(model) for model in self.stock]
        self.stock_proxy = self._proxy(self.large, workload, adapter)
        self.proxy = self._proxy(self.prepared, workload, adapter).prepare()

    def methods(self, setting: Setting) -> list[Method]:
        """All ways of decoding that take part in a setting, but for the reference."""
        large, small, _ = self.bytes_read
        three = large + 2 * small

        def proxy(draft: int | str, model: ProxyModel = self.proxy) -> Callable[[Prompts, int], Tensor]:
            return lambda prompts, num_new: stock(model, prompts, num_new, draft_tokens=draft)

        found = [Method("three-forward", proxy(0), three)]
        # A round asks the drafter once more than it drafts, and the two others once.
        found += [Method(f"draft {n}", proxy(n), large + (n + 2) * small, draft=n) for n in setting.drafts]
        found.append(Method("adaptive", proxy("auto")))
        if setting.unprepared:
            found.append(Method("three-forward, unprepared", proxy(0, self.stock_proxy), three))
            found.append(Method("adaptive, unprepared", proxy("auto", self.stock_proxy)))
        if setting.ragged:
            found.append(Method("three-forward, ragged", proxy(0), three, is_ragged=True))
            found.append(Method("adaptive, ragged", proxy("auto"), is_ragged=True))
        if setting.against_plain:
            step = graphed(step_function(self.prepared))

            plain = {"stock": lambda *given: stock(self.large, *given)}
            if self._device == "cpu":
                plain["stock, prepared"] = lambda *given: stock(self.prepared, *given)
            elif setting.batch == 1:  # it takes a minute to compile
                plain["stock, compiled"] = lambda *given: stock(self.large, *given, cache_implementation="static")
            plain["own plain"] = lambda *given: plain_loop(step, *given)
            found += [Method(name, decode, large, is_proxy=False) for name, decode in plain.items()]
        return found

    def _tuned(self, workload: str, adapter: bool) -> PreTrainedModel | PeftModel:
        return trio.adapted(self._load(f"{workload}/untuned")) if adapter else self._load(f"{workload}/tuned")

    def _proxy(self, large: PreTrainedModel, workload: str, adapter: bool) -> ProxyModel:
        untuned = None if adapter else self._load(f"{workload}/untuned")
        return ProxyModel(large, self._tuned(workload, adapter), untuned)

    def _load(self, name: str) -> PreTrainedModel:
        model = trio.load(self._folder / name, self._dtype, self._device)
        if self._device == "cpu":  # how fast a file is read that is seen as memory depends on how it got into the cache
            for weight in model.parameters():
                weight.data = weight.data.clone()
        return model


def read_bandwidth(device: str, num_bytes: int) -> float:
    """Bytes per second in summing a tensor, which lies in large pages if there are any, the best of three passes."""
    tensor = torch.ones(num_bytes // 4, device=device)
    if device == "cpu":
        tensor = Room(num_bytes, num_bytes).moved(tensor)
    tensor.sum()
    return tensor.nbytes / min(timed(tensor.sum) for _ in range(3))


def run(method: Method, prompts: Prompts, wanted: Reference) -> None:
    """Decode once by a method, and note its time and the rows that are not the reference's."""
    output: list[Tensor] = []
    method.seconds.append(timed(lambda: output.append(method.decode(prompts, wanted.new.shape[1]))))
    if not method.is_proxy:
        return
    method.num_rows += len(wanted.new)
    for row, differs in enumerate(output[0] != wanted.new):
        if differs.any():
            place = int(differs.int().argmax())
            method.differing.append({"row": row, "token": place, "margin": float(wanted.margins[row, place])})


def measure(models: Models, setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """All methods of a setting in turns, every turn with other prompts."""
    models.use(setting.workload, setting.adapter)
    num_new = args.new_tokens
    reference = Method("reference", lambda *_: torch.empty(0), sum(models.bytes_read), is_proxy=False)
    methods = models.methods(setting)
    bandwidths, right = [], []
    # On a GPU passes are compiled or recorded for their sizes, when these are first met.
    lengths = (8, 8) if args.device == "cpu" else (args.prompt_tokens, num_new)
    warm_up = make_prompts(0, setting.batch, lengths[0], models.large)
    for method in methods:
        method.decode(warm_up, lengths[1])
    reference_loop(models.stock, warm_up, lengths[1])
    for turn in range(args.repeats):
        bandwidths.append(read_bandwidth(args.device, args.bandwidth_bytes))
        prompts = make_prompts(turn, setting.batch, args.prompt_tokens, models.large)
        wanted: list[Reference] = []
        reference.seconds.append(
            timed(lambda: wanted.append(reference_loop(models.stock, prompts, num_new)))  # noqa: B023 (called at once)
        )
        if setting.ragged:
            ragged = make_ragged(prompts)
            wanted.append(reference_loop(models.stock, ragged, num_new))
        for method in methods[:: -1 if turn % 2 else 1]:
            run(method, *((ragged, wanted[1]) if method.is_ragged else (prompts, wanted[0])))
        right.append(trio.agreement(models.stock[1], prompts.ids, wanted[0].new))
        progress(f"  turn {turn + 1} of {args.repeats}")
    return summary(setting, num_new, [reference, *methods], torch.cat(right), bandwidths) | {
        "prompt_tokens": args.prompt_tokens
    }


def summary(
    setting: Setting, num_new: int, methods: Sequence[Method], right: Tensor, bandwidths: Sequence[float]
) -> dict[str, Any]:
    """What was measured of a setting, as it goes into the JSON file."""
    drafting = {n: trio.drafting(right, n) for n in DRAFTS}
    found = {}
    for method in methods:
        tokens_per_round = drafting[method.draft][1] if method.draft else 1.0
        # Weights are read once for all rows of a batch.
        shares = [
            num_new / tokens_per_round * method.bytes_per_round / seconds / bandwidth
            for seconds, bandwidth in zip(method.seconds, bandwidths, strict=True)
        ]
        found[method.name] = {
            "seconds": method.seconds,
            "tokens_per_second": setting.batch * num_new / statistics.median(method.seconds),
            "share_of_limit": statistics.median(shares) if method.bytes_per_round else None,
            "rows_compared": method.num_rows,
            "rows_differing": method.differing,
        }
    return {
        "workload": setting.workload,
        "batch": setting.batch,
        "new_tokens": num_new,
        "agreement": right.float().mean().item(),
        "drafting": {
            n: {"acceptance": acceptance, "tokens_per_round": per_round}
            for n, (acceptance, per_round) in drafting.items()
        },
        "bandwidth_bytes_per_s": list(bandwidths),
        "methods": found,
    }


# Memory


def peak_of(which: str, folder: Path, dtype: torch.dtype, device: str, args: argparse.Namespace) -> int:
    """Peak memory in bytes of loading some models and decoding with them, in this process, which has done nothing."""
    before = resident_bytes(device)
    large = trio.load(folder / "large", dtype, device)
    prompts = make_prompts(0, 1, args.prompt_tokens, large)
    if which == "large":
        stock(large, prompts, args.new_tokens)
        return resident_bytes(device, peak=True) - before
    untuned = trio.load(folder / "high/untuned", dtype, device)
    if which == "LoRA pair":
        proxy = ProxyModel(large, trio.adapted(untuned))
    else:
        tuned = trio.load(folder / "high/tuned", dtype, device)
        proxy = ProxyModel(large, tuned, untuned)
    if which == "three models":
        reference_loop((large, tuned, untuned), prompts, args.new_tokens)
    else:
        proxy.prepare()
        stock(proxy, prompts, args.new_tokens)
    return resident_bytes(device, peak=True) - before


def measure_memory(folder: Path, dtype: str, args: argparse.Namespace) -> dict[str, int]:
    """Peak memory of each in a process of its own, and the size of one small model, in bytes."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--models",
        str(folder),
        "--dtypes",
        dtype,
        "--device",
        args.device,
    ]
    command += ["--threads", str(args.threads), "--prompt-tokens", str(args.prompt_tokens)]
    command += ["--new-tokens", str(args.new_tokens)]
    peaks = {}
    for which in ("large", "three models", "proxy", "LoRA pair"):
        child = subprocess.run([*command, "--peak-of", which], stdout=subprocess.PIPE, text=True, check=True)
        peaks[which] = json.loads(child.stdout)
    small = trio.load(folder / "high/untuned", getattr(torch, dtype), "cpu")
    return peaks | {"small_weights": sum(weight.nbytes for weight in small.parameters())}


# Results


def compared(settings: dict[str, Any], comparison: Comparison, setting: str) -> dict[str, float] | None:
    """A comparison's ratio in one setting; None where its methods took no part."""
    methods = settings[setting]["methods"]
    candidates = [name for name in BEST.get(comparison.theirs, (comparison.theirs,)) if name in methods]
    if comparison.ours not in methods or not candidates:
        return None
    theirs = min(candidates, key=lambda name: statistics.median(methods[name]["seconds"]))
    pairs = zip(methods[comparison.ours]["seconds"], methods[theirs]["seconds"], strict=True)
    return spread([other / own for own, other in pairs])


def goals_of(family: str, dtype: str, settings: dict[str, Any]) -> list[Goal]:
    """The figures of one family in one dtype beside their goals."""
    is_llama = family == "llama"
    found = []
    timed_settings = {name: seen for name, seen in settings.items() if name != MEMORY}
    if "batch1" in settings:
        acceptance = settings["batch1"]["drafting"][3]["acceptance"]
        found.append(Goal("acceptance at 3 drafts", family, dtype, "batch1", acceptance, ACCEPTANCE))
    for comparison in COMPARISONS:
        goal = comparison.of_llama if is_llama else comparison.of_others
        for setting in comparison.settings:
            if setting in settings and (ratio := compared(settings, comparison, setting)):
                found.append(
                    Goal(
                        comparison.text,
                        family,
                        dtype,
                        setting,
                        ratio["ratio"],
                        goal,
                        lowest=ratio["lowest"],
                        highest=ratio["highest"],
                    )
                )
    if "batch1" in settings:
        share = settings["batch1"]["methods"]["three-forward"]["share_of_limit"]
        goal = SHARE_OF_LIMIT if is_llama else None
        found.append(Goal("three-forward / bandwidth limit", family, dtype, "batch1", share, goal))
    if timed_settings:
        methods = [method for seen in timed_settings.values() for method in seen["methods"].values()]
        differing = sum(len(method["rows_differing"]) for method in methods)
        num_rows = sum(method["rows_compared"] for method in methods)
        what = f"differing greedy rows of {num_rows}"
        found.append(Goal(what, family, dtype, "all", differing, 0 if dtype == "float32" else None, at_most=True))
    if peaks := settings.get(MEMORY):
        of_proxy = peaks["proxy"] / peaks["three models"]
        of_pair = peaks["LoRA pair"] / (peaks["large"] + 1.1 * peaks["small_weights"])
        for what, value, goal in (
            ("peak memory / three plain models", of_proxy, PEAK_OF_PROXY),
            ("LoRA pair's / (large + 1.1 small)", of_pair, PEAK_OF_LORA_PAIR),
        ):
            found.append(Goal(what, family, dtype, MEMORY, value, goal, at_most=True))
    return found


def print_setting(title: str, seen: dict[str, Any]) -> None:
    """A table of the methods of one setting."""
    drafts = ", ".join(
        f"{n}: {it['acceptance']:.2f}, {it['tokens_per_round']:.2f}" for n, it in seen["drafting"].items()
    )
    print(f"\n{title}: {seen['batch']} x ({seen['prompt_tokens']} + {seen['new_tokens']}) tokens; "
          f"the drafter is right {seen['agreement']:.2f}")  # fmt: skip
    print(f"  accepted / drafted, tokens per round at draft length {drafts}")
    print(f"  {'method':28}{'tokens/s':>10}{'/ stock':>10}{'/ three-forward':>17}{'of limit':>10}{'differing':>11}")
    methods = seen["methods"]
    for name, method in methods.items():
        columns = []
        for other in ("stock", "three-forward"):
            if other in methods:
                pairs = zip(method["seconds"], methods[other]["seconds"], strict=True)
                columns.append(f"{statistics.median(theirs / ours for ours, theirs in pairs):.2f}")
            else:
                columns.append("")
        share = "" if method["share_of_limit"] is None else f"{method['share_of_limit']:.0%}"
        differing = f"{len(method['rows_differing'])}/{method['rows_compared']}" if method["rows_compared"] else ""
        print(
            f"  {name:28}{method['tokens_per_second']:10.1f}{columns[0]:>10}{columns[1]:>17}{share:>10}{differing:>11}"
        )
    for name, method in methods.items():
        for row in method["rows_differing"]:
            print(f"  {name}: row {row['row']} differs from token {row['token']} on, margin {row['margin']:.1e}")
    sys.stdout.flush()


def print_goals(goals: Sequence[Goal]) -> None:
    """All figures beside their goals."""
    print(f"\n{'':38}{'family':8}{'dtype':10}{'setting':9}{'measured':>9}{'goal':>9}")
    for goal in goals:
        wanted = "" if goal.goal is None else f"{'<=' if goal.at_most else '>='} {goal.goal:g}"
        verdict = {True: "  met", False: "  MISSED", None: ""}[goal.is_met]
        value = f"{goal.value:g}" if float(goal.value).is_integer() else f"{goal.value:.2f}"
        print(f"{goal.what:38}{goal.family:8}{goal.dtype:10}{goal.setting:9}{value:>9}{wanted:>9}{verdict}")


# The command


def measure_family(
    family: str, dtype: str, folder: Path, names: Sequence[str], args: argparse.Namespace
) -> dict[str, Any]:
    """All settings of one family in one dtype; the models are gone when it returns."""
    found: dict[str, Any] = {}
    if MEMORY in names:
        progress(f"{family} {dtype} {MEMORY}")
        found[MEMORY] = measure_memory(folder, dtype, args)
    names = [name for name in names if name != MEMORY]
    if names:
        models = Models(folder, getattr(torch, dtype), args.device)
        # Small models are loaded once.
        for name in sorted(names, key=lambda name: (SETTINGS[name].workload, SETTINGS[name].adapter)):
            progress(f"{family} {dtype} {name}")
            found[name] = measure(models, SETTINGS[name], args)
            print_setting(f"{family} {dtype} {name}", found[name])
        del models
        gc.collect()
    return found


def chosen_settings(family: str, dtype: str, args: argparse.Namespace) -> list[str]:
    """What is measured of a family in a dtype: all, unless the command says or it would say nothing new."""
    if args.only:
        return [name for name in (*SETTINGS, MEMORY) if name in args.only]
    if args.device == "cpu" and dtype != args.dtypes[0]:
        return ["batch1"]
    if family == "llama":
        return [*SETTINGS, MEMORY]
    left_out = ("batch32", MEMORY) if args.quick else ("batch32",)
    return [name for name in (*SETTINGS, MEMORY) if name not in left_out]


def is_packable(dtype: str) -> bool:
    """Whether this machine has a kernel for packed weights of that dtype."""
    return packing.prepare(nn.Sequential(nn.Linear(16, 16, dtype=getattr(torch, dtype)))) > 0


def parse() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models, few tokens: only shows that it works")
    parser.add_argument("--size", choices=trio.SIZES, default="full", help="of the models")
    parser.add_argument("--family", nargs="+", choices=trio.FAMILIES, default=["llama", "gpt2"])
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16"], help="the first one is measured in full"
    )
    parser.add_argument("--only", nargs="+", choices=[*SETTINGS, MEMORY], help="only these settings")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each setting")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64, help="of each row")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache", type=Path, help="keep the models in this folder; else they are made anew")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.bandwidth_bytes = 1 << (29 if args.device == "cpu" else 32)
    if args.quick:
        args.size, args.repeats, args.prompt_tokens, args.new_tokens = "tiny", 1, 16, 16
        args.bandwidth_bytes = 1 << 24
    if not args.dtypes:
        args.dtypes = ["float32", "bfloat16"] if args.device == "cpu" else ["bfloat16"]
    return args


def main() -> None:
    """Make the models, measure, and print what was found."""
    args = parse()
    torch.set_num_threads(args.threads)
    transformers_logging.disable_progress_bar()
    with torch.inference_mode(), tempfile.TemporaryDirectory() as temporary:
        if args.peak_of:
            print(peak_of(args.peak_of, args.models, getattr(torch, args.dtypes[0]), args.device, args))
            return
        results: dict[str, dict[str, Any]] = {}
        goals: list[Goal] = []
        skipped = []
        for family in args.family:
            folder = (args.cache or Path(temporary)) / f"{family}-{args.size}"
            progress(f"{family}: making the models")
            weights = trio.make(folder, family, trio.SIZES[args.size])
            print(f"{family}: " + ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in weights.items()))
            results[family] = {"models": weights}
            for dtype in args.dtypes:
                if args.device == "cpu" and not is_packable(dtype):
                    skipped.append(f"{family} {dtype}: this CPU has no kernel for packed weights")
                    continue
                results[family][dtype] = measure_family(
                    family, dtype, folder, chosen_settings(family, dtype, args), args
                )
                goals += goals_of(family, dtype, results[family][dtype])
    print_goals(goals)
    for line in skipped:
        print(f"skipped {line}")
    if args.json:
        options = {
            name: value for name, value in vars(args).items() if name not in ("cache", "json", "models", "peak_of")
        }
        write_json(
            args.json,
            {
                "machine": machine(args.device, args.threads),
                "options": options,
                "goals": [asdict(goal) | {"is_met": goal.is_met} for goal in goals],
                "skipped": skipped,
                "results": results,
            },
        )


if __name__ == "__main__":
    main()
