"""A small and a large LM with one tokenizer, pre-trained on text that a user names.

For trying federated proxy-tuning on one's own kind of text where no pre-trained pair is at hand. Both models read the
same stream of tokens and as much of it. Seeded: the same text and recipe give the same tokenizer everywhere, and the
same models bit for bit on the same machine with the same number of threads.

The work is done in a folder beside the one that is asked for, which is whole or not there. A pair whose making was
ended, in whatever way, goes on from the last checkpoint.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fedpt_flwr.config import toml_of
from fedpt_flwr.corpus import (
    Source,
    hash_documents,
    hold_out,
    read_documents,
    repeated,
    repetitions,
    token_stream,
    train_tokenizer,
)
from fedpt_flwr.errors import ConfigError, DataError
from fedpt_flwr.pretrain import LlamaShape, ModelRecipe, PretrainConfig, make_model, stream_loss
from fedpt_flwr.runs import read_json, write_file, write_folder, write_json

ProgressCallback = Callable[[str, int, int, float | None], None]
"""Called with what is being done, how much of it is done, the total, and the loss of the step if it is one."""

NAMES = ("small", "large")
_CHECKPOINTS = 50  # of each model, at most
_CURVE_POINTS = 100  # of each loss curve


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRecipe:
    """How a pair is made.

    Attributes:
        small: Size of the small model, at most that of the large one.
        large: Size of the large model.
        vocab_size: Tokens of the tokenizer at most.
        window: Tokens that are read at once in training; what the models can be relied on to read.
        batch_size: Windows per step.
        num_tokens: Tokens that each model is trained on, repetitions included.
        learning_rate: Peak for a model of width 192; others get it times the square root of 192 / width.
        balance: How much a source's size counts for how often it is read; see ``corpus.repetitions``.
        seed: Of everything random.

    Raises:
        ConfigError: One is out of range; its place is the option of ``fedpt pretrain``.
    """

    small: LlamaShape
    large: LlamaShape
    vocab_size: int
    window: int
    batch_size: int
    num_tokens: int
    learning_rate: float = 2e-3
    balance: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        # Bytes and the two special tokens are always there.
        for name, least in (("vocab_size", 258), ("window", 2), ("batch_size", 1), ("num_tokens", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"must be at least {least}", value=getattr(self, name), place=_option(name))
        if self.window > min(self.small.max_positions, self.large.max_positions):
            raise ConfigError("must not exceed what the models can read", value=self.window, place="--window")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError("must be a finite number above 0", value=self.learning_rate, place="--learning-rate")
        if not 0 <= self.balance <= 1:
            raise ConfigError("must be from 0 to 1", value=self.balance, place="--balance")
        sizes = [self._weights(shape) for shape in (self.small, self.large)]
        if sizes[0] > sizes[1]:
            raise ConfigError(
                "the small model must not have more weights than the large one",
                value=tuple(sizes),
                place="--small and --large",
                remedy="exchange them, or give other sizes",
            )

    def _weights(self, shape: LlamaShape) -> int:
        """About as many as a model of this shape has."""
        return shape.hidden_size * (self.vocab_size + 12 * shape.num_layers * shape.hidden_size)

    def of(self, name: str) -> ModelRecipe:
        """How the model ``small`` or ``large`` is made."""
        shape: LlamaShape = getattr(self, name)
        steps = math.ceil(self.num_tokens / (self.window * self.batch_size))
        training = PretrainConfig(
            steps=steps,
            batch_size=self.batch_size,
            window=self.window,
            learning_rate=self.learning_rate * math.sqrt(192 / shape.hidden_size),
            warmup_steps=max(1, min(200, steps // 20)),
            seed=self.seed,
        )
        return ModelRecipe(shape=shape, training=training)


def _option(name: str) -> str:
    return "--tokens" if name == "num_tokens" else f"--{name.replace('_', '-')}"


def _recipe(small: tuple[int, int, int], large: tuple[int, int, int], **settings: Any) -> PairRecipe:
    def shape(width: int, layers: int, heads: int) -> LlamaShape:
        return LlamaShape(hidden_size=width, num_layers=layers, num_heads=heads)

    return PairRecipe(small=shape(*small), large=shape(*large), **settings)


RECIPES: Mapping[str, PairRecipe] = {
    "quick": _recipe((48, 2, 2), (160, 4, 4), vocab_size=2048, window=128, batch_size=16, num_tokens=2_000_000),
    "standard": _recipe((64, 3, 2), (224, 5, 4), vocab_size=4096, window=256, batch_size=8, num_tokens=5_000_000),
    "gpu": _recipe((256, 4, 4), (1024, 12, 16), vocab_size=16384, window=512, batch_size=64, num_tokens=400_000_000),
}
"""By name, from the fastest."""


def make_pair(
    out: Path,
    sources: Sequence[Source],
    recipe: PairRecipe,
    *,
    exclude: Sequence[str] = (),
    device: str = "cpu",
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Make a pair and put it into the folder ``out``: ``small``, ``large``, ``run-config.toml`` and ``pretrain.json``.

    What ends before the first checkpoint leaves nothing behind, so that it can be begun otherwise.

    Args:
        out: The folder; it must not be there, or be empty.
        sources: Where the text is.
        recipe: How the models are made.
        exclude: Names that are left out of folders; see ``corpus.read_documents``.
        device: Torch device that trains.
        progress: Told what is being done; or None.

    Returns:
        What ``pretrain.json`` holds.

    Raises:
        ConfigError: An unfinished pair is there that was begun otherwise; says what differs.
        DataError: A source cannot be read, or ``out`` holds something.
        RunError: Something cannot be written, or a checkpoint is damaged.
    """
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError("a pair needs a new or an empty folder", place=str(out), remedy="name another, or remove it")
    tell: ProgressCallback = progress or (lambda _what, _done, _total, _loss: None)
    work = out.with_name(f".{out.name}.unfinished")

    tell("reading text", 0, len(sources), None)
    documents = []
    for number, source in enumerate(sources, 1):
        documents.append(read_documents(source, exclude=exclude))
        tell("reading text", number, len(sources), None)
    _begin(work, recipe, sources, documents)
    try:
        described = _work(work, sources, recipe, documents, device, tell)
        write_folder(out, lambda folder: _fill(folder, work, out, described))
    except BaseException:
        if not any(work.glob("*.checkpoint")) and not any((work / f"{name}.json").exists() for name in NAMES):
            shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work)
    return described


