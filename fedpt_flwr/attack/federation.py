"""One attacked federation: the app's real run in this process, its wire tapped, and what the models make of records.

Writes what the attacks need and nothing of the models: for every record and target the nats of its answer, for every
canary the rank of its secret. The attacks themselves are arithmetic on these, see ``membership`` and ``exposure``.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedpt_flwr.attack.exposure import rank_of
from fedpt_flwr.attack.losses import Batches, Combine, Item, items_of, read_losses
from fedpt_flwr.attack.plan import DEVICE_TARGETS, TARGETS, Federation, Plan
from fedpt_flwr.attack.pool import Canary, Pool, make_canaries, make_pool, members, write_data
from fedpt_flwr.compare.cell import App, made
from fedpt_flwr.compare.kinds import FEDPT, LARGE
from fedpt_flwr.compare.workers import WorkerSettings
from fedpt_flwr.config import RunConfig, parse_run_config
from fedpt_flwr.data import TokenizedExample, tokenize_examples
from fedpt_flwr.errors import ReplyError
from fedpt_flwr.grid import run_locally
from fedpt_flwr.logits import combine_logits
from fedpt_flwr.losses import answer_scores, model_scores
from fedpt_flwr.models import cpu_threads, load_causal_lm, load_tokenizer, make_tunable, set_arrays
from fedpt_flwr.prompts import Example, Template
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.records import ARRAYS, CONFIG, check_arrays, from_reply, sent_as, to_array_record, to_tensors
from fedpt_flwr.remote import remote_large
from fedpt_flwr.runs import find_run, read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedpt_flwr.grid import Handler

Result = dict[str, Any]
Arrays = dict[str, Tensor]

_DIGITS = 6  # of a loss in a file


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a worker is asked to do.

    Attributes:
        federation: The federation.
        plan: Of the attack.
        inputs: Digests of the files that it reads, see :func:`input_digests`.
    """

    federation: Federation
    plan: Plan
    inputs: Mapping[str, str]

    @property
    def name(self) -> str:
        """The federation's."""
        return self.federation.name


def result_path(folder: Path, federation: Federation) -> Path:
    """Where a federation's result lies once it is finished."""
    return folder / "cells" / f"{federation.name}.json"


@dataclass(slots=True)
class Tap:
    """Listens to what devices and server send each other in training, and remembers some of it.

    Attributes:
        wire: Type of the arrays on the wire.
        first: Each device's first reply, as the weights that the server takes it for.
        last: Each device's last reply.
        second_broadcast: What the server sends in round 2; None if there is none.
        unread: Why replies could not be read, as where they are sums in disguise; empty if they could.
    """

    wire: str
    first: dict[int, Arrays] = field(default_factory=dict)
    last: dict[int, Arrays] = field(default_factory=dict)
    second_broadcast: Arrays | None = None
    unread: str = ""

    def on(self, handle: Handler) -> Handler:
        """A ClientApp whose wire is tapped."""

        def answer(message: Any, context: Any) -> Any:
            reply = handle(message, context)
            if message.metadata.message_type == "train" and reply.has_content():
                self._listen(message.content, reply.content, int(context.node_config["partition-id"]))
            return reply

        return answer

    def _listen(self, sent: Any, replied: Any, device: int) -> None:
        told, arrays = sent.config_records.get(CONFIG, {}), sent.array_records.get(ARRAYS)
        if arrays is None:
            return
        if int(str(told.get("server-round", 0))) == 2 and self.second_broadcast is None:
            self.second_broadcast = to_tensors(arrays, sent_as(self.wire))
        update = replied.array_records.get(ARRAYS)
        if update is None:
            self.unread = "the replies hold no arrays of a device's own"
            return
        try:
            # What the server sent is in float32 there; here it is what arrived, which half a type has rounded.
            begun = to_array_record(to_tensors(arrays, sent_as(self.wire)))
            checked = check_arrays(update, begun, place=f"device {device}", dtype=self.wire)
        except ReplyError as error:
            self.unread = f"the replies cannot be read as weights ({error.rule})"
            return
        found = {name: torch.from_numpy(np.array(values)) for name, values in from_reply(checked, begun, self.wire)}
        self.first.setdefault(device, found)
        self.last[device] = found


