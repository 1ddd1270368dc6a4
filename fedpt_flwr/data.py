"""From a data source to batches of tokens: read records, make examples, tokenise, mask, batch.

A source is ``demo:NAME`` (a file of the demo world), the absolute path of a file or of a folder of files, or a hub id,
``owner/name`` or ``owner/name:config``. Whatever is wrong with one ends in an error that names the file and the line or
record. Which examples a device gets is not decided here.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedpt_flwr.errors import ConfigError, DataError, ModelError
from fedpt_flwr.paths import expanded
from fedpt_flwr.prompts import Example, field_text
from fedpt_flwr.shapes import AutoShape, Shape

if TYPE_CHECKING:
    from datasets import Features
    from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100
"""The label that cross-entropy in torch and transformers leaves out."""

_DEMO_PACKAGE = "fedpt_demo_world"
_HUB_ID = re.compile(r"(?P<name>[\w.-]{1,96}/[\w.-]{1,96})(?::(?P<config>[^:/]+))?")
_SPLIT_NAME = re.compile(r"(?<![a-z])(train|validation|valid|val|dev|test)(?![a-z])", re.IGNORECASE)
_SHOWN_CHARS = 60
_MAX_CELL_CHARS = 2**31 - 1
_TOKENISED_TOGETHER = 1024
"""Texts given to the tokenizer at once: enough for its threads, while offsets and masks of few texts are in memory."""

_Located = tuple[str, dict[str, Any]]
"""A record, after where it was found."""


# --- records ----------------------------------------------------------------------------------------------------------


def read_records(source: str, *, split: str = "train") -> list[dict[str, Any]]:
    """All records of a source, in the order in which they lie there.

    Local files are read by their suffix, as UTF-8 with or without a byte-order mark:

    | suffix | records |
    | --- | --- |
    | ``.jsonl`` | one JSON object a line; blank lines are skipped |
    | ``.json`` | a list of objects, or ``{"data": [...]}`` |
    | ``.csv``, ``.tsv`` | one a row, under a header; all values are text |
    | ``.parquet`` | one a row; labels that have names are given by name |
    | ``.txt`` | ``{"text": line}`` for each line that is not blank |

    Of a folder, all files of these kinds are read in the order of their names; they must be of one kind, and must not
    be different splits.

    Args:
        source: The source.
        split: Split of a hub data set, which may be a slice such as ``train[:100]``. Files have no splits: of them all
            records are read.

    Returns:
        At least one record.

    Raises:
        DataError: The source cannot be found or read, or has no records.
    """
    return [record for _, record in _read(source, split)]


def _read(source: str, split: str) -> list[_Located]:
    if source.startswith("demo:"):
        return _read_demo(source)
    path = Path(source)
    if path.is_absolute():
        return _read_path(path)
    hub_id = _HUB_ID.fullmatch(source)
    if source.startswith((".", "~")) or path.suffix.lower() in _READERS or (hub_id and path.exists()):
        raise DataError(
            "a path must be absolute, because Flower's processes run in other folders",
            value=source,
            remedy=f"write {expanded(path).resolve()} if that is meant",
        )
    if hub_id:
        return _read_hub(hub_id["name"], hub_id["config"], split)
    raise DataError(
        "a data source must be demo:NAME, an absolute path, or a hub id (owner/name or owner/name:config)", value=source
    )


def _read_demo(source: str) -> list[_Located]:
    name = source.removeprefix("demo:")
    remedy = "install the project that carries it: `pip install -e .` in its folder, or its wheel"
    try:
        folder = resources.files(_DEMO_PACKAGE)
    except ModuleNotFoundError as error:
        raise DataError(f"the package {_DEMO_PACKAGE} is not installed", place=source, remedy=remedy) from error
    names = sorted(entry.name.removesuffix(".jsonl") for entry in folder.iterdir() if entry.name.endswith(".jsonl"))
    if name not in names:
        if names:
            remedy = "it has " + ", ".join(f"demo:{known}" for known in names)
        raise DataError(f"the demo world has no data set {name!r}", place=source, remedy=remedy)
    with resources.as_file(folder / f"{name}.jsonl") as path:
        return _read_path(path)


def _read_path(path: Path) -> list[_Located]:
    with _reporting(path):
        files = _files_of(path) if path.is_dir() else [path]
    return [located for file in files for located in _read_file(file)]


def _files_of(folder: Path) -> list[Path]:
    """The data files of a folder, in the order of their names."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _READERS and not file.is_dir())
    names = ", ".join(file.name for file in files)
    if not files:
        raise DataError("the folder holds no data files", place=str(folder), remedy=f"it needs {_suffixes()} files")
    if len({file.suffix.lower() for file in files}) > 1:
        raise DataError(
            "the data files of a folder must be of one kind",
            value=names,
            place=str(folder),
            remedy="name one file, or move the others away",
        )
    # A test file that is read as training data spoils every result without a sign.
    if len({match[1].lower() for file in files if (match := _SPLIT_NAME.search(file.stem))}) > 1:
        raise DataError(
            "the folder holds different splits, which must not be mixed",
            value=names,
            place=str(folder),
            remedy="name one file",
        )
    return files


