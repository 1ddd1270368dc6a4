"""The data of a run as its config names it: a device's shard, the server's held-out items, public texts.

Server and devices call the same functions with the same config, so they agree on what is held out of the training data
and on who owns what without sending any of it. What is held out and dealt out are records, so the turns of one
conversation stay together.

Where ``data.format`` is ``chat`` or ``auto``, the small model's tokenizer is needed, because conversations are written
by its chat template.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fedpt_flwr.config import DataConfig
from fedpt_flwr.data import LoadedRecord, first_record, load_records, read_records, split_holdout
from fedpt_flwr.errors import ConfigError, DataError, naming
from fedpt_flwr.partition import partition
from fedpt_flwr.prompts import Example, Template, field_text
from fedpt_flwr.shapes import AutoShape, Shape, make_shape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


def needs_tokenizer(data: DataConfig) -> bool:
    """Whether examples cannot be made without the small model's tokenizer."""
    return data.format in ("chat", "auto")


def device_shard(
    data: DataConfig,
    *,
    device: int,
    num_devices: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Example]:
    """One device's examples out of ``data.train``; the same for the same config, seed and number of devices.

    Args:
        data: Names the source.
        device: The device's number, from 0.
        num_devices: How many there are.
        seed: Of the run.
        tokenizer: The small model's; see `needs_tokenizer`.

    Raises:
        DataError: The source cannot be read, or cannot be dealt out to so many devices.
    """
    _template("data.template", data.template)
    tokenizer = tokenizer if needs_tokenizer(data) else None
    records = _load_train(data, tokenizer)
    chosen = _shards(data, num_devices, seed, tokenizer)[device]
    return [example for index in chosen for example in records[index].examples]


def local_shard(
    data: DataConfig, path: str, *, tokenizer: PreTrainedTokenizerBase | None = None, with_groups: bool = False
) -> list[Example]:
    """The examples of a device that has data of its own.

    Args:
        data: Says how a record becomes an example.
        path: Absolute path of the device's file or folder.
        tokenizer: The small model's; see `needs_tokenizer`.
        with_groups: Read the groups of the records that have one.

    Raises:
        DataError: It cannot be read.
    """
    group_field = data.group_field if with_groups else ""
    loaded = load_records(path, _shape(data, tokenizer), group_field=group_field, needs_group=False)
    return [example for record in loaded for example in record.examples]