def run_in_worker(task: Task, app: App, told: WorkerSettings[Task]) -> None:
    """Run a federation, read what came of it, and write the result.

    Raises:
        FedPTError: The run failed, and says why.
    """
    started = time.perf_counter()
    plan, federation = task.plan, task.federation
    flat, first_seed = plan.told(federation), plan.seeds[0]
    config = parse_run_config(flat)
    pool = make_pool(config.data, num_devices=plan.num_devices, seed=first_seed)
    is_member = members(pool, half=federation.half)
    canaries = make_canaries(
        config.data,
        num_devices=pool.num_devices,
        number=plan.canaries,
        copies=plan.copies,
        digits=plan.digits,
        seed=federation.seed,
    )
    tap = Tap(config.wire.dtype)
    with (
        tempfile.TemporaryDirectory(dir=made(told.folder / "work"), prefix=f"{federation.name}.") as scratch,
        cpu_threads(config.threads.server),
    ):
        data = write_data(pool, is_member, canaries, config.data, made(Path(scratch) / "data"), seed=first_seed)
        runs = Path(scratch) / "runs"
        handle = tap.on(app.client) if federation.kind == FEDPT else app.client
        run_locally(app.server, handle, flat | data | {"output-dir": str(runs)}, num_devices=pool.num_devices)
        run = find_run(root=runs)
        found = _Readings(config, run, pool, canaries).read(tap, plan.targets, federation.kind)
        results = read_json(run / "results.json")
    write_json(
        result_path(told.folder, federation),
        {
            "name": federation.name,
            **asdict(federation),
            "changes": dict(federation.changes),
            "code_hash": app.code_hash,
            "run_config": plan.recorded(federation),
            "inputs": dict(task.inputs),
            "pool": {"digest": pool.digest, "source": pool.source, "devices": pool.num_devices},
            "members": [int(value) for value in is_member],
            "canaries": [{"device": canary.device, "copies": canary.copies} for canary in canaries],
            "candidates": 10**plan.digits,
            **found,
            **{key: results[key] for key in ("rows", "alpha", "plausibility", "privacy") if key in results},
            "seconds": round(time.perf_counter() - started, 2),
        },
    )