def _read_file(path: Path) -> list[_Located]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        with _reporting(path):
            path.stat()  # a path that leads nowhere is reported as that
        raise DataError(f"a data file must end in {_suffixes()}", place=str(path))
    records = list(reader(path))
    if not records:
        raise DataError("the file holds no records", place=str(path), remedy="give a file with at least one")
    return records


def _line(path: Path, number: int) -> str:
    return f"{path}, line {number}"


def _suffixes() -> str:
    return ", ".join(_READERS)


@contextmanager
def _reporting(path: Path) -> Iterator[None]:
    """Turns what the operating system says about a path into errors that say what to do."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError("there is no such file or folder", place=str(path), remedy="check the path") from error
    except PermissionError as error:
        raise DataError(
            "reading is not permitted", place=str(path), remedy="let the user that runs this process read it"
        ) from error
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", place=str(path)) from error


def _read_text(path: Path) -> str:
    with _reporting(path):
        content = path.read_bytes()
    content = content.removeprefix(b"\xef\xbb\xbf")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line_start = content.rfind(b"\n", 0, error.start) + 1
        raise DataError(
            f"the text must be UTF-8 ({error.reason} at byte {error.start - line_start + 1} of the line)",
            value=content[error.start : error.start + 4],
            place=_line(path, content.count(b"\n", 0, line_start) + 1),
            remedy="save the file as UTF-8",
        ) from error


def _read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines that are not blank, each after its place."""
    # Not splitlines(): JSON and prose may hold other characters that Python takes for line ends, such as U+2028.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            yield _line(path, number), line.removesuffix("\r")


def _read_text_lines(path: Path) -> Iterator[_Located]:
    for place, line in _read_lines(path):
        yield place, {"text": line}


def _read_jsonl(path: Path) -> Iterator[_Located]:
    for place, line in _read_lines(path):
        record = _parse_json(line, place, remedy="write one JSON object a line; a list belongs into a .json file")
        if not isinstance(record, dict):
            raise DataError(
                "a line must be a JSON object",
                value=record,
                place=place,
                remedy='write {"field": value, ...}; a list belongs into a .json file',
            )
        yield place, record


def _read_json(path: Path) -> Iterator[_Located]:
    text = _read_text(path)
    if not text.strip():
        return
    content = _parse_json(text, str(path), remedy="JSON Lines belong into a .jsonl file")
    records = content.get("data") if isinstance(content, dict) else content
    if not isinstance(records, list):
        raise DataError(
            'the file must hold a list of objects, or {"data": [...]}',
            value=text[:_SHOWN_CHARS],
            place=str(path),
            remedy="JSON Lines belong into a .jsonl file",
        )
    for number, record in enumerate(records, start=1):
        place = f"{path}, record {number}"
        if not isinstance(record, dict):
            raise DataError("a record must be a JSON object", value=record, place=place)
        yield place, record


