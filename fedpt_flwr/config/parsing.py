"""Flat keys into a run config, and back; everything that is wrong with them at once."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from fedpt_flwr.config.contradictions import contradictions
from fedpt_flwr.config.keys import RunConfig, Scalar
from fedpt_flwr.errors import ConfigError, FedPTError
from fedpt_flwr.paths import expanded

_MARKDOWN_HEAD = """# Run config

Every key of `[tool.flwr.app.config]`. Its defaults are in `pyproject.toml`; for one run they are overridden by

    flwr run . --stream -c "num-server-rounds=4 train.max-steps=40 data.partitioner='iid'"

or by a TOML file of such keys, `flwr run . --stream --run-config /absolute/path.toml`. Flower takes either pairs or
one file, and refuses keys that are not here. `fedpt check-config -c "…"` says everything that is wrong with a config
without a run. Paths are absolute, because Flower's processes run in other folders.

This page is made by `fedpt check-config --markdown`."""

# A value that is meant as a path: begins like one, is deeper than `owner/name`, or ends like a data file.
_PATH_LIKE = re.compile(r"^[.~]|^[^:]*/[^:]*/|\.(jsonl|json|csv|tsv|parquet|txt)$")

_ALWAYS_PATHS = frozenset({"output-dir", "remote.cache", "model.large-offload-folder"})
"""Keys whose value is no hub id, whatever it looks like."""


_MOST_BITS = 63
"""Of a whole number, without its sign: what Flower's messages hold."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One key of the run config, for documentation and for checks.

    Attributes:
        key: Dotted kebab-case name, as typed in ``pyproject.toml`` and after ``-c``.
        kind: Python type of the value; a number or a text is `float | str`.
        default: Value where the key is not given.
        doc: What it means.
        rule: What a value must obey, or empty.
        holds: The rule as a function, or None.
        path: True if the value may be a path, which then must be absolute.
        key_variable: Environment variable for the key that the value may hold against the rule; no error shows it.
    """

    key: str
    kind: Any
    default: Any
    doc: str
    rule: str
    holds: Callable[[Any], bool] | None
    path: bool
    key_variable: str


@functools.cache
def _kinds(cls: type) -> Mapping[str, Any]:
    """The types of a settings class's fields; a simulation reads its config for every device and message."""
    return get_type_hints(cls)


def settings() -> dict[str, Setting]:
    """Every key of the run config, in the order of the classes above."""
    found: dict[str, Setting] = {}

    def collect(cls: type, prefix: str) -> None:
        kinds = _kinds(cls)
        for field in dataclasses.fields(cls):
            key = prefix + field.name.replace("_", "-")
            if dataclasses.is_dataclass(kinds[field.name]):
                collect(kinds[field.name], f"{key}.")
            else:
                found[key] = Setting(key=key, kind=kinds[field.name], default=field.default, **field.metadata)

    collect(RunConfig, "")
    return found


def parse_run_config(flat: Mapping[str, Scalar]) -> RunConfig:
    """Turn flat keys into a :class:`RunConfig`; absent keys take their default.

    Args:
        flat: What Flower's ``context.run_config`` holds: dotted kebab-case keys.

    Raises:
        ConfigError: Names every key that is unknown, ill-typed, out of range or in contradiction with another.
    """
    config, problems = examine_run_config(flat)
    if problems:
        raise ConfigError.of(problems)
    return config


def examine_run_config(flat: Mapping[str, Scalar]) -> tuple[RunConfig, list[FedPTError]]:
    """What :func:`parse_run_config` parses, with the default in place of every wrong value, and all that is wrong."""
    known = settings()
    problems: list[FedPTError] = [
        ConfigError("is not a key of this app", place=key, remedy=_nearest(key, known))
        for key in flat
        if key not in known
    ]
    values: dict[str, Any] = {}
    for key, setting in known.items():
        value = _unescaped(key, flat.get(key, setting.default))
        problem = _problem(setting, value)
        if problem is not None:
            problems.append(problem)
            value = setting.default
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        values[key] = float(value) if is_number and setting.kind in (float, float | str) else value
    config: RunConfig = _build(RunConfig, "", values)
    return config, problems + contradictions(config, {str(problem.place) for problem in problems})