def held_out_items(
    data: DataConfig, which: str, *, seed: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> Items:
    """The server's validation or test items.

    Args:
        data: Names their source; an empty one means a part of ``data.train`` that no device gets.
        which: ``validation`` or ``test``.
        seed: Of the run.
        tokenizer: The small model's; see `needs_tokenizer`.

    Raises:
        DataError: The source cannot be read.
    """
    chosen = held_out_records(data, which, seed=seed, tokenizer=tokenizer)
    # One record for each example, where it became several.
    records = [item.record for item in chosen for _ in item.examples]
    return Items(
        examples=[example for item in chosen for example in item.examples],
        values=_column(records, data.value_field),
        fields=_column(records, data.name_field),
        topics=_column(records, data.cover_field),
    )


def held_out_records(
    data: DataConfig, which: str, *, seed: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[LoadedRecord]:
    """As :func:`held_out_items`, as the records that they are made of."""
    source, split = getattr(data, which), getattr(data, f"{which}_split")
    if source:
        return load_records(source, _shape(data, tokenizer), split=split)
    return _records_of(data, which, seed, tokenizer)


def training_records(
    data: DataConfig, *, seed: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[LoadedRecord]:
    """Everything in ``data.train`` that is dealt out to devices.

    Args:
        data: Names the source, and what is held out of it.
        seed: Of the run.
        tokenizer: The small model's; see `needs_tokenizer`.

    Raises:
        DataError: The source cannot be read.
    """
    return _records_of(data, "train", seed, tokenizer)


def _records_of(
    data: DataConfig, which: str, seed: int, tokenizer: PreTrainedTokenizerBase | None
) -> list[LoadedRecord]:
    """The part of the training data that serves this purpose."""
    shape, group_field = _shape(data, tokenizer), _group_field(data)
    loaded = load_records(data.train, shape, split=data.train_split, group_field=group_field)
    return [loaded[index] for index in _split(data, len(loaded), seed)[which]]


def scored_shape(data: DataConfig, *, tokenizer: PreTrainedTokenizerBase | None = None) -> Shape:
    """The shape of what is scored, which is also that of public prompts and of what a service is asked.

    Raises:
        DataError: With ``data.format='auto'``: the source of the test items, or of the training data, cannot be read.
    """
    shape = _shape(data, tokenizer)
    if not isinstance(shape, AutoShape):
        return shape
    source, split = (data.test, data.test_split) if data.test else (data.train, data.train_split)
    record, place = first_record(source, split=split)
    return shape.of(record, place=place)


def public_texts(data: DataConfig, *, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    """The server's public texts; none where ``data.public`` is empty.

    With an empty ``data.public-template`` they are written as the devices' examples are, answers included.

    Raises:
        DataError: The source cannot be read, or lacks a field of the template.
    """
    if not data.public:
        return []
    if not data.public_template:
        loaded = load_records(data.public, _shape(data, tokenizer), split=data.public_split)
        return [item.examples[-1].prompt + item.examples[-1].answer for item in loaded]
    template = _template("data.public-template", data.public_template)
    records = read_records(data.public, split=data.public_split)
    return [
        template.render(record, place=f"{data.public}, record {number}") for number, record in enumerate(records, 1)
    ]


def public_prompts(data: DataConfig, *, tokenizer: PreTrainedTokenizerBase | None = None) -> Prompts | None:
    """The server's public prompts for distillation; None where ``data.prompts`` is empty.

    Raises:
        DataError: The source cannot be read, is empty, or lacks a field of the template.
    """
    if not data.prompts:
        return None
    shape = scored_shape(data, tokenizer=tokenizer)
    fits = "that fit the template" if data.format == "template" else f"of the shape {shape.name}"
    with _remedy(f"name prompts {fits} in data.prompts, or set distillation.mode='off'"):
        records = read_records(data.prompts, split=data.prompts_split)
        texts = [
            shape.prompt(record, place=f"{data.prompts}, record {number}") for number, record in enumerate(records, 1)
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
    for source, split in choice_sources(data):
        records = read_records(source, split=split)
        field = _answer_field(data, records)
        for number, record in enumerate(records, 1):
            found[field_text(record, field, place=f"{source}, record {number}")] = None
    if len(found) < 2:
        raise DataError(
            "there must be at least two different answers to choose from", value=list(found), place="data.choices"
        )
    return list(found)


def check_choices(items: Items, choices: Sequence[str], *, place: str) -> None:
    """Make sure that every item's answer can be chosen.

    Args:
        items: What is scored on.
        choices: All that may be answered.
        place: Where the items come from, for the error.

    Raises:
        DataError: One cannot.
    """
    known = frozenset(choices)
    for number, example in enumerate(items.examples, 1):
        if example.answer not in known:
            raise DataError(
                f"its answer must be one of the {len(known)} choices (data.choices)",
                value=example.answer,
                place=f"{place}, item {number}",
                remedy="name every source of answers, such as data.choices='train,test'",
            )


def _answer_field(data: DataConfig, records: Sequence[Mapping[str, Any]]) -> str:
    """The field of the answers in records, some of which are perhaps those of a text file: one choice on each line."""
    names = (data.answer_field,) if data.format == "template" else ("label", "completion", "output", "response")
    return next((name for name in names if any(name in record for record in records)), "text")


def choice_sources(data: DataConfig) -> list[tuple[str, str]]:
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


def _shape(data: DataConfig, tokenizer: PreTrainedTokenizerBase | None) -> Shape | AutoShape:
    """What the config says of the records' shape."""
    template = _template("data.template", data.template)
    return make_shape(data.format, template=template, answer_field=data.answer_field, tokenizer=tokenizer)


def _split(data: DataConfig, num_records: int, seed: int) -> dict[str, list[int]]:
    """Indices of the training data's records by purpose; whatever has a source of its own takes none."""
    kept = list(range(num_records))
    parts: dict[str, list[int]] = {}
    without = [f"data.{which}" for which in ("test", "validation") if not getattr(data, which)]
    if num_records < 1 + len(without):
        raise DataError(
            f"at least {1 + len(without)} records are needed to hold some out for {' and '.join(without)}, but there "
            f"are {num_records}",
            place=data.train,
            remedy=f"give more data, or a file of its own in {' and '.join(without)}",
        )
    for which in ("test", "validation"):
        parts[which] = []
        if not getattr(data, which):
            share = data.holdout_fraction * num_records / len(kept)
            rest, held_out = split_holdout(len(kept), share, seed)
            parts[which] = [kept[index] for index in held_out]
            kept = [kept[index] for index in rest]
    return {"train": kept, **parts}


def _load_train(data: DataConfig, tokenizer: PreTrainedTokenizerBase | None) -> Sequence[LoadedRecord]:
    needed = bool(_group_field(data))
    return _load(
        data.train, data.train_split, data.format, data.template, data.answer_field, data.group_field, needed, tokenizer
    )


def _group_field(data: DataConfig) -> str:
    """The field by which the training data is dealt out."""
    return data.group_field if data.partitioner in ("natural", "dirichlet") else ""


@functools.lru_cache(maxsize=2)
def _shards(
    data: DataConfig, num_devices: int, seed: int, tokenizer: PreTrainedTokenizerBase | None
) -> list[list[int]]:
    """Every device's indices into the training data's records."""
    records = _load_train(data, tokenizer)
    kept = _split(data, len(records), seed)["train"]
    groups = [records[index].group for index in kept]
    with naming("data.train"):
        shards = partition(data.partitioner, groups, num_devices, dirichlet_alpha=data.dirichlet_alpha, seed=seed)
    return [[kept[index] for index in shard] for shard in shards]


@functools.lru_cache(maxsize=2)
def _load(
    source: str,
    split: str,
    data_format: str,
    template: str,
    answer_field: str,
    group_field: str,
    needs_group: bool,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Sequence[LoadedRecord]:
    # In a simulation one process plays many devices in turn, all with the same source.
    shape = make_shape(data_format, template=Template(template), answer_field=answer_field, tokenizer=tokenizer)
    return tuple(load_records(source, shape, split=split, group_field=group_field, needs_group=needs_group))


def _column(records: Sequence[Mapping[str, Any]], name: str) -> list[str] | None:
    if not name or not all(record.get(name) not in (None, "") for record in records):
        return None
    return [str(record[name]) for record in records]