def _parse_json(text: str, place: str, *, remedy: str) -> Any:
    def record(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise DataError(
                "an object of JSON must have each field once",
                value=next(name for name in found if names.count(name) > 1),
                place=place,
                remedy="rename one of them, or remove it",
            )
        return found

    try:
        return json.loads(text, object_pairs_hook=record)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if "\n" in text else f"column {error.colno}"
        start = error.pos if "\n" in text else 0
        raise DataError(
            f"broken JSON at {where} ({error.msg})",
            value=text[start : start + _SHOWN_CHARS],
            place=place,
            remedy=remedy,
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists within lists without end
        raise DataError(f"JSON that cannot be read ({error})", value=text[:_SHOWN_CHARS], place=place) from error


def _read_table(path: Path, delimiter: str) -> Iterator[_Located]:
    rows = _table_rows(path, delimiter)
    try:
        place, header = next(rows)
    except StopIteration:
        return
    if not all(name.strip() for name in header) or len(set(header)) < len(header):
        raise DataError(
            "the first row must be a header: a different name for each column",
            value=header,
            place=place,
            remedy="add or mend the header",
        )
    for place, cells in rows:
        if len(cells) != len(header):
            raise DataError(
                f"the row has {len(cells)} {'cell' if len(cells) == 1 else 'cells'}, but the header has {len(header)}",
                value=delimiter.join(cells)[:_SHOWN_CHARS],
                place=place,
                remedy='put cells that hold separators or line breaks into "..."',
            )
        yield place, dict(zip(header, cells, strict=True))


def _table_rows(path: Path, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """The rows that are not blank, each after the place of its first line."""
    csv.field_size_limit(_MAX_CELL_CHARS)  # of all readers, and low: 131,072
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), delimiter=delimiter, strict=True)
    while True:
        place = _line(path, reader.line_num + 1)
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"the row cannot be read ({error})", place=place, remedy="mend its quotes, or use a .jsonl file"
            ) from error
        if cells:
            yield place, cells


def _read_csv(path: Path) -> Iterator[_Located]:
    return _read_table(path, ",")


def _read_tsv(path: Path) -> Iterator[_Located]:
    return _read_table(path, "\t")


def _read_parquet(path: Path) -> Iterator[_Located]:
    # Only who reads such files waits for these libraries: `datasets` alone takes two seconds to import.
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features

    try:
        with _reporting(path), path.open("rb") as file:
            table = pq.read_table(file)
    except pa.ArrowException as error:
        raise DataError(
            f"not a Parquet file that can be read ({error})", place=str(path), remedy="write or copy it again"
        ) from error
    records = table.to_pylist()
    if b"huggingface" in (table.schema.metadata or {}):  # what columns mean, where `datasets` wrote the file
        try:
            features = Features.from_arrow_schema(table.schema)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"the file's description of its columns cannot be read ({error})",
                place=str(path),
                remedy="write it again without the metadata 'huggingface'",
            ) from error
        records = _name_labels(records, features, str(path))
    yield from _locate(records, str(path))


_READERS: dict[str, Callable[[Path], Iterator[_Located]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_text_lines,
}


def _read_hub(name: str, config: str | None, split: str) -> list[_Located]:
    import datasets

    place = f"{name}:{config}" if config else name
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except ConnectionError as error:
        reason = "HF_HUB_OFFLINE is set" if datasets.config.HF_HUB_OFFLINE else "no connection"
        raise DataError(
            f"the hub cannot be reached ({reason}), and the data set is not in this machine's cache",
            place=place,
            remedy="load it once where there is a connection, or give the absolute path of a local file",
        ) from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            "the hub has no such data set, or does not show it to you",
            place=place,
            remedy="check the id; for a private or gated one accept its terms and log in with `hf auth login`",
        ) from error
    # What else goes wrong has no common base: an unknown split or config (ValueError), a loading script (RuntimeError),
    # files that cannot be parsed (DatasetsError), the disk (OSError).
    except (ValueError, RuntimeError, OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"the data set cannot be loaded with the split {split!r} ({' '.join(str(error).split())})",
            place=place,
            remedy="check the config (owner/name:config) and the split",
        ) from error
    records = list(_locate(_name_labels(dataset.to_list(), dataset.features, place), f"{place}, split {split}"))
    if not records:
        raise DataError(f"the split {split!r} holds no records", place=place, remedy="choose another one")
    return records


