"""The data of a run as its config names it: a device's shard, the server's held-out items, public texts.

Server and devices call the same functions with the same config, so they agree on what is held out of the training data
and on who owns what without sending any of it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fedpt_flwr.config import DataConfig
from fedpt_flwr.data import load_examples, load_examples_with_records, read_records, split_holdout
from fedpt_flwr.errors import ConfigError, DataError
from fedpt_flwr.partition import partition
from fedpt_flwr.prompts import Example, Template, field_text


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """Examples to score on.

    Attributes:
        examples: Prompts and right answers.
        values: What a good answer contains, one per example; None if the records do not say.
        fields: What is asked for, one per example; None if the records do not say.
        topics: What each example is about, in the terms of :class:`Prompts`; None if the records do not say.
    """

    examples: list[Example]
    values: list[str] | None
    fields: list[str] | None
    topics: list[str] | None = None

    def first(self, number: int) -> Items:
        """The first items, or all of them where ``number`` is 0."""
        return self.only(range(min(number, len(self.examples)) if number else len(self.examples)))

    def only(self, indices: Sequence[int]) -> Items:
        """The items at these indices."""

        def chosen(column: list[str] | None) -> list[str] | None:
            return column and [column[index] for index in indices]

        return Items(
            examples=[self.examples[index] for index in indices],
            values=chosen(self.values),
            fields=chosen(self.fields),
            topics=chosen(self.topics),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Public prompts without answers.

    Attributes:
        texts: The prompts.
        topics: Everything that they are about, by ``data.cover-field``; empty if the records do not say.
    """

    texts: list[str]
    topics: frozenset[str]


def device_shard(data: DataConfig, *, device: int, num_devices: int, seed: int) -> list[Example]:
    """One device's examples out of ``data.train``; the same for the same config, seed and number of devices.

    Raises:
        DataError: The source cannot be read, or cannot be dealt out to so many devices.
    """
    examples = _load_train(data)
    return [examples[index] for index in _shards(data, num_devices, seed)[device]]


def local_shard(data: DataConfig, path: str) -> list[Example]:
    """The examples of a device that has data of its own.

    Args:
        data: Says how a record becomes an example.
        path: Absolute path of the device's file or folder.

    Raises:
        DataError: It cannot be read.
    """
    _template("data.template", data.template)
    return load_examples(path, template=data.template, answer_field=data.answer_field)


def held_out_items(data: DataConfig, which: str, *, seed: int) -> Items:
    """The server's validation or test items.

    Args:
        data: Names their source; an empty one means a part of ``data.train`` that no device gets.
        which: ``validation`` or ``test``.
        seed: Of the run.

    Raises:
        DataError: The source cannot be read.
    """
    examples, records = held_out_records(data, which, seed=seed)
    return Items(
        examples=examples,
        values=_column(records, data.value_field),
        fields=_column(records, data.name_field),
        topics=_column(records, data.cover_field),
    )


def held_out_records(data: DataConfig, which: str, *, seed: int) -> tuple[list[Example], list[dict[str, Any]]]:
    """As :func:`held_out_items`, as examples and the records that they are made of."""
    _template("data.template", data.template)
    source, split = getattr(data, which), getattr(data, f"{which}_split")
    if source:
        return load_examples_with_records(source, split=split, template=data.template, answer_field=data.answer_field)
    return _train_records(data, which, seed)


def training_records(data: DataConfig, *, seed: int) -> tuple[list[Example], list[dict[str, Any]]]:
    """Everything in ``data.train`` that is dealt out to devices, as examples with their groups and as records.

    Args:
        data: Names the source, and what is held out of it.
        seed: Of the run.

    Raises:
        DataError: The source cannot be read.
    """
    _template("data.template", data.template)
    return _train_records(data, "train", seed)


def _train_records(data: DataConfig, which: str, seed: int) -> tuple[list[Example], list[dict[str, Any]]]:
    """The part of the training data that serves this purpose."""
    examples, records = load_examples_with_records(
        data.train,
        split=data.train_split,
        template=data.template,
        answer_field=data.answer_field,
        group_field=_group_field(data),
    )
    chosen = _split(data, len(examples), seed)[which]
    return [examples[index] for index in chosen], [records[index] for index in chosen]


def public_texts(data: DataConfig) -> list[str]:
    """The server's public texts; none where ``data.public`` is empty.

    Raises:
        DataError: The source cannot be read, or lacks a field of the template.
    """
    if not data.public:
        return []
    template = _template("data.public-template", data.public_template)
    records = read_records(data.public, split=data.public_split)
    return [
        template.render(record, place=f"{data.public}, record {number}") for number, record in enumerate(records, 1)
    ]


