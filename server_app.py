"""The server: config, models, strategy, checkpoints, scores. Everything that it composes is in ``fedpt_flwr``.

The large model is loaded here and only read. Every round ends in a checkpoint that can be served; the run ends in a
table. A run that fails says why, last of all with the line ``FEDPT-RUN-FAILED``, and raises, so that Flower calls it
failed.
"""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from logging import ERROR, INFO, WARNING
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

from fedpt_flwr.config import RunConfig, flat_values, parse_run_config
from fedpt_flwr.data import content_hash
from fedpt_flwr.errors import FedPTError
from fedpt_flwr.evaluation import Evaluator, longest_item, round_metrics
from fedpt_flwr.models import (
    check_vocabularies,
    fingerprint,
    load_causal_lm,
    load_tokenizer,
    make_tunable,
    output_size,
    set_arrays,
    tunable_arrays,
)
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.records import code_hash, to_array_record, to_tensors
from fedpt_flwr.runs import RunFolder, runs_root, write_json
from fedpt_flwr.scoring import Scores, gap_closed, render_table, results_table, verdict
from fedpt_flwr.sources import held_out_items, public_texts
from fedpt_flwr.strategy import FedPT, RoundOutcome, make_inner_strategy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FAILED = "FEDPT-RUN-FAILED"
_PACKAGES = ("flwr", "torch", "transformers", "peft", "accelerate", "datasets", "numpy", "fedpt-flwr")
_MEGABYTE = 1e6