def _name_labels(records: list[dict[str, Any]], features: Features, place: str) -> list[dict[str, Any]]:
    """Puts the names of class labels in the place of their numbers, in the records themselves.

    Raises:
        DataError: A number has no name.
    """
    from datasets import ClassLabel

    for field, feature in features.items():
        if isinstance(feature, ClassLabel) and feature.names:
            for record in records:
                number = record[field]
                if number is not None and number >= len(feature.names):
                    raise DataError(
                        f"a label in {field!r} must be below {len(feature.names)}, the number of names for them",
                        value=number,
                        place=place,
                        remedy="mend the record, or write the file again with all names",
                    )
                # Test splits without labels have -1.
                record[field] = feature.names[number] if number is not None and number >= 0 else None
    return records


def _locate(records: Iterable[dict[str, Any]], place: str) -> Iterator[_Located]:
    return ((f"{place}, record {number}", record) for number, record in enumerate(records, start=1))


# --- examples ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedRecord:
    """A record and the examples that it became: several for the turns of a conversation."""

    record: dict[str, Any]
    examples: tuple[Example, ...]

    @property
    def group(self) -> str:
        """The group of all of them."""
        return self.examples[0].group


def load_records(
    source: str, shape: Shape | AutoShape, *, split: str = "train", group_field: str = "", needs_group: bool = True
) -> list[LoadedRecord]:
    """The records of a source with the examples that they become.

    Args:
        source: As for `read_records`.
        shape: What a record looks like; :class:`AutoShape` is found out by the first one.
        split: Split of a hub data set.
        group_field: The field that holds the group; empty: all examples are of the group ``""``.
        needs_group: Whether every record must have that field.

    Raises:
        DataError: The source cannot be read, or a record is of another shape, lacks its group or has an empty answer.
    """
    loaded = []
    for place, record in _read(source, split):
        if isinstance(shape, AutoShape):
            shape = shape.of(record, place=place)
        has_group = group_field and (needs_group or isinstance(record.get(group_field), str | int))
        group = field_text(record, group_field, place=place) if has_group else ""
        examples = shape.examples(record, place=place)
        loaded.append(LoadedRecord(record, tuple(dataclasses.replace(example, group=group) for example in examples)))
    return loaded


def first_record(source: str, *, split: str = "train") -> tuple[dict[str, Any], str]:
    """The first record of a source, and where it was found.

    Raises:
        DataError: The source cannot be read, or has no records.
    """
    place, record = _read(source, split)[0]
    return record, place