def public_prompts(data: DataConfig) -> Prompts | None:
    """The server's public prompts for distillation; None where ``data.prompts`` is empty.

    Raises:
        DataError: The source cannot be read, is empty, or lacks a field of the template.
    """
    if not data.prompts:
        return None
    template = _template("data.template", data.template)
    with _remedy("name prompts that fit the template in data.prompts, or set distillation.mode='off'"):
        records = read_records(data.prompts, split=data.prompts_split)
        texts = [
            template.render(record, place=f"{data.prompts}, record {place}") for place, record in enumerate(records, 1)
        ]
    topics = _column(records, data.cover_field)
    return Prompts(texts=texts, topics=frozenset(topics or ()))


def answer_choices(data: DataConfig) -> list[str]:
    """All that may be answered, each once, in the order in which they are found; none where ``data.choices`` is empty.

    Raises:
        DataError: A source cannot be read, a record has no answer, or there are fewer than two different answers.
    """
    if not data.choices:
        return []
    found: dict[str, None] = {}
    for source, split in _choice_sources(data):
        records = read_records(source, split=split)
        # A text file has one choice on each line, and its records the field "text".
        field = data.answer_field if any(data.answer_field in record for record in records) else "text"
        for number, record in enumerate(records, 1):
            found[field_text(record, field, place=f"{source}, record {number}")] = None
    if len(found) < 2:
        raise DataError(
            "there must be at least two different answers to choose from", value=list(found), place="data.choices"
        )
    return list(found)


def _choice_sources(data: DataConfig) -> list[tuple[str, str]]:
    """Where the choices are found: sources and their splits."""
    names = [name.strip() for name in data.choices.split(",")]
    if not set(names) <= {"train", "validation", "test", "public"}:
        return [(data.choices, data.choices_split)]
    named = {name: (getattr(data, name), getattr(data, f"{name}_split")) for name in names}
    for name in {"validation", "test"} & named.keys():
        if not named[name][0]:  # then it is a part of data.train
            named[name] = (data.train, data.train_split)
    return [(source, split) for source, split in dict.fromkeys(named.values()) if source]


@contextmanager
def _remedy(remedy: str) -> Iterator[None]:
    """Give an error that names no remedy this one."""
    try:
        yield
    except DataError as error:
        error.remedy = error.remedy or remedy
        raise


def _template(key: str, text: str) -> Template:
    """A template of the config; what is wrong with it is said with its key."""
    try:
        return Template(text)
    except DataError as error:
        raise ConfigError(error.rule, value=error.value, place=key, remedy=error.remedy) from error


def _split(data: DataConfig, num_examples: int, seed: int) -> dict[str, list[int]]:
    """Indices of the training data by purpose; whatever has a source of its own takes none."""
    kept = list(range(num_examples))
    parts: dict[str, list[int]] = {}
    for which in ("test", "validation"):
        parts[which] = []
        if not getattr(data, which):
            share = data.holdout_fraction * num_examples / len(kept)
            rest, held_out = split_holdout(len(kept), share, seed)
            parts[which] = [kept[index] for index in held_out]
            kept = [kept[index] for index in rest]
    return {"train": kept, **parts}


def _load_train(data: DataConfig) -> Sequence[Example]:
    return _load(data.train, data.train_split, data.template, data.answer_field, _group_field(data))


def _group_field(data: DataConfig) -> str:
    return data.group_field if data.partitioner in ("natural", "dirichlet") else ""


@functools.lru_cache(maxsize=2)
def _shards(data: DataConfig, num_devices: int, seed: int) -> list[list[int]]:
    """Every device's indices into the training data."""
    examples = _load_train(data)
    kept = _split(data, len(examples), seed)["train"]
    groups = [examples[index].group for index in kept]
    shards = partition(data.partitioner, groups, num_devices, dirichlet_alpha=data.dirichlet_alpha, seed=seed)
    return [[kept[index] for index in shard] for shard in shards]


@functools.lru_cache(maxsize=2)
def _load(source: str, split: str, template: str, answer_field: str, group_field: str) -> Sequence[Example]:
    # In a simulation one process plays many devices in turn, all with the same source.
    return tuple(
        load_examples(source, split=split, template=template, answer_field=answer_field, group_field=group_field)
    )


def _column(records: Sequence[Mapping[str, Any]], name: str) -> list[str] | None:
    if not name or not all(record.get(name) not in (None, "") for record in records):
        return None
    return [str(record[name]) for record in records]
