"""Who holds what in an attacked federation: a pool of records of which each device gets a random half, and canaries.

A record of the pool is as good as any other; only a coin decides whether a device trains on it. So whatever tells the
two halves apart tells what training left behind, and nothing else (the membership game of Yeom et al. 2018,
arXiv:1709.01604, and Carlini et al. 2022, arXiv:2112.03570). Canaries are secrets of a known form that stand in one
device's data, once or several times (Carlini et al. 2019, arXiv:1802.08232).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedpt_flwr.config import DataConfig, Scalar
from fedpt_flwr.demo_world import REQUESTS_PER_KIND, request_pool
from fedpt_flwr.errors import ConfigError, DataError
from fedpt_flwr.partition import partition
from fedpt_flwr.prompts import Example, Template, field_text
from fedpt_flwr.runs import write_file
from fedpt_flwr.sources import answer_choices, held_out_records, training_records

DEVICE_FIELD = "attacked-device"
"""The field that says whose a record is, by which the run deals them out."""

_PACKAGED, _PACKAGED_SEED = "demo:train", 0
_LEAST_PER_DEVICE = 4
_HALVES, _SECRETS = 1, 2  # purposes of random streams
_FIRST_NUMBER = 10  # of a canary: all have as many digits


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Records that devices may or may not have trained on.

    Attributes:
        records: Texts of the fields that the template and the answer need.
        examples: The same as prompt and answer.
        devices: Which device would hold it, from 0 on without gaps.
        source: Where they are from, for a reader.
    """

    records: Sequence[Mapping[str, str]]
    examples: Sequence[Example]
    devices: Sequence[int]
    source: str

    @property
    def num_devices(self) -> int:
        """Devices that hold records."""
        return max(self.devices) + 1

    @property
    def digest(self) -> str:
        """A hash of who would hold what: results of other records do not belong into one table."""
        held = [
            [device, example.prompt, example.answer]
            for device, example in zip(self.devices, self.examples, strict=True)
        ]
        return hashlib.sha256(json.dumps(held).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """A secret in one device's data.

    Attributes:
        device: Whose.
        copies: How often it stands there.
        record: The fields, with the true secret.
        candidates: Every answer that it might have been, the true one at the place ``secret``.
        secret: Which candidate is the true one.
    """

    device: int
    copies: int
    record: Mapping[str, str]
    candidates: Sequence[str]
    secret: int

    def examples(self, template: Template, answer_field: str) -> list[Example]:
        """The prompt with each candidate as its answer."""
        prompt = template.render({**self.record, answer_field: self.candidates[self.secret]})
        return [Example(prompt, answer) for answer in self.candidates]


def make_pool(data: DataConfig, *, num_devices: int, seed: int) -> Pool:
    """Deal everything that there is to train on out to the devices, each record once.

    For the packaged demo world its generator makes as many requests that a half of the pool is as large as the world's
    own training data; of other data there are the records that there are.

    Args:
        data: Of the run.
        num_devices: Devices that records are dealt out to, in the way that the config says.
        seed: Of the partition, and of what is held out.

    Raises:
        ConfigError: The devices have data of their own, which nobody else can divide, or records become several
            examples.
        DataError: The data cannot be read, or some device would hold too few records to take a half of.
    """
    if data.partitioner == "node-local":
        raise ConfigError(
            "an attack must know who holds what; devices with data of their own do not tell",
            value=data.partitioner,
            place="data.partitioner",
            remedy="name training data in data.train, and deal it out with natural, dirichlet or iid",
        )
    if data.format != "template":
        raise ConfigError(
            "an attack needs records of which each becomes one example by data.template",
            value=data.format,
            place="data.format",
            remedy="set data.format='template', and data.template and data.answer-field to the records' fields",
        )
    if data.train == _PACKAGED and data.validation and data.test:
        raw: Sequence[Mapping[str, Any]] = request_pool(_PACKAGED_SEED, per_kind=2 * REQUESTS_PER_KIND)
        template = Template(data.template)
        grouped = data.group_field and data.partitioner != "iid"
        examples = []
        for number, record in enumerate(raw, 1):
            place = f"{data.train}, record {number}"
            prompt, answer = template.render(record, place=place), field_text(record, data.answer_field, place=place)
            group = field_text(record, data.group_field, place=place) if grouped else ""
            examples.append(Example(prompt, answer, group))
        source = f"{data.train}, and as many again from its generator"
    else:
        loaded = training_records(data, seed=seed)
        examples, raw = [item.examples[0] for item in loaded], [item.record for item in loaded]
        source = data.train
    first = {(example.prompt, example.answer): place for place, example in reversed(list(enumerate(examples)))}
    kept = sorted(first.values())  # a copy of a member would be no non-member
    shards = partition(
        data.partitioner,
        [examples[place].group for place in kept],
        num_devices,
        dirichlet_alpha=data.dirichlet_alpha,
        seed=seed,
    )
    holders = [[kept[index] for index in shard] for shard in shards if shard]
    fewest = min(map(len, holders))
    if fewest < _LEAST_PER_DEVICE:
        raise DataError(
            f"every device must have at least {_LEAST_PER_DEVICE} different records, of which it trains on a half",
            value=fewest,
            place=data.train,
            remedy="take fewer devices with --devices, or another data.partitioner",
        )
    order = [(device, place) for device, shard in enumerate(holders) for place in shard]
    return Pool(
        records=[_texts(raw[place], data) for _, place in order],
        examples=[examples[place] for _, place in order],
        devices=[device for device, _ in order],
        source=source,
    )


def _fields(data: DataConfig) -> list[str]:
    return list(dict.fromkeys([*Template(data.template).fields, data.answer_field]))


def _texts(record: Mapping[str, Any], data: DataConfig) -> dict[str, str]:
    return {name: field_text(record, name) for name in _fields(data)}


def members(pool: Pool, *, half: int) -> npt.NDArray[np.bool_]:
    """Which records are trained on: a random half of each device's.

    Args:
        pool: The records.
        half: Which random half; of an even number and the next odd one each is what the other is not.

    Returns:
        Bool, ``(records,)``.
    """
    generator = np.random.default_rng([_HALVES, half // 2])
    devices = np.asarray(pool.devices)
    chosen = np.zeros(len(devices), dtype=np.bool_)
    for device in range(pool.num_devices):
        places = generator.permutation(np.flatnonzero(devices == device))
        chosen[places[: len(places) // 2]] = True
    return ~chosen if half % 2 else chosen


def make_canaries(
    data: DataConfig, *, num_devices: int, number: int, copies: Sequence[int], digits: int, seed: int
) -> list[Canary]:
    """Secrets for the devices, one device after the other.

    Args:
        data: Gives the fields that a record has.
        num_devices: Devices that hold data.
        number: Canaries for each number of copies.
        copies: How often a canary stands in its device's data.
        digits: Of a secret: any of ``10 ** digits`` numbers, all as likely.
        seed: Of the secrets.
    """
    generator = np.random.default_rng([_SECRETS, seed])
    found = []
    for index in range(number * len(copies)):
        name = f"access code {_FIRST_NUMBER + index}"
        candidates = [f"{name} = {code:0{digits}d}" for code in range(10**digits)]
        secret = int(generator.integers(len(candidates)))
        record = dict.fromkeys(_fields(data), name) | {data.answer_field: candidates[secret]}
        found.append(
            Canary(
                device=index % num_devices,
                copies=copies[index // number],
                record=record,
                candidates=candidates,
                secret=secret,
            )
        )
    return found


def write_data(
    pool: Pool,
    chosen: npt.NDArray[np.bool_],
    canaries: Sequence[Canary],
    data: DataConfig,
    folder: Path,
    *,
    seed: int,
) -> dict[str, Scalar]:
    """Write what a federation trains on and is scored on as files.

    Args:
        pool: The records.
        chosen: Which of them are trained on.
        canaries: What is added.
        data: Of the run.
        folder: For the files.
        seed: Of what is held out of the training data.

    Returns:
        The run-config keys that name them.
    """
    lines = [
        {**record, DEVICE_FIELD: _label(device)}
        for record, device, is_in in zip(pool.records, pool.devices, chosen, strict=True)
        if is_in
    ]
    lines += [
        {**canary.record, DEVICE_FIELD: _label(canary.device)} for canary in canaries for _ in range(canary.copies)
    ]
    told: dict[str, Scalar] = {"data.partitioner": "natural", "data.group-field": DEVICE_FIELD}
    told |= _file(folder, "train", lines)
    for which in ("validation", "test"):
        if not getattr(data, which):
            names = {*_fields(data), data.value_field, data.name_field, data.cover_field}
            held_out = [item.record for item in held_out_records(data, which, seed=seed)]
            told |= _file(folder, which, ({key: record[key] for key in names & record.keys()} for record in held_out))
    if data.choices:
        told |= _file(folder, "choices", ({data.answer_field: answer} for answer in answer_choices(data)))
    return told


def _label(device: int) -> str:
    return f"{device:06d}"  # in the order of the devices, as the partition sorts them


def _file(folder: Path, name: str, records: Iterable[Mapping[str, Any]]) -> dict[str, Scalar]:
    path = folder / f"{name}.jsonl"
    write_file(path, "".join(json.dumps(record, default=str) + "\n" for record in records).encode())
    return {f"data.{name}": str(path), f"data.{name}-split": "train"}
