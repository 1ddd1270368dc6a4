"""``fedpt demo-world``, ``split`` and ``pretrain``: data and models to run on."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedpt_flwr.cli.configs import given_config
from fedpt_flwr.cli.console import note, say
from fedpt_flwr.cli.options import listed
from fedpt_flwr.cli.progress import stage_progress, training_progress
from fedpt_flwr.errors import ConfigError, naming
from fedpt_flwr.paths import expanded, is_there

if TYPE_CHECKING:
    from fedpt_flwr.config import DataConfig


def demo_world(
    seed: Annotated[int, typer.Option(min=0, help="Another seed is another world.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder to make; by default demo-world-SEED in this folder.")] = None,
) -> None:
    """Make a demo world: texts, tokenizer, and a pair of small LMs pre-trained on them.

    Takes some minutes on one CPU core. The folder gets a run-config.toml; tune on it with
    `flwr run . --run-config FOLDER/run-config.toml`.
    """
    from fedpt_flwr.demo_world import make_demo_world

    folder = (out or Path(f"demo-world-{seed}")).absolute()
    with stage_progress() as progress:
        make_demo_world(folder, seed, progress=progress)
    say(f"The world of seed {seed} is in {folder}")
    say(f"Tune on it with: flwr run . --stream --run-config {folder / 'run-config.toml'}")


def split(
    train: Annotated[str, typer.Option(help="File, folder or hub id of the records that are divided.")],
    out: Annotated[Path, typer.Option(help="Folder to make, with a file for each part.")],
    config: Annotated[
        Path | None,
        typer.Option(help="Run config of the task, such as examples/medquad/run-config.toml; it is written along."),
    ] = None,
    test: Annotated[str | None, typer.Option(help="Test data that is there already.")] = None,
    validation: Annotated[str | None, typer.Option(help="Validation data that is there already.")] = None,
    public: Annotated[str | None, typer.Option(help="Public data that is there already.")] = None,
    test_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Else this share of the keys is for test.")] = 0.0,
    validation_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="The same for validation.")] = 0.05,
    public_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="The same for what is public.")] = 0.0,
    public_group: Annotated[
        list[str] | None, typer.Option(help="A group that is public as a whole; repeat it for more.")
    ] = None,
    key: Annotated[
        str,
        typer.Option(help="Fields whose text decides where a record goes; by default those of the config's prompts."),
    ] = "",
    group_field: Annotated[str, typer.Option(help="Field of the groups; by default the config's.")] = "",
    pair: Annotated[
        Path | None, typer.Option(help="Folder with `small` and `large`, as of `fedpt pretrain`; it may come later.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed is another division.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older division in OUT.")] = False,
) -> None:
    """Divide a data set into public, train, validation and test, the same way every time.

    Where a record goes is decided by the text of its prompt and the seed, so records with one prompt stay together and
    none of them is in two parts. OUT gets `train.jsonl` (for the devices), `validation.jsonl`, `test.jsonl`,
    `public.jsonl`, `split.json` with counts and hashes, and a complete `run-config.toml` for
    `flwr run . --run-config`.

    Nine web sites, one of them public: `fedpt split --config examples/medquad/run-config.toml
    --train /data/medquad/train.jsonl --test /data/medquad/test.jsonl --public-group GARD --pair /tmp/pair
    --out /tmp/medquad`
    """
    from fedpt_flwr import split as splitting
    from fedpt_flwr.config import parse_run_config

    given = _task_config(config) if config else {}
    data = parse_run_config(given).data
    fields, contexts = (listed(key), []) if key or not config else prompt_fields(data)
    if not fields:
        raise ConfigError("say which fields decide where a record goes", place="--key", remedy="or give --config")
    files = {"test": test, "validation": validation, "public": public}
    shares = {"test": test_share, "validation": 0.0 if validation else validation_share, "public": public_share}
    plan = splitting.SplitPlan(
        train=_absolute(train),
        given={part: _absolute(source) for part, source in files.items() if source},
        shares={part: share for part, share in shares.items() if share},
        key_fields=fields,
        context_fields=contexts,
        group_field=group_field or (data.group_field if config else ""),
        public_groups=public_group or (),
        seed=seed,
    )
    if pair is not None:
        given |= {f"model.{name}": str(pair.absolute() / name) for name in ("small", "large")}
    made = splitting.write_division(out, plan, splitting.divide(plan), run_config=given, overwrite=overwrite)
    for part, row in made["parts"].items():
        groups = ", ".join(f"{name} {count}" for name, count in list(row.get("groups", {}).items())[:12])
        left_out = f", {row['dropped']} left out" if row["dropped"] else ""
        line = f"{part:<10} {row['records']:>7} records{left_out}{': ' if groups else ''}{groups}"
        say(line)
    if "public" not in made["parts"]:
        say('Nothing is public to distil on, so the run config has distillation.mode = "off"')
    said = f"Run with: flwr run . --stream --run-config {shlex.quote(str(out.absolute() / 'run-config.toml'))}"
    say(said)


def pretrain(
    text: Annotated[
        list[str],
        typer.Option(
            help="Text to learn: a text file, a folder of text files (.txt .md .rst .py .html .tex), or a data file "
            "with a template, `PATH::{question}\\n{answer}` (by default the field `text`). Repeat it for more."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to make; a pair that was begun there goes on.")],
    recipe: Annotated[
        str,
        typer.Option(help="`quick`, `standard` or `gpu`: sizes and number of tokens; the options below change them."),
    ] = "standard",
    small: Annotated[str, typer.Option(help="Small model as WIDTHxLAYERSxHEADS, such as 64x3x2.")] = "",
    large: Annotated[str, typer.Option(help="Large model, the same way.")] = "",
    tokens: Annotated[float | None, typer.Option(help="Million tokens that each model learns from.")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=258, help="Tokens of the tokenizer.")] = None,
    window: Annotated[int | None, typer.Option(min=2, max=512, help="Tokens that are read at once.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Windows per step.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(min=0.0, help="Peak for width 192; wider models get less, by the square root.")
    ] = None,
    balance: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="How often a text is read: 1 in proportion to its size, 0 all alike; by default 0.5."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Files and folders to leave out by name, such as `test*`; repeatable.")
    ] = None,
    threads: Annotated[int, typer.Option(min=0, max=1024, help="CPU threads; 0: as many as there are cores.")] = 0,
    device: Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda`, `cuda:1`, `mps`.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of the weights and of the order of the text.")] = 0,
) -> None:
    r"""Pre-train a small and a large LM with one tokenizer on your own text.

    For trying the method where no pre-trained pair is at hand. OUT gets `small` and `large` as any transformers model,
    `pretrain.json` (loss curves, losses on held-out text) and a run-config.toml that points to both. Ended in whatever
    way, the same command goes on.

    `fedpt pretrain --text /usr/lib/python3.11 --exclude 'test*'
    --text '/tmp/medquad/public.jsonl::{question}\n{answer}' --out /tmp/pair`
    """
    from dataclasses import replace

    from transformers import logging as transformers_logging

    from fedpt_flwr.corpus import Source
    from fedpt_flwr.models import cpu_threads, pick_device
    from fedpt_flwr.pair import RECIPES, make_pair

    if recipe not in RECIPES:
        raise ConfigError(f"must be one of {', '.join(RECIPES)}", value=recipe, place="--recipe")
    changes: dict[str, Any] = {
        "small": _shape(small, "--small"),
        "large": _shape(large, "--large"),
        "num_tokens": None if tokens is None else _num_tokens(tokens),
        "vocab_size": vocab_size,
        "window": window,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "balance": balance,
        "seed": seed,
    }
    chosen = replace(RECIPES[recipe], **{name: value for name, value in changes.items() if value is not None})
    with naming("--text"):
        sources = list(dict.fromkeys(map(Source.parse, text)))  # a text that is named twice is one text
    transformers_logging.disable_progress_bar()
    try:
        with training_progress() as progress, cpu_threads(threads or os.cpu_count() or 1):
            made = make_pair(
                out, sources, chosen, exclude=exclude or (), device=str(pick_device(device)), progress=progress
            )
    except KeyboardInterrupt:
        note("Ended; the same command goes on")
        raise typer.Exit(130) from None
    for line in _pair_lines(made):
        say(line)
    say(f"The pair is in {out.absolute()}")


def prompt_fields(data: DataConfig) -> tuple[list[str], list[str]]:
    """The fields of a record's prompt, and those that it may lack; none where its shape does not say them."""
    from fedpt_flwr.prompts import Template
    from fedpt_flwr.shapes import AutoShape, ChatShape, FieldsShape, make_shape

    if data.format == "chat":
        return [], []
    shape = make_shape(data.format, template=Template(data.template), answer_field=data.answer_field, tokenizer=None)
    if isinstance(shape, AutoShape | ChatShape):
        return [], []
    contexts = list(shape.contexts) if isinstance(shape, FieldsShape) else []
    return ["text"] if shape.name == "text" else list(shape.request.fields), contexts