def split_holdout(num_examples: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Choose examples at random that are kept back, for a data set that has no validation or test file.

    Args:
        num_examples: Number of examples, at least 2.
        fraction: Share that is held out, between 0 and 1; it is rounded to whole examples, at least one on each side.
        seed: Decides which.

    Returns:
        Indices of the examples that stay and of those held out, both ascending.

    Raises:
        ConfigError: ``fraction`` is not between 0 and 1.
        DataError: There are fewer than two examples.
    """
    if not 0 < fraction < 1:
        raise ConfigError("the fraction that is held out must be between 0 and 1", value=fraction)
    if num_examples < 2:
        raise DataError(
            f"at least two examples are needed to hold some out, but there are {num_examples}",
            remedy="give more data, or a file of its own for validation or test",
        )
    num_held_out = min(max(round(num_examples * fraction), 1), num_examples - 1)
    shuffled = np.random.default_rng(seed).permutation(num_examples).tolist()
    return sorted(shuffled[num_held_out:]), sorted(shuffled[:num_held_out])


def content_hash(items: Iterable[Mapping[str, Any] | Example]) -> str:
    """A fingerprint of records or examples and of their order: SHA-256 over one line of JSON for each, in hex.

    The order of a record's fields does not count. Values that JSON has no form for count as ``str`` writes them.
    """
    digest = hashlib.sha256()
    for item in items:
        content: Any
        if isinstance(item, Example):
            content = [item.prompt, item.answer, item.group, *([item.ending] if item.ending else [])]
        else:
            content = dict(item)
        digest.update(json.dumps(content, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


# --- tokens -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class TokenizedExample:
    """An example in tokens."""

    prompt_ids: list[int]
    """The prompt, after the tokenizer's beginning-of-sequence token if it is one that adds it. One that
    `tokenize_examples` made is never empty."""

    answer_ids: list[int]
    """What is learnt: the answer and the end-of-sequence token (absent if the answer's end was cut). One that
    `tokenize_examples` made is never empty; a prompt that waits for the proxy's answer has none."""


@dataclasses.dataclass(frozen=True, slots=True)
class TruncationReport:
    """What a limit on the length has cost."""

    num_examples: int
    """Examples given."""

    num_prompts_cut: int
    """Examples kept whose prompt lost its beginning."""

    num_answers_cut: int
    """Examples kept whose answer lost its end, be it the end of sequence alone."""

    dropped: tuple[int, ...]
    """Indices of the examples left out, because the answer is blank or has no token."""

    @property
    def num_dropped(self) -> int:
        """Number of examples left out."""
        return len(self.dropped)


def tokenize_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> tuple[list[TokenizedExample], TruncationReport]:
    """Turn examples into tokens to learn from.

    Prompt and answer are tokenised each by itself, so that the border between them is exact with every tokenizer. No
    special token is added but the end of sequence after the answer, and before the prompt the beginning of sequence if
    the tokenizer puts one there by default (Llama and Gemma do, GPT-2 and Qwen do not), unless it is there already, as
    in what a chat template wrote. Special tokens that a template spells out, such as ``<|im_end|>``, become these
    tokens. A prompt without any token becomes the beginning of sequence, or the end of sequence where the tokenizer has
    no beginning (the convention of GPT-2), so that an answer's first token always has something that it is predicted
    from.

    What is longer than ``max_length`` loses the beginning of the prompt first (but never the beginning of sequence),
    until the prompt has ``max_length // 2`` tokens left; then it loses the end of the answer, with the end of sequence.
    So a long answer never leaves a model to learn it without its question.

    Args:
        examples: Examples with answers.
        tokenizer: A tokenizer that has an end-of-sequence token.
        max_length: Tokens of prompt and answer together, at least 2.

    Returns:
        The tokenised examples in the same order, without those that have nothing to learn, and what was cut.

    Raises:
        ConfigError: ``max_length`` is below 2.
        ModelError: The tokenizer has no end-of-sequence token.
    """
    _check_max_length(max_length)
    eos_id = _end_id(tokenizer)
    kept, dropped = [], []
    num_prompts_cut = num_answers_cut = 0
    prompts = tokenize_prompts([example.prompt for example in examples], tokenizer, max_length=None)
    answers = _tokenize((example.answer + example.ending for example in examples), tokenizer)
    start = _start_ids(tokenizer)
    for index, (example, prompt, answer) in enumerate(zip(examples, prompts, answers, strict=True)):
        if not example.answer.strip() or not answer:
            dropped.append(index)
            continue
        whole_answer = [*answer, eos_id]
        prompt_ids = _cut(prompt, start, max(max_length // 2, max_length - len(whole_answer)))
        answer_ids = whole_answer[: max_length - len(prompt_ids)]
        kept.append(TokenizedExample(prompt_ids, answer_ids))
        num_prompts_cut += len(prompt_ids) < len(prompt)
        num_answers_cut += len(answer_ids) < len(whole_answer)
    return kept, TruncationReport(len(examples), num_prompts_cut, num_answers_cut, tuple(dropped))


def _end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    eos_id: int | None = tokenizer.eos_token_id
    if eos_id is None:
        raise ModelError(
            "the tokenizer needs an end-of-sequence token, or the model never learns to stop",
            place=tokenizer.name_or_path or None,
            remedy="set `eos_token` in the tokenizer_config.json of the model",
        )
    return eos_id


def tokenize_answers(answers: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Turn answers into the tokens that `tokenize_examples` puts behind a prompt, end of sequence included.

    Raises:
        DataError: An answer is blank or has no token.
        ModelError: The tokenizer has no end-of-sequence token.
    """
    end = _end_id(tokenizer)
    tokenized = list(_tokenize(answers, tokenizer))
    for answer, ids in zip(answers, tokenized, strict=True):
        if not answer.strip() or not ids:
            raise DataError("an answer must not be blank", value=answer)
    return [[*ids, end] for ids in tokenized]


def tokenize_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int | None
) -> list[list[int]]:
    """Turn prompts into the tokens that `tokenize_examples` puts before an answer.

    Args:
        prompts: Texts to continue.
        tokenizer: Any tokenizer.
        max_length: Tokens of a prompt, at least 2; longer ones lose their beginning, but not the beginning of sequence.
            None: nothing is cut.

    Raises:
        ConfigError: ``max_length`` is below 2.
        DataError: A prompt is empty, and the tokenizer has no token that could stand in its place.
    """
    if max_length is not None:
        _check_max_length(max_length)
    start = _start_ids(tokenizer)
    tokenized = []
    for number, prompt in enumerate(_tokenize(prompts, tokenizer), start=1):
        # A chat template writes the beginning of sequence itself.
        whole = (prompt if start and prompt[: len(start)] == start else start + prompt) or _first_ids(tokenizer, number)
        tokenized.append(whole if max_length is None else _cut(whole, start, max_length))
    return tokenized


def first_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that stands for an empty prompt: the beginning of sequence, else the end; None if there is neither."""
    token: int | None = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return token


def _first_ids(tokenizer: PreTrainedTokenizerBase, number: int) -> list[int]:
    token = first_token(tokenizer)
    if token is None:
        raise DataError(
            "a prompt must not be empty with a tokenizer that has neither a beginning nor an end of sequence",
            place=f"prompt {number}",
            remedy="write a prompt, or set `bos_token` in the tokenizer_config.json of the model",
        )
    return [token]


def _cut(prompt: list[int], start: list[int], length: int) -> list[int]:
    """A prompt of so many tokens at most: its end, after the beginning of sequence if there is one."""
    return prompt if len(prompt) <= length else start + _last(prompt, length - len(start))


def _check_max_length(max_length: int) -> None:
    if max_length < 2:
        raise ConfigError("the greatest length must be at least 2 tokens", value=max_length)


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token, if this tokenizer puts it before a text by default."""
    bos = tokenizer.bos_token_id
    added = list(tokenizer("a")["input_ids"])
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    return [bos] if bos is not None and added[:1] == [bos] != plain[:1] else []


def _tokenize(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The token ids of each text, without special tokens around it."""
    remaining = iter(texts)
    while together := list(itertools.islice(remaining, _TOKENISED_TOGETHER)):
        # verbose=False: a text that is longer than the model's context is cut by the caller, which needs no warning.
        yield from tokenizer(together, add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]


def _last(ids: list[int], number: int) -> list[int]:
    return ids[max(len(ids) - number, 0) :]


# --- batches ----------------------------------------------------------------------------------------------------------


def collate(batch: Sequence[TokenizedExample], pad_id: int, *, side: str = "right") -> dict[str, Tensor]:
    """Put tokenised examples into tensors that a causal LM of transformers takes.

    Args:
        batch: At least one example.
        pad_id: Id that fills the gaps; any id of the vocabulary will do, because the mask hides it.
        side: Where the gaps are, ``right`` or ``left``.

    Returns:
        ``input_ids``, ``attention_mask`` (1 on tokens, 0 on gaps) and ``labels``, each ``(batch, longest)``, int64.
        A label stands at the position of its own token, -100 on prompts and gaps: the model shifts inside.

    Raises:
        ConfigError: ``side`` is neither.
    """
    rows = [example.prompt_ids + example.answer_ids for example in batch]
    labels = [[IGNORED_LABEL] * len(example.prompt_ids) + example.answer_ids for example in batch]
    return {**_pad(rows, pad_id, side), "labels": _pad(labels, IGNORED_LABEL, side)["input_ids"]}


def collate_packed(batch: Sequence[TokenizedExample], pad_id: int) -> dict[str, Tensor]:
    """Put tokenised examples behind one another, into rows as long as the longest of them.

    Every example's positions begin at 0, by which a model of transformers tells them apart where it is given no mask.
    What is left of a row looks like one more example. The longest come first, each into the first row with room for it.

    Args:
        batch: At least one example, none with an empty prompt.
        pad_id: Id that fills the gaps; any id of the vocabulary will do.

    Returns:
        ``input_ids``, ``position_ids`` and ``labels``, each ``(rows, longest)``, int64; labels as of `collate`, so that
        no example is predicted from the one before it, because a prompt has no labels.
    """
    rows: list[list[TokenizedExample]] = []
    lengths: list[int] = []
    longest = max(_length(example) for example in batch)
    for example in sorted(batch, key=_length, reverse=True):
        size = _length(example)
        row = next((number for number, length in enumerate(lengths) if length + size <= longest), len(rows))
        if row == len(rows):
            rows.append([])
            lengths.append(0)
        rows[row].append(example)
        lengths[row] += size
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    positions, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED_LABEL)
    for number, row_examples in enumerate(rows):
        begin = 0
        for example in row_examples:
            end, answer = begin + _length(example), begin + len(example.prompt_ids)
            ids[number, begin:end] = torch.tensor(example.prompt_ids + example.answer_ids, dtype=torch.int64)
            labels[number, answer:end] = torch.tensor(example.answer_ids, dtype=torch.int64)
            positions[number, begin:end] = torch.arange(end - begin)
            begin = end
        positions[number, begin:] = torch.arange(longest - begin)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def _length(example: TokenizedExample) -> int:
    return len(example.prompt_ids) + len(example.answer_ids)


def collate_prompts(prompts: Sequence[list[int]], pad_id: int) -> dict[str, Tensor]:
    """Put tokenised prompts into tensors for ``generate()``, with gaps on the left.

    Args:
        prompts: At least one prompt, in token ids.
        pad_id: Id that fills the gaps.

    Returns:
        ``input_ids`` and ``attention_mask`` (1 on tokens, 0 on gaps), each ``(prompts, longest)``, int64.
    """
    return _pad(prompts, pad_id, "left")


def _pad(rows: Sequence[list[int]], pad_id: int, side: str) -> dict[str, Tensor]:
    if side not in ("right", "left"):
        raise ConfigError("the side of the padding must be right or left", value=side)
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[number, place] = torch.tensor(row, dtype=torch.int64)
        mask[number, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def batches(num_examples: int, batch_size: int, num_steps: int, generator: np.random.Generator) -> Iterator[list[int]]:
    """Example indices of exactly ``num_steps`` batches, over as many epochs as that takes.

    In each epoch every example comes once, in a fresh random order. An epoch's last batch holds what is left and may be
    short: no batch reaches into the next epoch, so none holds an example twice.

    Args:
        num_examples: Number of examples, at least 1.
        batch_size: Examples per batch, at least 1.
        num_steps: Number of batches.
        generator: Source of the orders; it is advanced once per epoch that is begun.

    Raises:
        ConfigError: ``batch_size`` is below 1.
        DataError: There are no examples.
    """
    if batch_size < 1:
        raise ConfigError("the batch size must be at least 1", value=batch_size)
    if num_examples < 1:
        raise DataError("there must be at least one example to make batches of", remedy="give the device some data")

    def endless() -> Iterator[list[int]]:
        while True:
            order = generator.permutation(num_examples).tolist()
            for begin in range(0, num_examples, batch_size):
                yield order[begin : begin + batch_size]

    return itertools.islice(endless(), num_steps)


def num_drawn(num_examples: int, batch_size: int, num_steps: int) -> int:
    """Examples in the batches that :func:`batches` gives for the same arguments, repeats counted."""
    epochs, rest = divmod(num_steps, math.ceil(num_examples / batch_size))
    return epochs * num_examples + rest * batch_size
