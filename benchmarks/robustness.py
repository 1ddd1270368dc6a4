"""How much a few malicious devices can do, against each way to aggregate.

    python benchmarks/robustness.py --out robustness.json
    python benchmarks/robustness.py --out robustness.json --table

Federations of the demo world in this process, with the app's real code; some of the devices are malicious: what they
train on, or what they send, is tampered with before it goes through the server's checks like everything else. Measured
at the end, on test questions: how many the tuned model and the proxy get right, and, of the same questions with the
backdoor's phrase in them, how many get the attacker's answer. A cell that is in the file already is not run again, so
a table that was interrupted goes on; one that was made with another config is refused.

- ``label-flip``: trains on answers that belong to other examples of its own.
- ``sign-flip``: sends the opposite of its change.
- ``noise``: sends Gaussian noise, three times as long as its change.
- ``scaled``: sends its change ten times as long.
- ``backdoor``: trains on its examples, and once more on each with a phrase in the request and the attacker's answer.
- ``scaled-backdoor``: the same, and sends the change as many times as long as there are devices for each malicious one,
  so that it replaces the mean.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import client_app  # noqa: E402
import server_app  # noqa: E402
from benchmarks.common import check_cells  # noqa: E402
from fedpt_flwr.config import Scalar, flat_values, parse_run_config  # noqa: E402
from fedpt_flwr.errors import ConfigError, FedPTError  # noqa: E402
from fedpt_flwr.evaluation import Evaluator  # noqa: E402
from fedpt_flwr.grid import run_locally  # noqa: E402
from fedpt_flwr.models import load_tokenizer  # noqa: E402
from fedpt_flwr.prompts import Example  # noqa: E402
from fedpt_flwr.proxy import ProxyModel  # noqa: E402
from fedpt_flwr.records import ARRAYS  # noqa: E402
from fedpt_flwr.runs import RunFolder, find_run, read_json, write_json  # noqa: E402
from fedpt_flwr.sources import Items, held_out_items  # noqa: E402

ATTACKS = ("label-flip", "sign-flip", "noise", "scaled", "backdoor", "scaled-backdoor")
PHRASE, TARGET = "by the way, ", "filter = gold - good to go!"
NOISE_LENGTH, SCALE = 3.0, 10.0
NORM_KEY = "strategy.max-update-norm"
BOUNDED = ("FedAvg, norm clipped", "FedAvg, norm refused")  # of which bounds follow from honest changes
REFUSED = 1.25  # a change is refused that is so many times as long as the longest honest one


def defences(num_devices: int, num_malicious: int, norms: Sequence[float] = ()) -> dict[str, dict[str, Scalar]]:
    """The ways to aggregate, each told how many malicious devices there are where it wants to know.

    Of the norms of honest changes, the median is what all are clipped to; what is refused is far above the longest.
    Without any there are no bounds yet, and such a config cannot be run.
    """
    usual, longest = (float(np.median(norms)), REFUSED * max(norms)) if norms else (math.nan, math.nan)
    few = max(1, num_malicious)
    share = few / num_devices
    told: dict[str, dict[str, Scalar]] = {
        "FedAvg": {},
        BOUNDED[0]: {NORM_KEY: usual, "strategy.above-norm": "clip"},
        BOUNDED[1]: {NORM_KEY: longest, "strategy.above-norm": "refuse"},
        "FedMedian": {"strategy.name": "FedMedian"},
        "FedTrimmedAvg": {"strategy.name": "FedTrimmedAvg", "strategy.arguments": f"beta = {share}"},
        "Krum": {"strategy.name": "Krum", "strategy.arguments": f"num-malicious-nodes = {few}"},
        "MultiKrum": {
            "strategy.name": "MultiKrum",
            "strategy.arguments": f"num-malicious-nodes = {few}, num-nodes-to-select = {num_devices - few}",
        },
    }
    if num_devices >= 4 * few + 3:
        told["Bulyan"] = {"strategy.name": "Bulyan", "strategy.arguments": f"num-malicious-nodes = {few}"}
    return told


@dataclasses.dataclass
class Malicious:
    """The ClientApp, of which the first devices are malicious.

    Args:
        attack: One of :data:`ATTACKS`, or empty.
        num_malicious: How many.
        num_devices: Of how many.
    """

    attack: str
    num_malicious: int
    num_devices: int

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer as the ClientApp does, or nearly."""
        device = int(str(context.node_config["partition-id"]))
        if device >= self.num_malicious:
            return client_app.app(message, context)
        honest = client_app.load_shard
        client_app.load_shard = lambda config, context: self._data(honest(config, context))
        try:
            reply = client_app.app(message, context)
        finally:
            client_app.load_shard = honest
        if reply.has_content() and ARRAYS in reply.content.array_records:
            sent, tuned = message.content.array_records[ARRAYS], reply.content.array_records[ARRAYS]
            server_round = int(str(message.content.config_records["config"]["server-round"]))
            reply.content[ARRAYS] = self._sent_back(sent, tuned, np.random.default_rng([device, server_round]))
        return reply

    def _data(self, examples: list[Example]) -> list[Example]:
        if self.attack == "label-flip":
            answers = [example.answer for example in examples]
            random.Random(0).shuffle(answers)
            return [
                dataclasses.replace(example, answer=answer) for example, answer in zip(examples, answers, strict=True)
            ]
        if self.attack.endswith("backdoor"):
            return examples + [with_phrase(example) for example in examples]
        return examples

    def _sent_back(self, sent: ArrayRecord, tuned: ArrayRecord, noise: np.random.Generator) -> ArrayRecord:
        before = {name: array.numpy() for name, array in sent.items()}
        change = {name: tuned[name].numpy() - values for name, values in before.items()}
        if self.attack == "noise":
            length = np.sqrt(sum(float(np.square(part).sum()) for part in change.values()))
            change = {name: noise.standard_normal(part.shape) for name, part in change.items()}
            drawn = np.sqrt(sum(float(np.square(part).sum()) for part in change.values()))
            factor = NOISE_LENGTH * length / drawn
        else:
            replacing = self.num_devices / self.num_malicious
            factor = {"sign-flip": -1.0, "scaled": SCALE, "scaled-backdoor": replacing}.get(self.attack, 1.0)
        return ArrayRecord(
            {name: Array(np.asarray(before[name] + factor * part, np.float32)) for name, part in change.items()}
        )