app = ServerApp()
transformers_logging.disable_progress_bar()  # a log is no place for it


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run config describes."""
    started = time.perf_counter()
    try:
        config = parse_run_config(context.run_config)
        run = RunFolder.create(runs_root(config.output_dir), context.run_id)
        log(INFO, "Run folder: %s", run.path)
        federate(grid, config, run, started)
    except FedPTError as error:
        for line in str(error).splitlines():
            log(ERROR, "%s", line)
        log(ERROR, "%s: %s", FAILED, error.rule)
        raise
    except Exception as error:
        log(ERROR, "%s: %s: %s", FAILED, type(error).__name__, error)
        raise


def federate(grid: Grid, config: RunConfig, run: RunFolder, started: float) -> None:
    """Load, tune, score: everything between the first line of the log and the table at its end."""
    inner = make_inner_strategy(config.strategy)
    server = Server.load(config, run)
    strategy = FedPT(
        inner,
        server.after_aggregate,
        seed=config.seed,
        fraction_train=config.fraction_train,
        min_devices=config.min_devices,
        min_replies=config.min_replies,
        max_failed_rounds=config.max_failed_rounds,
        wait_timeout_s=config.wait_timeout_s,
        code_hash=code_hash(Path(__file__).with_name("client_app.py")),
    )
    strategy.start(
        grid,
        initial_arrays=server.initial_arrays,
        num_rounds=config.num_server_rounds,
        timeout=config.round_timeout_s,
        train_config=ConfigRecord({"small-fingerprint": server.small_fingerprint}),
    )
    server.finish(num_devices=len(strategy.devices), seconds_before=started)


@dataclasses.dataclass(kw_only=True)
class Server:
    """What the server holds during a run.

    Attributes:
        config: The run's config.
        run: Its folder.
        tokenizer: Shared by all models.
        proxy: Large, tuned and untuned; ``tuned`` gets new weights every round.
        initial_arrays: The small model's tunable weights before round 1.
        small_fingerprint: Of the small model as loaded.
        validation: Scores rounds.
        test: Scores the end.
    """

    config: RunConfig
    run: RunFolder
    tokenizer: PreTrainedTokenizerBase
    proxy: ProxyModel
    initial_arrays: ArrayRecord
    small_fingerprint: str
    validation: Evaluator
    test: Evaluator
    public: Sequence[str]
    device_rounds: list[Mapping[str, Any]] = dataclasses.field(default_factory=list)
    last_round: int = 0

    @classmethod
    def load(cls, config: RunConfig, run: RunFolder) -> Server:
        """Load models and held-out data, check that they fit together, and write the run's ``config.json``."""
        model, data = config.model, config.data
        tokenizer = load_tokenizer(model.small)
        large_tokenizer = load_tokenizer(model.large)
        small = load_causal_lm(model.small, dtype=model.small_dtype, device=model.device)
        small_fingerprint = fingerprint(small)
        large = load_causal_lm(model.large, dtype=model.large_dtype, device=model.device)
        sizes = {"large": output_size(large), "small": output_size(small)}
        vocab_size = check_vocabularies(large_tokenizer, tokenizer, sizes)
        tuned = make_tunable(small, config.tuning, seed=config.seed)
        initial_arrays = to_array_record(tunable_arrays(tuned))
        # A LoRA adapter can be switched off; tuning all weights needs a second copy to compare with.
        untuned = None
        if config.tuning.mode == "full":
            untuned = load_causal_lm(model.small, dtype=model.small_dtype, device=model.device)
        proxy = ProxyModel(
            large,
            tuned,
            untuned,
            alpha=config.proxy.alpha,
            plausibility=config.proxy.plausibility,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
        )
        validation = held_out_items(data, "validation", seed=config.seed)
        test = held_out_items(data, "test", seed=config.seed).first(config.scoring.num_items)
        public = public_texts(data) if config.scoring.few_shot else []
        longest = longest_item(proxy, config)
        run.write_config(
            {
                "run_config": flat_values(config),
                "fingerprints": {"large": fingerprint(large), "small": small_fingerprint},
                "data_hashes": {
                    "validation": content_hash(validation.examples),
                    "test": content_hash(test.examples),
                },
                "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
                "code_hash": code_hash(Path(__file__).with_name("client_app.py")),
            }
        )
        log(INFO, "Large model %s: %s parameters, frozen", model.large, f"{large.num_parameters():,}")
        log(
            INFO,
            "Small model %s: %s parameters, of which devices tune and send %s",
            model.small,
            f"{small.num_parameters():,}",
            f"{sum(array.numpy().size for array in initial_arrays.values()):,}",
        )
        chosen = validation.first(config.scoring.round_items)
        return cls(
            config=config,
            run=run,
            tokenizer=tokenizer,
            proxy=proxy,
            initial_arrays=initial_arrays,
            small_fingerprint=small_fingerprint,
            validation=Evaluator(chosen, tokenizer, config, place="data.validation", max_length=longest),
            test=Evaluator(test, tokenizer, config, place="data.test", max_length=longest),
            public=public,
        )

    def after_aggregate(self, outcome: RoundOutcome) -> None:
        """Checkpoint a round, write its costs and score it."""
        set_arrays(self.proxy.tuned, to_tensors(outcome.arrays))
        self.run.save_round(
            outcome.server_round, lambda folder: self._write_round(folder, outcome), keep=self.config.keep_rounds
        )
        self.last_round = outcome.server_round
        rows = [_cost_row(outcome.server_round, part.device, dataclasses.asdict(part)) for part in outcome.devices]
        self.device_rounds += [row for row in rows if not row.get("refused")]
        self.run.append("costs.jsonl", *rows)
        self.run.append(
            "metrics.jsonl",
            {
                "round": outcome.server_round,
                "phase": "train",
                "train_loss": outcome.train_loss,
                "devices": len(outcome.devices),
                "replies": sum(not part.refused for part in outcome.devices),
                "seconds": round(outcome.seconds, 3),
            },
        )
        if self.config.scoring.round_items:
            self._score_round(outcome.server_round, outcome.train_loss)

    def _write_round(self, folder: Path, outcome: RoundOutcome) -> None:
        save_file(to_tensors(outcome.arrays), folder / "arrays.safetensors")
        write_json(folder / "round.json", {"round": outcome.server_round, "train_loss": outcome.train_loss})
        self.proxy.save_pretrained(
            folder / "proxy",
            large_ref=self.config.model.large,
            untuned_ref=self.config.model.small,
            tokenizer=self.tokenizer,
        )

    def _score_round(self, server_round: int, train_loss: float) -> None:
        begun = time.perf_counter()
        scores = self.validation.score(self.proxy, rows=("large", "tuned", "proxy"))
        seconds = time.perf_counter() - begun
        metrics = round_metrics(scores)
        self.run.append(
            "metrics.jsonl",
            {"round": server_round, "phase": "validation", "rows": metrics, "seconds": round(seconds, 3)},
        )
        log(
            INFO,
            "Round %d/%d: training loss %.3f | %d validation answers right: tuned %.1f %%, proxy %.1f %%",
            server_round,
            self.config.num_server_rounds,
            train_loss,
            len(self.validation.items.examples),
            100 * metrics["tuned"]["exact_match"],
            100 * metrics["proxy"]["exact_match"],
        )

    def finish(self, *, num_devices: int, seconds_before: float) -> None:
        """Score the test items, write ``results.json`` and log the table."""
        log(INFO, "Scoring %d test items", len(self.test.items.examples))
        scores = self.test.score(self.proxy, public_texts=self.public)
        seconds = time.perf_counter() - seconds_before
        results = run_results(scores, self.config, self.device_rounds, num_devices=num_devices, seconds=seconds)
        self.run.write_results(results)
        self.run.append("answers.jsonl", *scores.records)
        for line in summary_lines(results, self.run.path):
            log(INFO, "%s", line)
        if results.get("proxy_minus_tuned", {}).get("value", 0.0) < 0:
            log(WARNING, "The proxy lost to the tuned small model on this data: serve the tuned model instead")
        if num_devices == 2:
            log(INFO, "Flower simulates two devices by default; for eight add:")
            log(INFO, '  --federation-config "num-supernodes=8 client-resources-num-cpus=1"')


