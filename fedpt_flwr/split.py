"""Divides a data set into what is public, what devices hold, and what is kept for validation and test.

Where a record goes depends on the seed and on the text of some of its fields (its key) and on nothing else: not on its
place in the file, nor on the other records. So the same command gives the same parts anywhere, records of one key are
never torn apart, and a data set that grows keeps its parts. Within a part records are sorted by that same number, so
that the first items of a test are a fair sample where the source was sorted by site or label. Whole groups (sites,
users) may be public, and are then neither on devices nor in the test. A key that is in one part is taken out of all
that come after it in this order: test, validation, public, train.

The parts' files have the names of the run config's keys, and ``run-config.toml`` points to them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpt_flwr.config import Scalar, toml_of
from fedpt_flwr.data import content_hash, read_records
from fedpt_flwr.errors import ConfigError, DataError
from fedpt_flwr.prompts import field_text
from fedpt_flwr.runs import write_file, write_folder, write_json

PARTS = ("test", "validation", "public", "train")
"""In the order in which a key belongs to them."""

Record = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPlan:
    """How a data set is divided.

    Attributes:
        train: Source of the records that are divided.
        given: Sources of parts that are there already, by name: ``test``, ``validation``, ``public``.
        shares: Shares of ``train`` that go into parts which are not given, by name; the rest stays.
        key_fields: Fields whose text decides where a record goes; upper and lower case and white space do not count.
        context_fields: Further fields of the key, which a record may lack or leave empty.
        group_field: Field of the groups; empty: there are none.
        public_groups: Groups that are public as a whole.
        seed: Another seed is another division.

    Raises:
        ConfigError: A share is out of range, or something is given twice or left out; its place is the option of
            ``fedpt split``.
    """

    train: str
    given: Mapping[str, str] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    key_fields: Sequence[str]
    context_fields: Sequence[str] = ()
    group_field: str = ""
    public_groups: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for part, share in self.shares.items():
            if not 0 <= share < 1:
                raise ConfigError("must be at least 0 and below 1", value=share, place=f"--{part}-share")
            if share and part in self.given:
                raise ConfigError(
                    f"{part} is given as a file and as a share",
                    value=share,
                    place=f"--{part} and --{part}-share",
                    remedy="leave one out",
                )
        if sum(self.shares.values()) >= 1:
            raise ConfigError(
                "the shares leave nothing for the devices",
                value=list(self.shares.values()),
                place=" and ".join(f"--{part}-share" for part in self.shares),
                remedy="their sum must be below 1",
            )
        if not self.key_fields:
            raise ConfigError("at least one field must decide where a record goes", place="--key")
        if self.public_groups and not self.group_field:
            raise ConfigError(
                "public groups need the field that holds a record's group",
                value=list(self.public_groups),
                place="--public-group",
                remedy="name it with --group-field, or give a --config that has data.group-field",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """What came of it.

    Attributes:
        records: By part, in an order that key and seed decide; those of one key in the order of their source.
        dropped: Records that were left out of a part because their key is in an earlier one, or (of a test or
            validation part that was given) because their group is public.
    """

    records: Mapping[str, Sequence[Record]]
    dropped: Mapping[str, int]


def divide(plan: SplitPlan) -> Division:
    """Read the sources and divide the records.

    Raises:
        DataError: A source cannot be read, a record lacks a field, a public group is not there, or a part that is asked
            for is empty.
    """
    parts: dict[str, list[tuple[str, Record]]] = {part: [] for part in PARTS}
    groups: set[str] = set()
    dropped: Counter[str] = Counter()
    sources = {**plan.given, "train": plan.train}
    for part, source in sources.items():
        for number, record in enumerate(read_records(source), 1):
            place = f"{source}, record {number}"
            key = _key(record, plan, place)
            # What is given as public may be of another kind, without groups.
            group = field_text(record, plan.group_field, place=place) if plan.group_field and part != "public" else ""
            groups.add(group)
            goes_to = _part_of(key, plan) if part == "train" else part
            if group in plan.public_groups:
                if part != "train":
                    dropped[part] += 1
                    continue
                goes_to = "public"
            parts[goes_to].append((key, record))
    unknown = sorted(set(plan.public_groups) - groups)
    if unknown:
        known = ", ".join(sorted(groups - {""})[:20])
        raise DataError(
            f"there is no such group in {plan.group_field!r}",
            value=unknown,
            place="--public-group",
            remedy=f"there are {known}",
        )
    records, seen = {}, set[str]()
    for part in PARTS:
        in_order = sorted(parts[part], key=lambda pair: _drawn(pair[0], plan.seed))
        records[part] = [record for key, record in in_order if key not in seen]
        dropped[part] += len(parts[part]) - len(records[part])
        seen |= {key for key, _ in parts[part]}
        wanted = part == "train" or part in plan.given or plan.shares.get(part, 0) > 0
        if wanted and not records[part]:
            raise DataError(f"nothing is left for {part}", place=plan.train, remedy="give more data or other shares")
    return Division(records=records, dropped=dict(dropped))


def write_division(
    out: Path, plan: SplitPlan, division: Division, *, run_config: Mapping[str, Scalar], overwrite: bool = False
) -> dict[str, Any]:
    """Write the parts, ``split.json`` and ``run-config.toml`` into a folder, which is whole or not there.

    Args:
        out: The folder; it must not be there, be empty, or be an older division.
        plan: How it came about.
        division: The parts.
        run_config: Keys of a run that are written into ``run-config.toml`` before those of the parts' files.
        overwrite: Whether an older division is replaced.

    Returns:
        What ``split.json`` holds.

    Raises:
        DataError: The folder holds something else.
    """
    out = out.absolute()
    if out.exists():
        there = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
        if there and not (overwrite and "split.json" in there):
            remedy = "name another folder" + (", or add --overwrite" if "split.json" in there else "")
            raise DataError(
                "the folder holds something already", value=sorted(there)[:5], place=str(out), remedy=remedy
            )
    written = {part: records for part, records in division.records.items() if records}

    def groups_of(records: Sequence[Record]) -> dict[str, int]:
        counts = Counter(str(record.get(plan.group_field, "")) for record in records)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    described = {
        "seed": plan.seed,
        "key_fields": [*plan.key_fields, *plan.context_fields],
        "public_groups": list(plan.public_groups),
        "shares": dict(plan.shares),
        "sources": {part: {"path": source} for part, source in {"train": plan.train, **plan.given}.items()},
        "parts": {
            part: {
                "records": len(records),
                "dropped": division.dropped.get(part, 0),
                "sha256": content_hash(records),
                **({"groups": groups_of(records)} if plan.group_field else {}),
            }
            for part, records in written.items()
        },
    }
    keys = dict(run_config)
    for part in PARTS:
        # An empty key means: held out of the training data, or no public text.
        keys[f"data.{part}"] = str(out / f"{part}.jsonl") if part in written else ""
    keys["data.prompts"] = keys["data.public"]  # its records have the key's fields, which are those of the prompts
    if not keys["data.public"]:
        keys["distillation.mode"] = "off"  # there is nothing to distil on

    def fill(folder: Path) -> None:
        for part, records in written.items():
            lines = "".join(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)
            write_file(folder / f"{part}.jsonl", lines.encode("utf-8", "surrogatepass"))
        write_json(folder / "split.json", described)
        write_file(folder / "run-config.toml", toml_of(keys).encode())

    write_folder(out, fill)
    return described


def _key(record: Record, plan: SplitPlan, place: str) -> str:
    """The text that decides; that of a record without context is the same as if there were no such fields."""
    there = [name for name in plan.context_fields if record.get(name) is not None]
    texts = [field_text(record, name, place=place) for name in (*plan.key_fields, *there)]
    context = texts[len(plan.key_fields) :]
    texts = [*texts[: len(plan.key_fields)], *(text for text in context if text.strip())]
    return "\0".join(" ".join(text.casefold().split()) for text in texts)


def _part_of(key: str, plan: SplitPlan) -> str:
    """The part that a key belongs to: a number from 0 to 1 made of key and seed, held against the shares.

    Test and validation are taken from below and what is public from above, so that it stays public when the other
    shares change: models may have been pre-trained on it.
    """
    drawn = _drawn(key, plan.seed)
    if drawn >= 1 - plan.shares.get("public", 0.0):
        return "public"
    if drawn < plan.shares.get("test", 0.0):
        return "test"
    return "validation" if drawn < plan.shares.get("test", 0.0) + plan.shares.get("validation", 0.0) else "train"


def _drawn(key: str, seed: int) -> float:
    """A number from 0 to 1 that is always the same for this key and seed."""
    digest = hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