def flat_values(config: RunConfig) -> dict[str, Scalar]:
    """A config as the flat keys that give it: the inverse of :func:`parse_run_config`."""

    def walk(part: Any, prefix: str) -> dict[str, Scalar]:
        found: dict[str, Scalar] = {}
        for field in dataclasses.fields(part):
            key, value = prefix + field.name.replace("_", "-"), getattr(part, field.name)
            found |= walk(value, f"{key}.") if dataclasses.is_dataclass(value) else {key: value}
        return found

    return walk(config, "")


def toml_of(keys: Mapping[str, Scalar]) -> str:
    """Flat keys as the text of a TOML file."""
    # JSON's numbers and truth values are TOML's, and so are its texts, but for escaped surrogates and a bare DEL.
    written = {key: json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") for key, value in keys.items()}
    return "".join(f'"{key}" = {value}\n' for key, value in written.items())


def settings_markdown() -> str:
    """The text of ``docs/run-config.md``: every key with its default, meaning and rule."""
    lines = [_MARKDOWN_HEAD]
    section = None
    for setting in settings().values():
        head = setting.key.split(".")[0] if "." in setting.key else "the run"
        if head != section:
            lines += ["", f"## {head}", "", "| key | default | meaning | rule |", "| --- | --- | --- | --- |"]
            section = head
        default = repr(setting.default) if setting.kind is str else str(setting.default).lower()
        doc = setting.doc.replace("|", "\\|")
        lines.append(f"| `{setting.key}` | `{default}` | {doc} | {setting.rule} |")
    return "\n".join(lines).strip() + "\n"


def _nearest(key: str, known: Mapping[str, Setting]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]}?" if close else "all keys are in docs/run-config.md"


def _unescaped(key: str, value: Any) -> Any:
    # `-c "data.template='a\nb'"` reaches us with a backslash and an n: TOML keeps them in single quotes.
    return value.replace("\\n", "\n") if key.endswith("template") and isinstance(value, str) else value


def _problem(setting: Setting, value: Any) -> ConfigError | None:
    kind = setting.kind
    fits = isinstance(value, kind | int if kind in (float, float | str) else kind)
    if not fits or (kind is not bool and isinstance(value, bool)):
        name = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}.get(kind)
        return ConfigError(setting.rule if name is None else f"must be {name}", value=value, place=setting.key)
    if isinstance(value, int | float) and not abs(value) <= sys.float_info.max:  # NaN too, and integers beyond it
        return ConfigError("must be a finite number", value=value, place=setting.key)
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:  # Flower says so, too, but not of which key
        return ConfigError(f"must be a whole number of at most {_MOST_BITS} bits", value=value, place=setting.key)
    if setting.holds is not None and not setting.holds(value):
        if setting.key_variable:
            remedy = f"give the key in {setting.key_variable}; the value may hold one and is not shown here"
            return ConfigError(setting.rule, place=setting.key, remedy=remedy)
        return ConfigError(setting.rule, value=value, place=setting.key)
    is_no_path = not setting.path or not value or (setting.key, value) == ("remote.cache", "off")
    meant_as_path = not is_no_path and (setting.key in _ALWAYS_PATHS or _PATH_LIKE.search(value))
    if meant_as_path and not Path(value).is_absolute():
        full = expanded(value).resolve()
        return ConfigError(
            "must be an absolute path, because Flower's processes run in other folders",
            value=value,
            place=setting.key,
            remedy=f"type {setting.key}='{full}'",
        )
    return None


def _build(cls: type, prefix: str, values: Mapping[str, Any]) -> Any:
    kinds = _kinds(cls)
    arguments = {}
    for field in dataclasses.fields(cls):
        key = prefix + field.name.replace("_", "-")
        nested = dataclasses.is_dataclass(kinds[field.name])
        arguments[field.name] = _build(kinds[field.name], f"{key}.", values) if nested else values[key]
    return cls(**arguments)
