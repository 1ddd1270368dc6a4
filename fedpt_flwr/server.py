"""What the server does in a run: loads, keeps a checkpoint of every round, distils, scores, writes the results.

``server_app.py`` drives it. A run that is resumed takes up here what its folder holds.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import math
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from logging import INFO, WARNING
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from flwr.common.logger import log
from flwr.serverapp.strategy import FedAvg, Strategy
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file
from torch import Tensor

from fedpt_flwr.accounting import privacy_outlook
from fedpt_flwr.config import AUTO, PLAIN_MEANS, RunConfig, flat_values
from fedpt_flwr.data import content_hash
from fedpt_flwr.distiller import IN_ROUNDS, WITH_DEVICE_COPY, Distiller, check_translated
from fedpt_flwr.endpoint import Usage
from fedpt_flwr.errors import ConfigError, FedPTError, RoundError, RunError, naming
from fedpt_flwr.evaluation import Evaluator
from fedpt_flwr.heterogeneity import measure_shards
from fedpt_flwr.inner import set_inner_state
from fedpt_flwr.losses import MODELS
from fedpt_flwr.models import (
    WORTH_RESTING_BYTES,
    bring_back,
    check_context,
    fingerprint,
    frozen_fingerprint,
    hides_tokens,
    large_placement,
    load_causal_lm,
    load_tokenizer,
    make_tunable,
    output_size,
    put_away,
    set_arrays,
)
from fedpt_flwr.privacy import LEDGER, PrivateAverage
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.proxy_folder import BUNDLED, check_proxy, save_small
from fedpt_flwr.records import DeviceCard, as_tensors, to_array_record
from fedpt_flwr.remote import RemoteModel, connect
from fedpt_flwr.results import (
    check_same_run,
    device_cost_row,
    is_good_enough,
    run_results,
    server_cost_row,
    summary_lines,
)
from fedpt_flwr.runs import PROMPT_FORM, SIZES, RunFolder, read_json, write_json
from fedpt_flwr.shapes import Shape
from fedpt_flwr.shift import BY_CONFIG, Shift, ShiftPoint
from fedpt_flwr.sources import Items, Prompts, held_out_items, public_prompts, public_texts, scored_shape
from fedpt_flwr.strategy import RoundOutcome
from fedpt_flwr.training import check_packing
from fedpt_flwr.verdict import worse_by
from fedpt_flwr.vocabulary import match_vocabularies, translate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fedpt_flwr.scoring import Scores

DRIFT_LIMIT = 0.05
"""Drift along ``large - untuned`` above which the mode ``paper`` is warned about."""
_PACKAGES = ("flwr", "torch", "transformers", "peft", "accelerate", "datasets", "numpy", "fedpt-flwr")
_FOLLOWED = ("tuned", "proxy")  # models whose progress the log tells
_PRIVACY = "privacy"  # the phase of a round in metrics.jsonl that tells what was spent
_EXAMPLES = 12  # answers that are kept token by token


def make_private(inner: Strategy, config: RunConfig, run: RunFolder) -> PrivateAverage | None:
    """Differential privacy around the inner strategy, if the config asks for it; what it spends is kept in the run.

    Raises:
        ConfigError: The accountant is not installed, the budget does not allow a single round, or the strategy makes
            no plain mean.
    """
    privacy = config.privacy
    if not privacy.is_on:
        return None
    if not isinstance(inner, FedAvg) or type(inner).__name__ not in PLAIN_MEANS:  # a median is a FedAvg to Flower
        raise ConfigError(
            "noise is accounted for on the plain mean of equal weights alone",
            value=type(inner).__name__,
            place="privacy.dp and strategy.name",
            remedy="set strategy.name='FedAvg'",
        )
    for line in privacy_outlook(privacy, config.num_server_rounds):
        log(INFO, "%s", line)
    return PrivateAverage(inner, privacy, lambda spent: write_json(run.path / LEDGER, spent))


@dataclasses.dataclass(kw_only=True)
class Server:
    """What the server holds during a run.

    Attributes:
        config: The run's config.
        run: Its folder.
        tokenizer: Shared by all models.
        shape: Of the records, which says how prompts are written.
        proxy: Large, tuned and untuned; its small models get new weights every round.
        shapes: Of the small model's tunable weights, by name.
        small_fingerprint: Of the small model as loaded.
        frozen_fingerprint: Of the adapter's matrices that are drawn and never sent; empty where there are none.
        rounds_scored: Validation items that score rounds.
        validation: All validation items, which choose the shift.
        test: Scores the end.
        public: Public texts, for few-shot prompts.
        prompts: Public prompts, for distillation; None if there are none.
        distiller: Teaches small models; None where nothing is distilled.
        tuned: Weights of the proxy's tuned model where the next round begins with others; else None.
        next_untuned: Weights that the proxy's untuned model gets with the next round; mode ``paired``.
        shift: Alpha and mask, and how they were chosen; None before the first round.
        course: The metric that may end the run early, round by round.
        drifts: What distillation moved the small model along ``large - untuned``, round by round.
        private: What makes the run private and knows what that has cost; None where nothing does.
        resumed_after: The last round before the run went on; 0 if it began with round 1.
    """

    config: RunConfig
    run: RunFolder
    tokenizer: PreTrainedTokenizerBase
    shape: Shape
    proxy: ProxyModel
    shapes: Mapping[str, tuple[int, ...]]
    small_fingerprint: str
    frozen_fingerprint: str
    rounds_scored: Evaluator | None
    validation: Evaluator
    test: Evaluator
    public: Sequence[str]
    prompts: Prompts | None
    distiller: Distiller | None
    tuned: dict[str, Tensor] | None = None
    next_untuned: dict[str, Tensor] | None = None
    shift: Shift | None = None
    course: list[float] = dataclasses.field(default_factory=list)
    drifts: list[float] = dataclasses.field(default_factory=list)
    private: PrivateAverage | None = None
    resumed_after: int = 0
    remote_usage: Usage = dataclasses.field(default_factory=Usage)
    """What the ledger has of a remote large model."""

    @classmethod
    def load(cls, config: RunConfig, run: RunFolder, flower_run_id: int, *, code_hash: str) -> Server:
        """Load models and held-out data, check that they fit together, and write the run's ``config.json``."""
        model, data = config.model, config.data
        with naming("model.small"):
            tokenizer = load_tokenizer(model.small)
            small = load_causal_lm(model.small, dtype=model.small_dtype, device=model.device)
        large: PreTrainedModel
        placement = large_placement(model)
        if model.large_url:  # it has compared vocabularies
            large, large_tokenizer = connect(model.large_url, tokenizer, config.remote), tokenizer
            if hides_tokens(large) and config.stop.metric == "loss":
                raise ConfigError(
                    "a large model that shows its likeliest tokens only leaves the proxy without a loss",
                    value="loss",
                    place="stop.metric",
                    remedy="set stop.metric='exact_match', or ask a service that gives full log-probabilities",
                )
        else:
            with naming("model.large"):
                large_tokenizer = load_tokenizer(model.large)
                large = load_causal_lm(model.large, dtype=model.large_dtype, device=model.device, placement=placement)
        small_fingerprint = fingerprint(small)
        sizes = {"large": output_size(large), "small": output_size(small)}
        vocabulary = match_vocabularies(large_tokenizer, tokenizer, sizes)
        if vocabulary.id_map is not None:
            log(INFO, "The large model numbers its tokens otherwise: its ids are mapped, one to one")
            check_translated(config, vocabulary.id_map)
            translate(large, vocabulary.id_map)
        check_context(small.config, config.train.max_length)
        if config.train.packing:
            with naming("train.packing"):
                check_packing(small)
        tuned = make_tunable(small, config.tuning, seed=config.seed)
        shapes = {name: tuple(weight.shape) for name, weight in tuned.named_parameters() if weight.requires_grad}
        frozen = frozen_fingerprint(tuned)  # before the proxy freezes everything
        # A LoRA adapter can be switched off; tuning all weights needs a second copy to compare with.
        untuned = None
        if config.tuning.mode == "full":
            untuned = load_causal_lm(model.small, dtype=model.small_dtype, device=model.device)
        alpha = config.proxy.alpha
        proxy = ProxyModel(
            large,
            tuned,
            untuned,
            alpha=1.0 if isinstance(alpha, str) else alpha,
            plausibility=config.proxy.plausibility,
            vocab_size=vocabulary.size,
            tokenizer=tokenizer,
        )
        proxy.config.large = placement.to_entry()
        validation = held_out_items(data, "validation", seed=config.seed, tokenizer=tokenizer)
        test = held_out_items(data, "test", seed=config.seed, tokenizer=tokenizer).first(config.scoring.num_items)
        shape = scored_shape(data, tokenizer=tokenizer)
        number = config.scoring.round_items

        def evaluator(which: str, items: Items) -> Evaluator:
            return Evaluator(items, tokenizer, config, proxy, place=f"data.{which}")

        of_validation, of_test = evaluator("validation", validation), evaluator("test", test)
        mode = config.distillation.mode
        prompts = public_prompts(data, tokenizer=tokenizer) if mode != "off" else None
        needs_public = config.scoring.few_shot or (mode != "off" and prompts is None)
        public = public_texts(data, tokenizer=tokenizer) if needs_public else []
        distiller = None
        if mode != "off":
            texts = None if prompts is None else prompts.texts
            distiller = Distiller(config, proxy, tokenizer, prompts=texts, texts=public, trainable=list(shapes))
        _record(
            run,
            config,
            flower_run_id,
            {
                "code_hash": code_hash,
                "fingerprints": {"large": fingerprint(large), "small": small_fingerprint},
                "data_hashes": {
                    "validation": content_hash(validation.examples),
                    "test": content_hash(test.examples),
                },
            },
        )
        log(INFO, "Records of the shape %s; a prompt ends %r", shape.name, validation.examples[0].prompt[-40:])
        if isinstance(large, RemoteModel):
            endpoint = large.endpoint
            asked = (endpoint.model, endpoint.url, endpoint.api, endpoint.shows)
            log(INFO, "Large model %s at %s: asked by '%s', log-probabilities: %s", *asked)
        else:
            log(INFO, "Large model %s: %s parameters, frozen", model.large, f"{large.num_parameters():,}")
        log(
            INFO,
            "Small model %s: %s parameters, of which devices tune and send %s",
            model.small,
            f"{small.num_parameters():,}",
            f"{sum(math.prod(shape) for shape in shapes.values()):,}",
        )
        return cls(
            config=config,
            run=run,
            tokenizer=tokenizer,
            shape=shape,
            proxy=proxy,
            shapes=shapes,
            small_fingerprint=small_fingerprint,
            frozen_fingerprint=frozen,
            rounds_scored=evaluator("validation", validation.first(number)) if number else None,
            validation=of_validation,
            test=of_test,
            public=public if config.scoring.few_shot else [],
            prompts=prompts,
            distiller=distiller,
        )

    def first_arrays(self) -> ArrayRecord:
        """The small model's tunable weights as they are before round 1."""
        weights = dict(self.proxy.tuned.named_parameters())
        arrays = to_array_record({name: weights[name] for name in self.shapes})
        if self.config.distillation.mode in IN_ROUNDS:
            self.tuned = as_tensors(arrays)
        return arrays

    def resume(self, inner: Strategy, first: ArrayRecord) -> tuple[ArrayRecord, int]:
        """Take up everything that the last complete round left; nothing in the folder is changed, see :meth:`go_on`.

        Args:
            inner: Gets back what it carries from round to round.
            first: What round 1 begins with.

        Returns:
            The arrays that the next round begins with, and the last round's number, 0 if none was completed.

        Raises:
            RunError: A file of the checkpoint is damaged; says which, and how to go on without that round.
        """
        last_round = max(self.run.rounds(), default=0)
        if self.private is not None:
            self._resume_budget(self.private, last_round)
        if not last_round:
            return first, 0
        mode, like = self.config.distillation.mode, self.shapes
        with self._of_round(last_round, "arrays.safetensors") as path:
            sent = to_array_record(_read_arrays(path, like))
        set_arrays(self.proxy.tuned, as_tensors(sent))
        if mode in IN_ROUNDS:
            with self._of_round(last_round, "tuned.safetensors") as path:
                self.tuned = _read_arrays(path, like)
            set_arrays(self.proxy.tuned, self.tuned)
        if mode == "paired" and self.proxy.untuned is not None:
            with self._of_round(last_round, "untuned.safetensors") as path:
                set_arrays(self.proxy.untuned, _read_arrays(path, like))
            with self._of_round(last_round, "next-untuned.safetensors") as path:
                self.next_untuned = _read_arrays(path, like)
        with self._of_round(last_round, "inner.safetensors") as path:
            set_inner_state(inner, _read_numpy(path), sent)
        with self._of_round(last_round, "proxy") as path:
            check_proxy(path)
        with self._of_round(last_round, SIZES):
            self.run.sizes(last_round)
        for row in self.run.read_lines_of_rounds("metrics.jsonl", last_round):
            self._take_up(row)
        if self.shift is not None:
            self.proxy.alpha, self.proxy.plausibility = self.shift.alpha, self.shift.plausibility
        return sent, last_round

    def _resume_budget(self, private: PrivateAverage, last_round: int) -> None:
        """Take up what was spent, on rounds that were never completed too.

        Raises:
            RunError: The ledger is missing or damaged, or has less than the checkpoint.
        """
        ledger, checkpoint = self.run.path / LEDGER, None
        if last_round:
            with self._of_round(last_round, LEDGER) as path:
                checkpoint = read_json(path)
        was_spent = any(row["phase"] == _PRIVACY for row in self.run.read_lines_after("metrics.jsonl", 0))
        if not last_round and not was_spent and not ledger.is_file():
            return  # not even the first round came to its end: nothing is spent
        with naming(str(ledger)):
            private.restore(read_json(ledger), checkpoint)
        spent = private.spent()
        log(INFO, "Privacy spent before: epsilon %.4g in %d rounds", spent["epsilon"], spent["releases"])

    @contextmanager
    def _of_round(self, server_round: int, name: str) -> Iterator[Path]:
        """Whatever is wrong with a file of a checkpoint: name it, and say how to go on without that round."""
        folder = self.run.round_path(server_round)
        before = max((number for number in self.run.rounds() if number < server_round), default=0)
        go_on = f"go on after round {before}" if before else "begin again with round 1"
        try:
            yield folder / name
        except FedPTError as error:
            raise RunError(
                f"is damaged: {error.rule}",
                value=error.value,
                place=str(folder / name),
                remedy=f"remove {folder} to {go_on}",
            ) from error

    def _take_up(self, row: Mapping[str, Any]) -> None:
        """Remember what a line of ``metrics.jsonl`` says about how the run goes on."""
        try:
            phase = row["phase"]
            if phase == "validation":
                self._remember(row["rows"])
            elif phase == "shift":
                self.shift = Shift.from_json(row)
            elif phase == "distillation":
                self.drifts.append(float(row["drift"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(
                f"must hold what the run wrote, but a line of it lacks something ({type(error).__name__}: {error})",
                value=row,
                place=str(self.run.path / "metrics.jsonl"),
                remedy="put back the file as the run wrote it",
            ) from error

    def is_over(self, last_round: int) -> bool:
        """Whether a run that was resumed needs no further round, or may have none."""
        is_spent = self.private is not None and not self.private.affords_another()
        return last_round >= self.config.num_server_rounds or (last_round > 0 and (is_spent or self.is_good_enough()))

    def has_results(self, last_round: int) -> bool:
        """Whether the run has come to its end after this round, which need not be the last: that may have failed."""
        path = self.run.path / "results.json"
        results = read_json(path) if path.is_file() else {}
        return isinstance(results, dict) and results.get("rounds") == last_round

    def devices_before(self) -> dict[int, DeviceCard] | None:
        """The devices that the run had, by number; None where none has trained yet.

        Raises:
            RunError: ``shards.json`` is damaged.
        """
        path = self.run.path / "shards.json"
        if not path.is_file():
            return None
        shards = read_json(path)
        if not isinstance(shards, list):
            raise RunError("must hold a list of devices", value=shards, place=str(path))
        cards = [DeviceCard.from_shard(shard, place=str(path)) for shard in shards]
        return {card.device: card for card in cards}

    def taken_before(self, last_round: int) -> dict[int, int]:
        """The last round up to this one in which each device's answer was taken, by device."""
        if not last_round or self.config.wire.dtype != "int8":
            return {}
        rows = self.run.read_lines_of_rounds("costs.jsonl", last_round)
        # Rows of the server itself have its name in place of a number.
        return {
            row["device"]: row["round"] for row in rows if isinstance(row["device"], int) and not row.get("refused")
        }

    def told_to_devices(self) -> dict[str, Any]:
        """What every train message says besides its round."""
        told: dict[str, Any] = {"small-fingerprint": self.small_fingerprint}
        if self.frozen_fingerprint:
            told["frozen-fingerprint"] = self.frozen_fingerprint
        if self.config.wire.dtype == "int8":
            # The same when the run goes on; that the devices of two runs take it for one would need one folder's path.
            told["residual-run"] = hashlib.sha256(f"{platform.node()}\0{self.run.path}".encode()).hexdigest()[:16]
        return told

    def go_on(self, last_round: int, flower_run_id: int) -> None:
        """Take over the folder of a run that was stopped: remove what belongs to no complete round."""
        self.run.add_flower_run(flower_run_id)  # first, so that a process that is killed while it rewinds is on record
        undone = self.run.read_lines_after("costs.jsonl", last_round)
        self.run.rewind(last_round)
        self._keep_remote_costs(undone, last_round)
        self.resumed_after = last_round
        if last_round and self.config.distillation.mode == "paired" and self.rounds_scored is not None:
            self._score_untouched(self.rounds_scored, last_round, "resume")

    def _keep_remote_costs(self, undone: Sequence[Mapping[str, Any]], last_round: int) -> None:
        """What a service was paid stays paid, whatever became of it, and counts in the token budget."""
        large = self.proxy.large
        if not isinstance(large, RemoteModel):
            return
        names = dict.fromkeys(name for row in undone for name in row if name.startswith("remote_"))
        spent = {name: sum(row.get(name, 0) for row in undone) for name in names}
        if any(spent.values()):
            self._spend(server_cost_row(last_round, "unfinished", large_tokens=0, seconds=0.0, remote=spent))
        counted = ("remote_tokens_sent", "remote_tokens_received")
        large.endpoint.spent_before = sum(
            row.get(name, 0) for row in self.run.read_lines("costs.jsonl") for name in counted
        )

    def write_shards(self, cards: Sequence[DeviceCard]) -> None:
        """Write who has how many examples of what, and how unlike all others; of one number's nodes, the first's."""
        of_device = {card.device: card for card in reversed(cards)}
        ordered = [of_device[device] for device in sorted(of_device)]
        found = measure_shards([card.num_examples for card in ordered], [card.groups for card in ordered])
        shards = [
            {**card.shard(), "distance": None if distance is None else round(distance, 4)}
            for card, distance in zip(ordered, found.distances, strict=True)
        ]
        write_json(self.run.path / "shards.json", shards)

    # --- while devices train ---

    @property
    def rests(self) -> bool:
        """Whether the small models take memory only while they are used: where they are large."""
        num_bytes = 4 * sum(math.prod(shape) for shape in self.shapes.values())
        return num_bytes >= WORTH_RESTING_BYTES and self.config.distillation.mode not in IN_ROUNDS

    def rest(self) -> None:
        """Give back the small models' memory until :meth:`wake`."""
        if self.rests:
            put_away(self.proxy.tuned, self.shapes)
            if self.proxy.untuned is not None:
                put_away(self.proxy.untuned, [name for name, _ in self.proxy.untuned.named_parameters()])

    def wake(self, tuned: ArrayRecord) -> None:
        """Give the proxy's tuned model these arrays, and its untuned model its own, if they rested."""
        if not self.rests:
            set_arrays(self.proxy.tuned, as_tensors(tuned))
            return
        gc.collect()  # what came over the wire is left in cycles
        bring_back(self.proxy.tuned, as_tensors(tuned))
        if self.proxy.untuned is not None:
            model = self.config.model
            stored = load_causal_lm(model.small, dtype=model.small_dtype, device=model.device)
            bring_back(self.proxy.untuned, dict(stored.named_parameters()), copy=False)

    # --- after a round --------------------------------------------------------------------------------------------

    def after_aggregate(self, outcome: RoundOutcome) -> ArrayRecord | None:
        """Choose the shift, score, teach, and write everything: the checkpoint last, since it makes a round complete.

        Returns:
            The arrays that the next round begins with, if not the aggregated ones.
        """
        aggregated = as_tensors(outcome.arrays)
        if self.next_untuned is not None and self.proxy.untuned is not None:
            set_arrays(self.proxy.untuned, self.next_untuned)
        if self.config.distillation.mode == "carry" and self.tuned is not None:
            sent = as_tensors(outcome.sent)
            self.tuned = {name: self.tuned[name] + (weights - sent[name]) for name, weights in aggregated.items()}
            set_arrays(self.proxy.tuned, self.tuned)
        else:
            self.tuned = aggregated if self.config.distillation.mode in IN_ROUNDS else None
            self.wake(outcome.arrays)
        outcome.sent.clear()  # nobody needs it any more: its memory is given back
        self._write_training(outcome)
        if self.config.proxy.alpha == AUTO:
            self._choose_shift(outcome.server_round)
        if self.rounds_scored is not None:
            self._score_round(self.rounds_scored, outcome.server_round, outcome.train_loss)
        is_last = outcome.server_round == self.config.num_server_rounds or self.is_good_enough()
        following, untuned = aggregated, None
        if self.distiller is not None and self.config.distillation.mode in IN_ROUNDS and not is_last:
            following, untuned = self._teach(self.distiller, outcome.server_round, aggregated)
        self.run.save_round(
            outcome.server_round,
            lambda folder: self._write_round(folder, outcome, following, untuned),
            keep=self.config.keep_rounds,
        )
        self.next_untuned = untuned or self.next_untuned
        self.rest()
        return None if following is aggregated else to_array_record(following)

    def _write_training(self, outcome: RoundOutcome) -> None:
        self._spend(
            *(
                device_cost_row(
                    outcome.server_round,
                    part.device,
                    bytes_down=part.bytes_down,
                    bytes_up=part.bytes_up,
                    metrics=part.metrics,
                    refused=part.refused,
                    limits=part.limits,
                    update_norm=part.update_norm,
                )
                for part in outcome.devices
            )
        )
        self._note(
            outcome.server_round,
            "train",
            {
                **({} if outcome.train_loss is None else {"train_loss": outcome.train_loss}),
                "devices": len(outcome.devices),
                "replies": sum(not part.refused for part in outcome.devices),
                "seconds": round(outcome.seconds, 3),
                **({} if outcome.left_out is None else {"lora_left_out": outcome.left_out}),
            },
        )

        if self.private is not None:
            self._note_privacy(self.private, outcome.server_round)

    def _note_privacy(self, private: PrivateAverage, server_round: int) -> None:
        row = private.described()
        self._note(server_round, _PRIVACY, row)
        log(
            INFO,
            "Round %d: epsilon %.4g at delta %g after %d noisy means; noise of standard deviation %.3g on each weight, "
            "next clipping norm %.4g",
            server_round,
            row["epsilon"],
            row["delta"],
            row["releases"],
            row["noise_stddev"],
            row["clipping_norm"],
        )

    def _choose_shift(self, server_round: int) -> None:
        begun = time.perf_counter()
        self.shift, large_tokens = self.validation.choose_shift(self.proxy)
        self.proxy.alpha, self.proxy.plausibility = self.shift.alpha, self.shift.plausibility
        seconds = time.perf_counter() - begun
        self._note(server_round, "shift", self.shift.to_json())
        self._account(server_round, "shift", large_tokens=large_tokens, seconds=seconds)
        log(
            INFO,
            "Round %d: alpha %g, plausibility %g by %s of %d validation items",
            server_round,
            self.shift.alpha,
            self.shift.plausibility,
            self.shift.chosen_by.replace("_", " "),
            self.shift.items,
        )

    def _score_round(self, evaluator: Evaluator, server_round: int, train_loss: float | None) -> None:
        begun = time.perf_counter()
        scores = evaluator.score(self.proxy, rows=self._rows_of_rounds())
        seconds = time.perf_counter() - begun
        rows = {name: row.to_json() for name, row in scores.rows.items()}
        self._remember(rows)
        shift = {"alpha": self.proxy.alpha, "plausibility": self.proxy.plausibility}
        self._note(server_round, "validation", {"rows": rows, **shift, "seconds": round(seconds, 3)})
        self._account(server_round, "validation", large_tokens=scores.large_tokens, seconds=seconds)
        right = ", ".join(f"{name} {100 * rows[name]['exact_match']:.1f} %" for name in _FOLLOWED if name in rows)
        log(
            INFO,
            "Round %d/%d: %s%d validation answers right: %s",
            server_round,
            self.config.num_server_rounds,
            "" if train_loss is None else f"training loss {train_loss:.3f} | ",
            len(evaluator.items.examples),
            right or "not asked for",
        )

    def _rows_of_rounds(self) -> list[str]:
        """The rows that are scored after a round: those of the end, and what may end the run early."""
        wanted = self.config.scoring.row_names()
        return [name for name in MODELS if name in wanted or (name == "proxy" and self.config.stop.metric)]

    def _teach(
        self, distiller: Distiller, server_round: int, aggregated: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        following, untuned, lesson = distiller.teach_round(server_round, aggregated)
        mode = self.config.distillation.mode
        self.drifts.append(lesson.drift)
        total = sum(self.drifts)
        self._note(server_round, "distillation", {"mode": mode, **lesson.to_json(), "drift_total": total})
        self._account(server_round, "distillation", large_tokens=lesson.large_tokens, seconds=lesson.seconds)
        log(
            INFO,
            "Round %d: distilled in %d steps, KL %.3f to %.3f nats a token; drift to large %+.3f, %+.3f in all",
            server_round,
            lesson.result.num_steps,
            lesson.result.kl_first,
            lesson.result.kl_last,
            lesson.drift,
            total,
        )
        if mode == "paper" and total > DRIFT_LIMIT:
            log(
                WARNING,
                "The tuned model has drifted %.3f of the way to the large one; above %.2f the proxy counts the large "
                "model twice, and fails: lower distillation.learning-rate or choose distillation.mode='carry'",
                total,
                DRIFT_LIMIT,
            )
        return following, untuned

    def _write_round(
        self,
        folder: Path,
        outcome: RoundOutcome,
        following: Mapping[str, Tensor],
        untuned: Mapping[str, Tensor] | None,
    ) -> None:
        """The checkpoint: what the next round begins with, and the proxy of this one."""
        save_file(dict(following), folder / "arrays.safetensors")
        # safetensors writes the bytes as they lie in memory, whatever their order.
        inner = {name: np.ascontiguousarray(value) for name, value in outcome.inner_state.items()}
        save_numpy(inner, folder / "inner.safetensors")
        mode = self.config.distillation.mode
        if mode in IN_ROUNDS:
            save_file(self.tuned or {}, folder / "tuned.safetensors")
        if mode == "paired" and self.proxy.untuned is not None:
            weights = _weights_of(self.proxy.untuned, self.shapes)
            save_file(weights, folder / "untuned.safetensors")
            save_file(dict(untuned or weights), folder / "next-untuned.safetensors")
        if self.private is not None:
            write_json(folder / LEDGER, self.private.to_json())
        write_json(folder / "round.json", {"round": outcome.server_round, "train_loss": outcome.train_loss})
        self.proxy.save_pretrained(
            folder / "proxy",
            large_ref=self.config.model.large_url or self.config.model.large,
            untuned_ref=BUNDLED if mode == "paired" else self.config.model.small,
            tokenizer=self.tokenizer,
        )
        form = {"format": self.shape.name, "template": self.shape.request.text}
        write_json(folder / "proxy" / PROMPT_FORM, form)

    def _note(self, server_round: int, phase: str, row: Mapping[str, Any]) -> None:
        self.run.append("metrics.jsonl", {"round": server_round, "phase": phase, **row})

    def _spend(self, *rows: Mapping[str, Any]) -> None:
        self.run.append("costs.jsonl", *rows)

    def _account(self, server_round: int, phase: str, *, large_tokens: int, seconds: float) -> None:
        remote = self._remote_costs()
        self._spend(server_cost_row(server_round, phase, large_tokens=large_tokens, seconds=seconds, remote=remote))

    def _remote_costs(self) -> dict[str, Any]:
        """What the remote large model has cost since this was asked last; nothing where it is not remote."""
        large = self.proxy.large
        if not isinstance(large, RemoteModel):
            return {}
        earlier, self.remote_usage = self.remote_usage, large.endpoint.usage.copy()
        return large.usage_since(earlier)

    def leave(self) -> None:
        """A run that was over is left as it is: what it took to see that is not written into its folder."""
        self._remote_costs()

    def settle(self) -> None:
        """Write what a remote large model has cost and no phase has accounted for: that of one which failed."""
        remote = self._remote_costs()
        if remote.get("remote_requests") or remote.get("remote_retries"):
            last_round = max(self.run.rounds(), default=0)
            self._spend(server_cost_row(last_round, "unfinished", large_tokens=0, seconds=0.0, remote=remote))

    def _remember(self, rows: Mapping[str, Mapping[str, float]]) -> None:
        if self.config.stop.metric:
            self.course.append(rows["proxy"].get(self.config.stop.metric, float("nan")))

    def is_good_enough(self) -> bool:
        """Whether the validation items say that no further round is needed."""
        return is_good_enough(self.course, self.config.stop)

    # --- at the end -----------------------------------------------------------------------------------------------

    def finish(self, *, started: float) -> None:
        """Score the test items, teach the devices' copy, write ``results.json`` and log the table.

        Raises:
            RoundError: No round was completed, so there is nothing to score.
        """
        rounds = self.run.rounds()
        if not rounds:
            raise RoundError("a run needs at least one complete round", place="max-failed-rounds")
        if rounds[-1] < self.config.num_server_rounds and self.is_good_enough():
            log(INFO, "Ended after round %d: %s is good enough", rounds[-1], self.config.stop.metric)
        log(INFO, "Scoring %d test items", len(self.test.items.examples))
        begun = time.perf_counter()
        wanted = self.config.scoring.row_names()
        if self.config.distillation.mode == "paired" and "untuned" in wanted:
            self._score_untouched(self.test, rounds[-1], "test")
        scores = self.test.score(self.proxy, rows=wanted, public_texts=self.public)
        seconds = time.perf_counter() - begun
        self._account(rounds[-1], "test", large_tokens=scores.large_tokens, seconds=seconds)
        results = {**scores.to_json(), "distillation": self.config.distillation.mode}
        if "proxy" in wanted or self.shift is not None:
            results["shift"] = self._shift(rounds[-1]).to_json()
        if self.private is not None:
            results["privacy"] = self.private.described()
        if "proxy" in wanted:
            self._write_examples(scores, rounds[-1])
        if self.distiller is not None and self.config.distillation.mode in WITH_DEVICE_COPY:
            results["rows"] |= self._device_copy(self.distiller, rounds[-1])
        num_devices = sum(shard["num_examples"] > 0 for shard in read_json(self.run.path / "shards.json"))
        results |= run_results(
            self.config,
            self.run.read_lines("costs.jsonl"),
            rounds=rounds[-1],
            num_devices=num_devices,
            seconds=time.perf_counter() - started,
            resumed_after=self.resumed_after,
        )
        self.run.append("answers.jsonl", *scores.records)
        self.run.write_results(results)
        for line in summary_lines(results, self.run.path):
            log(INFO, "%s", line)
        measures = worse_by(results)
        if measures:
            log(
                WARNING,
                "On this data the proxy is worse than the tuned small model by %s (95 %% interval); serve that one",
                " and ".join(measures),
            )
        if num_devices == 2 and self.config.data.train.startswith("demo:"):
            log(INFO, "Flower simulates two devices unless told otherwise; for eight add")
            log(INFO, '  --federation-config "num-supernodes=8 client-resources-num-cpus=1"')

    def _write_examples(self, scores: Scores, last_round: int) -> None:
        begun = time.perf_counter()
        examples, large_tokens = self.test.examples(self.proxy, scores, number=_EXAMPLES)
        self.run.append("examples.jsonl", *examples)
        seconds = time.perf_counter() - begun
        self._account(last_round, "examples", large_tokens=large_tokens, seconds=seconds)

    def _score_untouched(self, evaluator: Evaluator, last_round: int, phase: str) -> None:
        """Measure the row ``untuned`` with the small model of round 0, which ``paired`` changes; it is remembered."""
        untuned = self.proxy.untuned
        if untuned is None:
            return
        begun = time.perf_counter()
        model = self.config.model
        evaluator.remember_untuned(load_causal_lm(model.small, dtype=model.small_dtype, device=model.device))
        seconds = time.perf_counter() - begun
        self._account(last_round, phase, large_tokens=0, seconds=seconds)

    def _shift(self, last_round: int) -> Shift:
        """The shift that was chosen; where it was given, what others would have given on the validation items."""
        if self.shift is not None:
            return self.shift
        curve: list[ShiftPoint] = []
        if not self.config.data.answer_pattern:  # to judge answers of which a part counts, all would have to be written
            begun = time.perf_counter()
            curve, large_tokens = self.validation.shift_curve(self.proxy)
            seconds = time.perf_counter() - begun
            self._account(last_round, "curve", large_tokens=large_tokens, seconds=seconds)
        return Shift(
            alpha=self.proxy.alpha,
            plausibility=self.proxy.plausibility,
            chosen_by=BY_CONFIG,
            items=len(self.validation.items.examples),
            curve=curve,
        )

    def _device_copy(self, distiller: Distiller, last_round: int) -> dict[str, Any]:
        """Teach and save the devices' copy; its rows."""
        log(INFO, "Distilling the proxy into a copy of the small model for the devices")
        copy, taught = distiller.teach_device_copy(self.validation.quality)
        lesson = taught.lesson
        log(
            INFO,
            "Distilled in %d steps, KL %.3f to %.3f nats a token; drift to large %+.3f; the copy goes %g of the way",
            lesson.result.num_steps,
            lesson.result.kl_first,
            lesson.result.kl_last,
            lesson.drift,
            taught.share,
        )
        self._note(last_round, "device", taught.to_json())
        self.run.save_folder("device", lambda folder: save_small(copy, folder, self.config.model.small, self.tokenizer))
        self._account(last_round, "device", large_tokens=lesson.large_tokens, seconds=lesson.seconds)
        topics = frozenset[str]() if self.prompts is None else self.prompts.topics
        rows = self.test.rows_by_topic("device", self.test.measure(copy), topics)
        return {name: row.to_json() for name, row in rows.items()}


def _weights_of(model: PreTrainedModel, like: Iterable[str]) -> dict[str, Tensor]:
    """A copy of some of a model's weights, float32 on the CPU."""
    weights = dict(model.named_parameters())
    return {name: weights[name].detach().to("cpu", torch.float32, copy=True) for name in like}


def _read_arrays(path: Path, like: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights of a checkpoint, which must have the names and shapes of ``like``.

    Raises:
        RunError: It cannot be read, or holds something else.
    """
    arrays = _read_numpy(path)
    if arrays.keys() != like.keys():
        missing, extra = sorted(like.keys() - arrays.keys()), sorted(arrays.keys() - like.keys())
        raise RunError(
            f"it must hold the {len(like)} arrays that are tuned",
            value=f"{len(missing)} missing {missing[:1]}, {len(extra)} unknown {extra[:1]}",
        )
    for name, array in arrays.items():
        wanted, found = ("float32", like[name]), (array.dtype.name, array.shape)
        if found != wanted:
            raise RunError(f"its array {name} must be {wanted[0]} of shape {wanted[1]}", value=found)
        if not np.isfinite(array).all():
            raise RunError(f"its array {name} must be finite numbers")
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _read_numpy(path: Path) -> dict[str, NDArray[Any]]:
    try:
        return load_numpy(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise RunError(f"it cannot be read ({error})") from error


def _record(run: RunFolder, config: RunConfig, flower_run_id: int, found: Mapping[str, Any]) -> None:
    """Write a new run's ``config.json``, or make sure that a resumed run is the one that it says."""
    record = {
        "run_config": flat_values(config),
        **found,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "flower_run_ids": [flower_run_id],
    }
    if not config.resume:
        run.write_config(record)
        return
    check_same_run(run.read_config(), record, place=str(run.path))
