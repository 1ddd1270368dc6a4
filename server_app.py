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
from fedpt_flwr.errors import ConfigError, FedPTError, RoundError, naming
from fedpt_flwr.evaluation import Evaluator
from fedpt_flwr.models import (
    check_vocabularies,
    fingerprint,
    load_causal_lm,
    load_tokenizer,
    make_tunable,
    max_positions,
    output_size,
    set_arrays,
    tunable_arrays,
)
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.records import code_hash, to_array_record, to_tensors
from fedpt_flwr.results import device_cost_row, run_results, server_cost_row, summary_lines
from fedpt_flwr.runs import RunFolder, runs_root, write_json
from fedpt_flwr.sources import held_out_items, public_texts
from fedpt_flwr.strategy import FedPT, RoundOutcome, make_inner_strategy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FAILED = "FEDPT-RUN-FAILED"
CODE_HASH = code_hash(Path(__file__).with_name("client_app.py"))  # of the code that runs, whatever is edited later
_PACKAGES = ("flwr", "torch", "transformers", "peft", "accelerate", "datasets", "numpy", "fedpt-flwr")

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
        log(ERROR, "%s: %s", FAILED, _headline(error))
        raise
    except Exception as error:
        message = str(error).strip() or "no message"
        log(ERROR, "%s: %s: %s", FAILED, type(error).__name__, message.splitlines()[0])
        raise


def _headline(error: FedPTError) -> str:
    """The rule that was broken and what was found, in one line; of several the first."""
    lines = [str(error), *(str(problem) for problem in error.problems[:1])]
    return " | first: ".join(line.splitlines()[0] for line in lines)


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
        code_hash=CODE_HASH,
    )
    strategy.start(
        grid,
        initial_arrays=server.initial_arrays,
        num_rounds=config.num_server_rounds,
        timeout=config.round_timeout_s,
        train_config=ConfigRecord({"small-fingerprint": server.small_fingerprint}),
    )
    num_devices = len({card.device for card in strategy.devices.values() if card.num_examples > 0})
    server.finish(num_devices=num_devices, started=started)


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
    cost_rows: list[Mapping[str, Any]] = dataclasses.field(default_factory=list)

    @classmethod
    def load(cls, config: RunConfig, run: RunFolder) -> Server:
        """Load models and held-out data, check that they fit together, and write the run's ``config.json``."""
        model, data = config.model, config.data
        with naming("model.small"):
            tokenizer = load_tokenizer(model.small)
            small = load_causal_lm(model.small, dtype=model.small_dtype, device=model.device)
        with naming("model.large"):
            large_tokenizer = load_tokenizer(model.large)
            large = load_causal_lm(model.large, dtype=model.large_dtype, device=model.device)
        small_fingerprint = fingerprint(small)
        sizes = {"large": output_size(large), "small": output_size(small)}
        vocab_size = check_vocabularies(large_tokenizer, tokenizer, sizes)
        context = max_positions(small)
        if context is not None and config.train.max_length > context:
            raise ConfigError(
                f"must not exceed the {context} tokens that the small model can read",
                value=config.train.max_length,
                place="train.max-length",
            )
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
        run.write_config(
            {
                "run_config": flat_values(config),
                "fingerprints": {"large": fingerprint(large), "small": small_fingerprint},
                "data_hashes": {
                    "validation": content_hash(validation.examples),
                    "test": content_hash(test.examples),
                },
                "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
                "code_hash": CODE_HASH,
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
            validation=Evaluator(chosen, tokenizer, config, proxy, place="data.validation"),
            test=Evaluator(test, tokenizer, config, proxy, place="data.test"),
            public=public,
        )

    def after_aggregate(self, outcome: RoundOutcome) -> None:
        """Checkpoint a round, write its costs and score it."""
        set_arrays(self.proxy.tuned, to_tensors(outcome.arrays))
        self.run.save_round(
            outcome.server_round, lambda folder: self._write_round(folder, outcome), keep=self.config.keep_rounds
        )
        self._spend(
            *(
                device_cost_row(
                    outcome.server_round,
                    part.device,
                    bytes_down=part.bytes_down,
                    bytes_up=part.bytes_up,
                    metrics=part.metrics,
                    refused=part.refused,
                )
                for part in outcome.devices
            )
        )
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

    def _spend(self, *rows: Mapping[str, Any]) -> None:
        self.cost_rows += rows
        self.run.append("costs.jsonl", *rows)

    def _score_round(self, server_round: int, train_loss: float) -> None:
        begun = time.perf_counter()
        scores = self.validation.score(self.proxy)
        seconds = time.perf_counter() - begun
        rows = {name: row.to_json() for name, row in scores.rows.items()}
        self.run.append(
            "metrics.jsonl",
            {"round": server_round, "phase": "validation", "rows": rows, "seconds": round(seconds, 3)},
        )
        self._spend(server_cost_row(server_round, "validation", large_tokens=scores.large_tokens, seconds=seconds))
        log(
            INFO,
            "Round %d/%d: training loss %.3f | %d validation answers right: tuned %.1f %%, proxy %.1f %%",
            server_round,
            self.config.num_server_rounds,
            train_loss,
            len(self.validation.items.examples),
            100 * rows["tuned"]["exact_match"],
            100 * rows["proxy"]["exact_match"],
        )

    def finish(self, *, num_devices: int, started: float) -> None:
        """Score the test items, write ``results.json`` and log the table.

        Raises:
            RoundError: No round was completed, so there is nothing to score.
        """
        if not self.run.rounds():
            raise RoundError("a run needs at least one complete round", place="max-failed-rounds")
        log(INFO, "Scoring %d test items", len(self.test.items.examples))
        begun = time.perf_counter()
        scores = self.test.score(self.proxy, public_texts=self.public)
        seconds = time.perf_counter() - begun
        self._spend(
            server_cost_row(self.config.num_server_rounds, "test", large_tokens=scores.large_tokens, seconds=seconds)
        )
        results = run_results(
            scores, self.config, self.cost_rows, num_devices=num_devices, seconds=time.perf_counter() - started
        )
        self.run.append("answers.jsonl", *scores.records)
        self.run.write_results(results)
        for line in summary_lines(results, self.run.path):
            log(INFO, "%s", line)
        worse_by = [
            name
            for name, key, sign in (("exact match", "proxy_minus_tuned", -1), ("loss", "proxy_minus_tuned_loss", 1))
            if min(sign * end for end in results[key]["ci95"]) > 0
        ]
        if worse_by:
            log(
                WARNING,
                "On this data the proxy is worse than the tuned small model by %s (95 %% interval); serve that one",
                " and ".join(worse_by),
            )
        if num_devices == 2 and self.config.data.train.startswith("demo:"):
            log(INFO, "Flower simulates two devices unless told otherwise; for eight add")
            log(INFO, '  --federation-config "num-supernodes=8 client-resources-num-cpus=1"')
