"""Options that several commands share, and lists within an option."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import typer

from fedpt_flwr.errors import ConfigError
from fedpt_flwr.paths import is_folder

Run = Annotated[
    str, typer.Argument(metavar="[RUN]", help="A run id, a unique beginning of one, a folder, or `latest`.")
]
RunOption = Annotated[str, typer.Option("--run", help="A run id, a unique beginning of one, a folder, or `latest`.")]
Alpha = Annotated[
    float | None,
    typer.Option(min=-10, max=10, help="Strength of the shift; by default the run's. 0: the large model."),
]
Plausibility = Annotated[
    float | None, typer.Option(help="Mask of tokens that the tuned model finds implausible; by default the run's.")
]
Large = Annotated[str | None, typer.Option(help="Where the large model lies now, if not where the run found it.")]
LargeUrl = Annotated[
    str | None,
    typer.Option(
        help="Address of an OpenAI-compatible service to ask for the large model's log-probabilities, instead of "
        "loading it; its key is read from FEDPT_LARGE_API_KEY."
    ),
]
LargeName = Annotated[str | None, typer.Option(help="The large model's name there, if there are several.")]
LargeDeviceMap = Annotated[
    str | None,
    typer.Option(
        help="How the large model is divided among this machine's devices, such as `auto`, if not as the run says."
    ),
]
Device = Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda`, `cuda:1`, `mps`.")]
Prepare = Annotated[
    bool,
    typer.Option(
        " /--no-prepare", show_default=False, help="Leave the weights as they are loaded, not laid out for decoding."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("-c", "--run-config", help='As for `flwr run`: "key=value key2=value2", or a TOML file.'),
]
NumDevices = Annotated[int, typer.Option("--devices", min=1, help="Devices of every federation.")]
Jobs = Annotated[int, typer.Option(min=0, help="Federations at once; 0: as many as the CPUs allow.")]
App = Annotated[Path, typer.Option("--app", help="Folder of the app, with its pyproject.toml.")]
_Number = TypeVar("_Number", int, float)


def check_json_file(path: Path | None) -> None:
    """Refuse a file for results that could not be written in the end.

    Raises:
        ConfigError: Its folder is not there, or it is one.
    """
    if path is None:
        return
    if not is_folder(path.absolute().parent):
        raise ConfigError(
            "there is no such folder", value=str(path.parent), place="--json", remedy="make it, or name another"
        )
    if is_folder(path):
        raise ConfigError("is a folder", value=str(path), place="--json", remedy="name a file in it")


def listed(text: str) -> list[str]:
    """The parts of a list that is separated by commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str, kind: type[_Number], place: str) -> list[_Number]:
    """The same of numbers; ``place`` is the option."""
    try:
        return [kind(part) for part in listed(text)]
    except ValueError as error:
        raise ConfigError("must be numbers separated by commas", value=text, place=place) from error