def _absolute(source: str) -> str:
    """A data source as a run config wants it: a path that is there becomes absolute, a hub id stays."""
    path = expanded(source)
    return str(path.absolute()) if is_there(path) else source


def _task_config(path: Path) -> dict[str, Any]:
    if path.suffix != ".toml" or not is_there(path):
        raise ConfigError(
            "must be a TOML file that is there", value=str(path), place="--config", remedy="check the path"
        )
    return given_config([str(path)], place="--config")


def _num_tokens(millions: float) -> int:
    """Millions of tokens as their number, which is at least one."""
    number = millions * 1e6
    if not 1 <= number < math.inf:
        raise ConfigError(
            "must be a finite number of millions, at least 0.000001",
            value=millions,
            place="--tokens",
            remedy="such as 5",
        )
    return round(number)


def _shape(text: str, place: str) -> Any:
    """WIDTHxLAYERSxHEADS as the size of a model; None for an empty text."""
    from fedpt_flwr.pretrain import LlamaShape

    if not text:
        return None
    numbers = text.lower().split("x")
    if len(numbers) != 3 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise ConfigError("must be WIDTHxLAYERSxHEADS", value=text, place=place, remedy="such as 64x3x2")
    width, layers, heads = map(int, numbers)
    with naming(place):
        return LlamaShape(hidden_size=width, num_layers=layers, num_heads=heads)


def _pair_lines(made: Mapping[str, Any]) -> list[str]:
    """What was made, for people: text, models, losses."""
    lines = [
        f"{row['path']}: {row['documents']:,} documents, {row['characters'] / 1e6:.1f} million characters, "
        f"{100 * row['share_of_tokens']:.0f} % of what was read"
        for row in made["sources"]
    ]
    for name, model in made["models"].items():
        curve = model["loss_curve"]
        lines.append(
            f"{name}: {model['parameters']:,} parameters, {model['tokens_seen'] / 1e6:.1f} million tokens, loss "
            f"{curve[0]['loss']:.2f} to {curve[-1]['loss']:.2f} nats per token"
        )
        for row, held_out in zip(made["sources"], model["held_out"], strict=True):
            if held_out:
                lines.append(f"  {held_out['bits_per_byte']:.3f} bits per byte of held-out text of {row['path']}")
    return lines