def _work(
    work: Path,
    sources: Sequence[Source],
    recipe: PairRecipe,
    documents: Sequence[Sequence[str]],
    device: str,
    tell: ProgressCallback,
) -> dict[str, Any]:
    """Make the tokenizer and the models in the folder ``work``; what there is to say about them."""
    kept, held_out = zip(*(hold_out(part, seed=recipe.seed) for part in documents), strict=True)
    sizes = [sum(map(len, part)) for part in kept]
    times = repetitions(sizes, balance=recipe.balance)

    tell("training the tokenizer", 0, 1, None)
    tokenizer = _tokenizer(work, [document for part in kept for document in part], recipe)
    streams = [repeated(token_stream(tokenizer, part), often) for part, often in zip(kept, times, strict=True)]
    tokens = torch.cat(streams)
    tell("training the tokenizer", 1, 1, None)
    return {
        "recipe": asdict(recipe),
        "vocab_size": len(tokenizer),
        "stream_tokens": len(tokens),
        "sources": [
            {
                "path": str(source.path),
                "template": source.template,
                "documents": len(kept[place]),
                "held_out_documents": len(held_out[place]),
                "characters": sizes[place],
                "repetitions": round(times[place], 3),
                "share_of_tokens": round(len(streams[place]) / len(tokens), 4),
            }
            for place, source in enumerate(sources)
        ],
        "models": {name: _make(work, name, recipe, tokenizer, tokens, held_out, device, tell) for name in NAMES},
    }