def _cost_row(server_round: int, device: int, part: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "round": server_round,
        "device": device,
        "bytes_down": part["bytes_down"],
        "bytes_up": part["bytes_up"],
    }
    if part["refused"]:
        return row | {"refused": part["refused"]}
    skipped = ("device", "server-round")
    return row | {name.replace("-", "_"): value for name, value in part["metrics"].items() if name not in skipped}


def run_results(
    scores: Scores, config: RunConfig, device_rounds: Sequence[Mapping[str, Any]], *, num_devices: int, seconds: float
) -> dict[str, Any]:
    """The contents of ``results.json``."""
    results = scores.to_json()
    rows = results["rows"]
    results |= {"seed": config.seed, "rounds": config.num_server_rounds, "devices": num_devices}
    reference = rows.get("large_federated", {}).get("exact_match")
    if reference is not None:
        results["gap_closed"] = gap_closed(rows["proxy"]["exact_match"], rows["large"]["exact_match"], reference)
    results["costs"] = {"seconds": round(seconds, 2), **_device_costs(device_rounds)}
    return results


def _device_costs(device_rounds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means and maxima over devices and rounds."""

    def mean(name: str) -> float:
        return float(sum(row[name] for row in device_rounds)) / len(device_rounds)

    if not device_rounds:
        return {}
    costs = {
        "bytes_up_per_device_and_round": mean("bytes_up"),
        "bytes_down_per_device_and_round": mean("bytes_down"),
        "device_seconds_per_round": mean("seconds"),
        "device_flops_per_round": mean("flops"),
        "device_tokens_per_round": mean("num_tokens"),
        "device_state_bytes": max(row["state_bytes"] for row in device_rounds),
    }
    peaks = [row["peak_memory_bytes"] for row in device_rounds if "peak_memory_bytes" in row]
    return costs | ({"device_peak_memory_bytes": max(peaks)} if peaks else {})


def summary_lines(results: Mapping[str, Any], folder: Path) -> list[str]:
    """The end of the log: table, verdict, costs, where everything lies."""
    lines = ["", *render_table(results_table(results)).splitlines(), "", verdict(results)]
    costs = results["costs"]
    if "bytes_up_per_device_and_round" in costs:
        lines += [
            "",
            "A device and round: "
            f"{costs['bytes_down_per_device_and_round'] / _MEGABYTE:.2f} MB down, "
            f"{costs['bytes_up_per_device_and_round'] / _MEGABYTE:.2f} MB up, "
            f"{costs['device_seconds_per_round']:.2f} s of training, "
            f"{costs['device_state_bytes'] / _MEGABYTE:.2f} MB of weights, gradients and optimizer state",
        ]
        if "device_peak_memory_bytes" in costs:
            lines.append(f"Peak memory of a device's process: {costs['device_peak_memory_bytes'] / _MEGABYTE:.0f} MB")
    return [*lines, f"The run took {costs['seconds']:.0f} s; its folder is {folder}"]