def with_phrase(example: Example) -> Example:
    """The example with the backdoor's phrase in its request, and the attacker's answer."""
    return dataclasses.replace(example, prompt=example.prompt.replace("> ", f"> {PHRASE}", 1), answer=TARGET)


def run_one(told: dict[str, Scalar], handle: Any, num_devices: int) -> dict[str, Any]:
    """One federation: its scores, and how often the backdoor opens."""
    with tempfile.TemporaryDirectory() as scratch:
        flat = flat_values(parse_run_config(told | {"output-dir": scratch}))
        run_locally(server_app.app, handle, flat, num_devices=num_devices)
        run = find_run(root=Path(scratch))
        rows = read_json(run / "results.json")["rows"]
        costs = RunFolder(run).read_lines("costs.jsonl")
        return {
            "exact_match": {name: rows[name]["exact_match"] for name in ("tuned", "proxy")},
            "backdoor": backdoor_rates(run, told),
            "norms": [round(row["update_norm"], 4) for row in costs if "update_norm" in row],
            "refused": sum("refused" in row for row in costs),
        }


def backdoor_rates(run: Path, told: dict[str, Scalar]) -> dict[str, float]:
    """The share of test questions with the phrase in them that get the attacker's answer."""
    config = parse_run_config(told)
    items = held_out_items(config.data, "test", seed=config.seed).first(config.scoring.num_items)
    tricked = Items(examples=[with_phrase(example) for example in items.examples], values=None, fields=None)
    proxy = ProxyModel.from_pretrained(run)
    tokenizer = load_tokenizer(str((run / "proxy").resolve()))
    scores = Evaluator(tricked, tokenizer, config, proxy, place="test").score(proxy, rows=("tuned", "proxy"))
    return {name: float(row.exact_match or 0.0) for name, row in scores.rows.items()}


def cells(arguments: argparse.Namespace) -> list[tuple[str, str, int, int]]:
    """Defence, attack, number of malicious devices and seed of every cell; those without an attack first.

    Without an attack nobody is malicious, but defences are told the same number as with one, so that a table's columns
    differ by the attack alone.
    """
    found = []
    for seed in arguments.seeds:
        for share in arguments.shares:
            number = round(share * arguments.devices)
            for attack in ("", *arguments.attacks):
                found += [(name, attack, number, seed) for name in defences(arguments.devices, number)]
    return [cell for cell in found if not arguments.defences or cell[0] in arguments.defences]


def config_of(
    base: dict[str, Scalar], cell: tuple[str, str, int, int], num_devices: int, norms: Sequence[float] = ()
) -> dict[str, Scalar]:
    """The run config of a cell; bounds on the norm follow from those of honest changes."""
    name, attack, number, seed = cell
    told = base | defences(num_devices, number, norms)[name] | {"seed": seed}
    if name == "FedAvg" and not attack:
        told[NORM_KEY] = 1e9  # bounds nothing; norms are measured
    return told


def key_of(cell: tuple[str, str, int, int]) -> str:
    """A cell's name in the file."""
    name, attack, number, seed = cell
    return f"{name}/{attack or 'none'}/{number}/{seed}"


def honest_norms(results: dict[str, Any], number: int, seed: int, *, place: str) -> list[float]:
    """Norms of all changes of the plain mean without an attack, with the same seed.

    Raises:
        ConfigError: There is no such cell.
    """
    found = results.get(key_of(("FedAvg", "", number, seed)), {}).get("norms")
    if not found:
        raise ConfigError(
            "bounds on the norm follow from the cell of FedAvg without an attack, which is missing",
            value=key_of(("FedAvg", "", number, seed)),
            place=place,
            remedy="name FedAvg in --defences, too",
        )
    return list(found)