class _Readings:
    """What models make of the pool's records and of the canaries' candidates."""

    def __init__(self, config: RunConfig, run: Path, pool: Pool, canaries: Sequence[Canary]) -> None:
        self.config, self.pool, self.canaries = config, pool, canaries
        tokenizer: PreTrainedTokenizerBase = load_tokenizer(str((run / "proxy").resolve()))
        large = remote_large(config, tokenizer, named_by_folder=False)
        self.proxy = ProxyModel.from_pretrained(run, large=large, device=config.model.device)
        self.pad_id = int(tokenizer.pad_token_id or 0)
        self.records, self.tokens = self._record_items(pool.examples, tokenizer)
        self.secrets: list[tuple[list[Item], list[tuple[int, int]]]] = []
        template = Template(config.data.template)
        for canary in canaries:
            examples = canary.examples(template, config.data.answer_field)
            tokenized, _ = tokenize_examples(examples, tokenizer, max_length=config.train.max_length)
            # Without the end of the sequence, which is the same for all.
            self.secrets.append(items_of(tokenized[0].prompt_ids, [item.answer_ids[:-1] for item in tokenized]))

    def _record_items(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[list[Item | None], list[int]]:
        """The records as items; None where there is nothing to learn, as a device finds too."""
        tokenized, report = tokenize_examples(examples, tokenizer, max_length=self.config.train.max_length)
        waiting, dropped = iter(tokenized), set(report.dropped)
        found: list[TokenizedExample | None] = [
            None if place in dropped else next(waiting) for place in range(len(examples))
        ]
        items = [None if example is None else Item(example, (example.answer_ids[-1],)) for example in found]
        return items, [0 if example is None else len(example.answer_ids) for example in found]

    def read(self, tap: Tap, targets: Sequence[str], kind: str) -> Result:
        """Nats of the records and ranks of the secrets for every target of this kind of federation."""
        found = _Found(len(self.pool.examples), len(self.canaries))
        everything = range(len(self.pool.examples)), range(len(self.canaries))
        if kind == LARGE:
            self._look(found, self._of(self.proxy.tuned), lambda scores: {LARGE: scores[0]}, *everything)
            self._look(found, self._of(self.proxy.large), lambda scores: {"large": scores[0]}, *everything)
            return found.to_json(self.tokens)
        self._look(found, self._of_all, self._combine(targets), *everything)
        wanted = [name for name in ("aggregate_first", *DEVICE_TARGETS) if name in targets]
        if not wanted:
            return found.to_json(self.tokens)
        model_config = self.config.model
        small = make_tunable(
            load_causal_lm(model_config.small, dtype=model_config.small_dtype, device=model_config.device),
            self.config.tuning,
            seed=self.config.seed,
        ).eval()
        if "aggregate_first" in wanted:
            if tap.second_broadcast is None:
                found.absent["aggregate_first"] = "the run has no second round"
            else:
                set_arrays(small, tap.second_broadcast)
                self._look(found, self._of(small), lambda scores: {"aggregate_first": scores[0]}, *everything)
        for name, replies in (("device_first", tap.first), ("device_last", tap.last)):
            if name not in wanted:
                continue
            if not replies:
                found.absent[name] = tap.unread or "no device has replied"
            for device, arrays in replies.items():
                set_arrays(small, arrays)
                own = [place for place, holder in enumerate(self.pool.devices) if holder == device]
                canaries = [place for place, canary in enumerate(self.canaries) if canary.device == device]
                self._look(found, self._of(small), _named(name), own, canaries)
        return found.to_json(self.tokens)

    def _combine(self, targets: Sequence[str]) -> Combine:
        """From the scores of large, tuned and untuned to those of targets and their controls."""
        alpha, plausibility = self.proxy.alpha, self.proxy.plausibility

        def combine(scores: Sequence[Tensor]) -> dict[str, Tensor]:
            large, tuned, untuned = scores
            found = {"large": large, "untuned": untuned}
            if "tuned" in targets:
                found["tuned"] = tuned
            if "proxy" in targets:
                found["proxy"] = combine_logits(large, tuned, untuned, alpha=alpha, plausibility=plausibility)
            if "proxy_without_mask" in targets:
                found["proxy_without_mask"] = combine_logits(large, tuned, untuned, alpha=alpha)
            return found

        return combine

    def _of_all(self, examples: Sequence[TokenizedExample]) -> Batches:
        return model_scores(self.proxy, examples, pad_id=self.pad_id, batch_size=self.config.scoring.batch_size)

    def _of(self, model: Any) -> Callable[[Sequence[TokenizedExample]], Batches]:
        def scores(examples: Sequence[TokenizedExample]) -> Batches:
            return answer_scores(
                model,
                examples,
                pad_id=self.pad_id,
                batch_size=self.config.scoring.batch_size,
                vocab_size=self.proxy.config.real_vocab_size,
            )

        return scores

    def _look(
        self,
        found: _Found,
        scores: Callable[[Sequence[TokenizedExample]], Batches],
        combine: Combine,
        records: Iterable[int],
        canaries: Iterable[int],
    ) -> None:
        """Read some records and canaries with one pass, and note what came of it."""
        known = [(place, item) for place in records if (item := self.records[place]) is not None]
        chosen = [(place, *self.secrets[place]) for place in canaries]
        items = [item for _, item in known] + [item for _, parts, _ in chosen for item in parts]
        for name, nats in read_losses(items, scores([item.read for item in items]), combine).items():
            for (place, _), value in zip(known, nats, strict=False):
                found.nats_of(name)[place] = round(float(value[0]), _DIGITS)
            rest = iter(nats[len(known) :])
            for place, parts, where in chosen:
                part = list(itertools.islice(rest, len(parts)))
                costs = np.asarray([part[item][end] for item, end in where])
                found.ranks_of(name)[place] = rank_of(costs, self.canaries[place].secret)


def _named(name: str) -> Combine:
    return lambda scores: {name: scores[0]}


@dataclass(slots=True)
class _Found:
    """What was read so far; None where nothing was, as of the records of a device that never replied."""

    num_records: int
    num_canaries: int
    nats: dict[str, list[float | None]] = field(default_factory=dict)
    ranks: dict[str, list[float | None]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def nats_of(self, name: str) -> list[float | None]:
        return self.nats.setdefault(name, [None] * self.num_records)

    def ranks_of(self, name: str) -> list[float | None]:
        return self.ranks.setdefault(name, [None] * self.num_canaries)

    def to_json(self, tokens: Sequence[int]) -> Result:
        order = list(TARGETS)
        nats = {name: self.nats[name] for name in order if name in self.nats}
        ranks = {name: self.ranks[name] for name in order if name in self.ranks}
        return {"tokens": list(tokens), "nats": nats, "ranks": ranks, "absent": self.absent}