def _begin(work: Path, recipe: PairRecipe, sources: Sequence[Source], documents: Sequence[Sequence[str]]) -> None:
    """Begin the work, or make sure that what was begun is the same."""
    plan = {
        "recipe": asdict(recipe),
        "sources": [
            [str(source.path), source.template, hash_documents(part)]
            for source, part in zip(sources, documents, strict=True)
        ],
    }
    path = work / "plan.json"
    if not path.exists():
        write_json(path, plan)
        return
    before = read_json(path)
    now = json.loads(json.dumps(plan))
    if before == now:
        return
    differing = [key for key in now["recipe"] if before.get("recipe", {}).get(key) != now["recipe"][key]]
    if before.get("sources") != now["sources"]:
        differing.append("the text")
    raise ConfigError(
        "an unfinished pair is there that was begun with another recipe or other text",
        value=", ".join(differing),
        place=str(work),
        remedy="give the same options to go on, or remove that folder to begin anew",
    )


def _tokenizer(work: Path, documents: Sequence[str], recipe: PairRecipe) -> PreTrainedTokenizerFast:
    folder = work / "tokenizer"
    if not folder.exists():
        longest = min(recipe.small.max_positions, recipe.large.max_positions)
        made = train_tokenizer(documents, vocab_size=recipe.vocab_size, max_length=longest)
        write_folder(folder, made.save_pretrained)
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer


def _make(
    work: Path,
    name: str,
    recipe: PairRecipe,
    tokenizer: PreTrainedTokenizerFast,
    tokens: Tensor,
    held_out: Sequence[Sequence[str]],
    device: str,
    tell: ProgressCallback,
) -> dict[str, Any]:
    """Make one model, unless it is there; what there is to say about it."""
    described = work / f"{name}.json"
    if described.exists():
        found: dict[str, Any] = read_json(described)
        return found
    model_recipe, checkpoint = recipe.of(name), work / f"{name}.checkpoint"
    steps = model_recipe.training.steps
    model, losses = make_model(
        model_recipe,
        tokenizer,
        tokens,
        device=device,
        progress=lambda done, loss: tell(f"pre-training the {name} model", done, steps, loss),
        checkpoint=checkpoint,
        checkpoint_every=max(1, steps // _CHECKPOINTS),
    )
    write_folder(work / name, lambda folder: _save(model, tokenizer, folder))
    row = {
        "parameters": model.num_parameters(),
        "tokens_seen": model_recipe.training.tokens_seen,
        "training": asdict(model_recipe.training),
        "loss_curve": loss_curve(losses),
        "held_out": [held_out_loss(model, tokenizer, part, window=recipe.window) for part in held_out],
    }
    write_json(described, row)
    checkpoint.unlink(missing_ok=True)
    return row


def held_out_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], *, window: int
) -> dict[str, float]:
    """What documents cost a model: ``nats_per_token``, and ``bits_per_byte``, which any tokenizer may be compared in.

    Empty where there are no documents.
    """
    tokens = token_stream(tokenizer, documents)
    if len(tokens) < 2:
        return {}
    loss = stream_loss(model, tokens, window=window)
    num_bytes = sum(len(document.encode()) for document in documents)
    bits = loss * (len(tokens) - 1) / math.log(2)
    return {"nats_per_token": round(loss, 4), "bits_per_byte": round(bits / num_bytes, 4)}


def loss_curve(losses: Sequence[float]) -> list[dict[str, float]]:
    """The losses of all steps as the means of a hundred stretches at most: ``step`` (its last) and ``loss``."""
    stretch = math.ceil(len(losses) / _CURVE_POINTS)
    parts = [losses[begin : begin + stretch] for begin in range(0, len(losses), stretch)]
    ends = [min((number + 1) * stretch, len(losses)) for number in range(len(parts))]
    return [{"step": end, "loss": round(sum(part) / len(part), 4)} for end, part in zip(ends, parts, strict=True)]


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _fill(folder: Path, work: Path, out: Path, described: Mapping[str, Any]) -> None:
    """Put into the folder ``folder``, which will be called ``out``, what belongs to a pair."""
    for name in NAMES:
        shutil.copytree(work / name, folder / name)
    write_json(folder / "pretrain.json", described)
    write_file(folder / "run-config.toml", toml_of({f"model.{name}": str(out / name) for name in NAMES}).encode())