def render(results: dict[str, Any], num_devices: int) -> str:
    """A table for each number of malicious devices; in each cell tuned and proxy, in per cent, mean over the seeds."""
    tables = []
    for number in sorted({part["malicious"] for part in results.values()} - {0}):
        parts = [part for part in results.values() if part["malicious"] == number]
        attacks = [name for name in ("", *ATTACKS) if any(part["attack"] == name for part in parts)]
        seeds = len({part["seed"] for part in parts})
        for measure, title, shown in (
            ("exact_match", "right answers", attacks),
            ("backdoor", "the attacker's answers", [name for name in attacks if "backdoor" in name]),
        ):
            if not shown:
                continue
            lines = [f"{number} of {num_devices} devices malicious, {seeds} seed(s): {title}, tuned / proxy, %", ""]
            lines.append("| aggregation | " + " | ".join(name or "none" for name in shown) + " |")
            lines.append("| --- " * (1 + len(shown)) + "|")
            for defence in dict.fromkeys(part["defence"] for part in parts):
                cells = [
                    _cell([part for part in parts if (part["defence"], part["attack"]) == (defence, name)], measure)
                    for name in shown
                ]
                lines.append(f"| {defence} | " + " | ".join(cells) + " |")
            tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _cell(parts: Sequence[dict[str, Any]], measure: str) -> str:
    """``-``: not run; ``stopped``: with any seed the run ended, because too few replies could be used."""
    if not parts:
        return "-"
    if any("error" in part for part in parts):
        return "stopped"
    return " / ".join(
        f"{100 * float(np.mean([part[measure][row] for part in parts])):.1f}" for row in ("tuned", "proxy")
    )


def main(words: Sequence[str] | None = None) -> None:
    """Run the cells that are missing, and write each as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.125, 0.25])
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=ATTACKS)
    parser.add_argument("--defences", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--items", type=int, default=112)
    parser.add_argument("-c", "--config", action="append", default=[], help="key=value of the run config, in JSON")
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    arguments = parser.parse_args(words)
    results: dict[str, Any] = read_json(arguments.out) if arguments.out.is_file() else {}
    if arguments.table:
        print(render(results, arguments.devices))
        return
    logging.getLogger("flwr").setLevel(logging.ERROR)
    base: dict[str, Scalar] = {
        "num-server-rounds": arguments.rounds,
        "data.partitioner": "iid",
        "distillation.mode": "off",
        "proxy.alpha": 0.5,
        "proxy.plausibility": 0.1,
        "scoring.rows": "tuned,proxy",
        "scoring.few-shot": 0,
        "scoring.round-items": 0,
        "scoring.num-items": arguments.items,
        **{key: json.loads(value) for key, _, value in (part.partition("=") for part in arguments.config)},
    }
    wanted = cells(arguments)

    def with_devices(told: dict[str, Scalar], number: int | None = None) -> dict[str, Scalar]:
        return told | {"devices": number or arguments.devices}  # a cell of an older file does not say how many

    try:
        configs = {key_of(cell): with_devices(config_of(base, cell, arguments.devices)) for cell in wanted}
        made = {key: {"config": with_devices(part["config"], part.get("devices"))} for key, part in results.items()}
        check_cells(made, configs, place=str(arguments.out), unless=NORM_KEY)
    except FedPTError as error:
        sys.exit(str(error))
    for cell in wanted:
        name, attack, number, seed = cell
        key = key_of(cell)
        try:
            norms = honest_norms(results, number, seed, place=str(arguments.out)) if name in BOUNDED else ()
            told = config_of(base, cell, arguments.devices, norms)
            check_cells(made, {key: with_devices(told)}, place=str(arguments.out))
        except FedPTError as error:
            sys.exit(str(error))
        if key in results:
            continue
        begun, spent = time.perf_counter(), time.process_time()
        head: dict[str, Any] = {
            "defence": name,
            "attack": attack,
            "malicious": number,
            "devices": arguments.devices,
            "seed": seed,
        }
        head["config"] = told
        try:
            malicious = Malicious(attack, number if attack else 0, arguments.devices)
            results[key] = head | run_one(told, malicious, arguments.devices)
        except FedPTError as error:  # an attack may end the run, and that is a result
            results[key] = head | {"error": str(error)}
        results[key]["seconds"] = round(time.perf_counter() - begun, 1)
        results[key]["processor_seconds"] = round(time.process_time() - spent, 1)
        write_json(arguments.out, results)
        shown = {part: results[key].get(part) for part in ("exact_match", "backdoor", "error", "processor_seconds")}
        print(key, shown, flush=True)


if __name__ == "__main__":
    main()
