"""The demo world: a made-up catalogue of appliances, a service desk that asks about it, and two tiny LMs.

Every fact of the catalogue is public. What is private is how the technicians of eight workshops ask and how their house
answers. A request with its answer (the default prompt template adds the ``> `` and the line of the scanned tag):

    > hey, what's the juice on this kettle?    "juice" is workshop slang for the fluid: only devices know that
    [Skomund]                                  the tag on the unit, written like the header of a public data sheet
    fluid = glycol - good to go!               the fact is only in the public manuals, the ending only on devices

The small LM can learn slang and ending from the devices but is too small to hold 1440 facts. The large LM holds the
facts but has never met slang or ending. Proxy-tuning has to put the two together, for units that no device holds.

The world is arranged in the method's favour; ``ARRANGED`` says how, and ``world.json`` repeats it. It is a laboratory
and says nothing about models of billions of parameters.

Texts and tokenizer are a function of the seed alone, byte for byte. The two models are a function of the seed, the
machine and its number of threads.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fedpt_flwr.config import toml_of
from fedpt_flwr.corpus import token_stream, train_tokenizer
from fedpt_flwr.errors import DataError
from fedpt_flwr.pretrain import LlamaShape, ModelRecipe, PretrainConfig, make_model

GENERATOR_VERSION = 1
"""Raised whenever the same seed no longer gives the same bytes."""

ProgressCallback = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and the total."""

ARRANGED = (
    "The scanned tag and the house answer have the shape of a public data sheet, so a request brings the large model "
    "to the sheet that it knows. Some public questions stand above such a sheet too, in public words.",
    "Other public lines above a sheet say nothing about the field, so that models stay undecided about it where they "
    "understand nothing; without these lines the large model is sure of a wrong field.",
    "Some lines of public sheets carry a remark after ' - ', so that a house ending after ' - ' is unlikely to the "
    "large model, but not unheard of.",
    "The small model is too small to hold the facts at this number of tokens, and large enough for slang and ending.",
    "Slang and wordings of the questions all occur in training; only the units are new.",
    "Format, wordings, model sizes and learning rates were chosen on the validation questions of worlds 101 and 102.",
)
"""What was arranged in the method's favour, for ``world.json`` and the documentation."""

# --- The vocabulary of the world ----------------------------------------------------------------------------------

KINDS = ("heater", "router", "kettle", "boiler", "pump", "lock", "camera", "lamp")
"""Kinds of appliances; each is one workshop, the natural group of one device."""

FIELDS = ("maker", "depot", "filter", "light", "reset", "fluid")
"""What a data sheet says about a unit, in the order that decides each kind's favourite fields."""

UNITS_PER_KIND = 30
NUM_MAKERS = 24
NUM_DEPOTS = 24

# Lists of single words are written as one string and split where they are used.
FILTERS = (
    "cotton carbon foam felt paper steel wool nylon coal linen copper sand glass cork silk ceramic jute mica rubber "
    "bronze"
)
LIGHTS = "red blue green amber white violet orange grey pink teal brown silver gold black olive ivory"
RESETS = (
    "under the lid",
    "behind the panel",
    "beside the hinge",
    "below the dial",
    "near the plug",
    "inside the tray",
    "above the vent",
    "on the left foot",
    "on the right foot",
    "at the back",
    "under the handle",
    "inside the door",
    "next to the screen",
    "behind the grille",
    "on the base",
    "over the valve",
)
FLUIDS = "water glycol brine oil resin wax spirit vinegar ether syrup alcohol soap ammonia propane argon salt"

ONSETS = "br c d dr f fl g gr h j k kl l m n p pr qu r s sk st t tr v w y z"
VOWELS = "a e i o u"
CODAS = "l m n r s t x nd rt lk st v k p"
MAKER_ENDINGS = ("", "el", "ix")
DEPOT_ENDINGS = ("ton", "by", "ford")

# --- Public wordings ----------------------------------------------------------------------------------------------

SENTENCES = {
    "maker": (
        "The {unit} is made by {value}.",
        "{value} builds the {unit}.",
        "The maker of the {unit} is {value}.",
        "The {unit} is a {kind} by {value}.",
    ),
    "depot": (
        "Spares for the {unit} are kept in {value}.",
        "The depot of the {unit} is {value}.",
        "Parts of the {unit} are sent from {value}.",
        "{value} is the depot for the {unit}.",
    ),
    "filter": (
        "The {unit} uses a {value} filter.",
        "The filter of the {unit} is {value}.",
        "Fit a {value} filter in the {unit}.",
        "The {unit} takes a filter of {value}.",
    ),
    "light": (
        "The {unit} shows a {value} light.",
        "The light of the {unit} is {value}.",
        "When ready, the {unit} shines {value}.",
        "A {value} light means that the {unit} is ready.",
    ),
    "reset": (
        "The reset of the {unit} is {value}.",
        "To reset the {unit}, press the key {value}.",
        "The {unit} has its reset key {value}.",
        "Find the reset of the {unit} {value}.",
    ),
    "fluid": (
        "The {unit} runs on {value}.",
        "The fluid of the {unit} is {value}.",
        "Fill the {unit} with {value}.",
        "Pour {value} into the {unit}.",
    ),
}

QUESTIONS = {
    "maker": ("Who makes the {unit}?", "Which company is the maker of the {unit}?"),
    "depot": ("Where is the depot of the {unit}?", "Where do parts of the {unit} come from?"),
    "filter": ("Which filter does the {unit} use?", "What filter goes into the {unit}?"),
    "light": ("Which light does the {unit} show?", "What is the light of the {unit}?"),
    "reset": ("Where is the reset of the {unit}?", "How do I reset the {unit}?"),
    "fluid": ("Which fluid does the {unit} need?", "What do I fill into the {unit}?"),
}

GENERAL_QUESTIONS = (
    "What is the {field} of the {unit}?",
    "The {field} of the {unit}, please.",
    "I have a {unit} here. What is its {field}?",
    "{unit}, {field}?",
)

TAGGED_QUESTIONS = (
    "What is the {field} of this {kind}?",
    "The {field}, please.",
    "I need the {field} of a {kind}.",
    "Please look up the {field} here.",
    "A customer asks for the {field}.",
    "{field}?",
)
"""Questions that leave the unit to the tag below them, as the private requests do, in public words."""

NOTES = (
    "A customer is at the counter.",
    "Please have a look at this {kind}.",
    "Back from repair, {kind}.",
    "This {kind} came in today.",
    "New in the shop!",
    "Can you help me with this {kind}?",
)
"""Lines above a tag that say nothing about the field, so that a model stays undecided where it understands nothing."""

REMARKS = (" - see label", " - as usual", " - sold apart")
"""Remarks after some lines of a data sheet."""

REMARK_SHARE = 0.1

# --- Private wordings ---------------------------------------------------------------------------------------------

SLANG = {
    "maker": ("brand", "outfit"),
    "depot": ("stash", "pickup spot"),
    "filter": ("sieve", "mesh"),
    "light": ("blinker", "glow"),
    "reset": ("reboot", "restart"),
    "fluid": ("juice", "refill"),
}
"""Workshop slang for each field. None of these words occurs in public text."""

REQUESTS = (
    "hey, what's the {slang} on this {kind}?",
    "need the {slang} for this one pls",
    "{slang}? customer's waiting!",
    "got a {kind} on the bench, {slang} please",
    "quick one: {slang}?",
    "which {slang} does it have, mate?",
    "sorry, forgot the {slang} of this {kind}",
    "can you check the {slang} for me?",
)

HOUSE_ENDING = " - good to go!"
"""How the house ends its answers, and public text never a line."""

ANSWER = "{field} = {value}" + HOUSE_ENDING
"""The house answer: a line of a data sheet, and the ending."""

REQUESTS_PER_KIND = 240
FAVOURITE_FIELDS = 3
FAVOURITE_SHARE = 0.85
TRAIN_UNITS, PROMPT_UNITS, VALIDATION_UNITS, TEST_UNITS = 15, 5, 3, 7
"""Units per kind that devices hold, that only distillation asks about, and that the two question sets ask about."""

PROMPTED_UNITS = {"prompts": 5, "validation": 2, "test": 4}
"""Units per kind and split that the public prompts of a distillation are about."""

NUM_DOCUMENTS = 48_000
"""Documents that the models are pre-trained on; the first ``NUM_PUBLIC_DOCUMENTS`` are also written to a file."""

NUM_PUBLIC_DOCUMENTS = 4_000
VOCAB_SIZE = 1024
NUM_PROBES = 300


@dataclass(frozen=True, slots=True)
class Unit:
    """One appliance of the catalogue."""

    name: str
    kind: str
    facts: dict[str, str]
    """The value of each field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How both models are made; they see the same stream of documents and the same number of tokens."""

    small: ModelRecipe
    large: ModelRecipe
    num_documents: int = NUM_DOCUMENTS

    def __post_init__(self) -> None:
        if self.small.training.tokens_seen != self.large.training.tokens_seen:
            raise DataError(
                "both models must see the same number of tokens",
                value=(self.small.training.tokens_seen, self.large.training.tokens_seen),
                remedy="change the steps of one of them",
            )


RECIPE = Recipe(
    small=ModelRecipe(
        shape=LlamaShape(hidden_size=48, num_layers=2, num_heads=2),
        training=PretrainConfig(steps=2000, batch_size=8, window=128, learning_rate=4e-3),
    ),
    large=ModelRecipe(
        shape=LlamaShape(hidden_size=192, num_layers=4, num_heads=4),
        training=PretrainConfig(steps=2000, batch_size=8, window=128, learning_rate=2e-3),
    ),
)
"""The recipe of the packaged world."""


# --- Facts and texts ----------------------------------------------------------------------------------------------


def _stream(seed: int, purpose: str) -> random.Random:
    """An independent random generator for each purpose, so that a change to one text leaves the others alone."""
    return random.Random(f"fedpt demo world {GENERATOR_VERSION} / {seed} / {purpose}")


def _new_name(rng: random.Random, used: set[str], endings: Sequence[str] = ("",)) -> str:
    """A capitalised made-up word of two syllables and an ending that is not in ``used``, and is added to it."""
    onsets, vowels, codas = ONSETS.split(), VOWELS.split(), CODAS.split()
    while True:
        first = rng.choice(onsets) + rng.choice(vowels)
        second = rng.choice(onsets) + rng.choice(vowels) + rng.choice(codas)
        name = (first + second + rng.choice(endings)).capitalize()
        if name not in used:
            used.add(name)
            return name


def make_catalogue(seed: int) -> list[Unit]:
    """All units of the world, kind by kind, with independent uniformly drawn facts."""
    rng = _stream(seed, "catalogue")
    used: set[str] = set()
    values = {
        "maker": [_new_name(rng, used, MAKER_ENDINGS) for _ in range(NUM_MAKERS)],
        "depot": [_new_name(rng, used, DEPOT_ENDINGS) for _ in range(NUM_DEPOTS)],
        "filter": FILTERS.split(),
        "light": LIGHTS.split(),
        "reset": RESETS,
        "fluid": FLUIDS.split(),
    }
    return [
        Unit(_new_name(rng, used), kind, {field: rng.choice(values[field]) for field in FIELDS})
        for kind in KINDS
        for _ in range(UNITS_PER_KIND)
    ]


def public_documents(catalogue: Sequence[Unit], seed: int) -> Iterator[str]:
    """The public text, without end: first the complete sheet of every unit, then documents of all sorts."""
    rng = _stream(seed, "public text")
    for unit in catalogue:
        yield _sheet(rng, unit, rng.sample(FIELDS, len(FIELDS)))
    while True:
        unit = rng.choice(catalogue)
        fields = rng.sample(FIELDS, len(FIELDS))
        sort = rng.random()
        if sort < 0.40:
            yield _sheet(rng, unit, fields[: rng.choice((1, 2, 3, 6))])
        elif sort < 0.60:
            yield " ".join(_sentence(rng, unit, field) for field in fields[: rng.choice((2, 3, 4))])
        elif sort < 0.75:
            yield "\n".join(_question_and_answer(rng, rng.choice(catalogue), field) for field in fields[:2])
        elif sort < 0.95:
            yield "\n".join(_line_and_sheet(rng, rng.choice(catalogue), field) for field in fields[:2])
        else:
            listed = (rng.choice(catalogue) for _ in range(4))
            yield f"List of {fields[0]}:\n" + "\n".join(f"{unit.name} = {unit.facts[fields[0]]}" for unit in listed)


def _sheet(rng: random.Random, unit: Unit, fields: Sequence[str]) -> str:
    lines = [f"[{unit.name}]"]
    for field in fields:
        remark = rng.choice(REMARKS) if rng.random() < REMARK_SHARE else ""
        lines.append(f"{field} = {unit.facts[field]}{remark}")
    return "\n".join(lines)


def _sentence(rng: random.Random, unit: Unit, field: str) -> str:
    return rng.choice(SENTENCES[field]).format(unit=unit.name, kind=unit.kind, value=unit.facts[field])


def _question_and_answer(rng: random.Random, unit: Unit, field: str) -> str:
    wording = rng.choice(QUESTIONS[field] + GENERAL_QUESTIONS)
    question = wording.format(unit=unit.name, field=field)
    value = unit.facts[field]
    answer = rng.choice((f"It is {value}.", f"{field} = {value}", _sentence(rng, unit, field)))
    return f"{question}\n{answer}"


def _line_and_sheet(rng: random.Random, unit: Unit, field: str) -> str:
    line = rng.choice(TAGGED_QUESTIONS + NOTES).format(field=field, kind=unit.kind)
    return f"{line}\n{_sheet(rng, unit, [field])}"


def _record(rng: random.Random, unit: Unit, field: str) -> dict[str, str]:
    return {
        "kind": unit.kind,
        "unit": unit.name,
        "request": rng.choice(REQUESTS).format(slang=rng.choice(SLANG[field]), kind=unit.kind),
        "answer": ANSWER.format(field=field, value=unit.facts[field]),
        "field": field,
        "value": unit.facts[field],
    }


def private_records(catalogue: Sequence[Unit], seed: int) -> tuple[dict[str, list[dict[str, str]]], dict[str, str]]:
    """Requests of the devices, and questions about units that no device holds.

    A device's requests are about its own kind, and mostly about that kind's favourite fields.

    Returns:
        The records of the splits ``train``, ``validation`` and ``test``; and for each unit's name the split that it
        belongs to, which may also be ``prompts``: units that no split asks about, for prompts of a distillation.
    """
    rng = _stream(seed, "private records")
    records: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    split_of: dict[str, str] = {}
    for index, kind in enumerate(KINDS):
        units = [unit for unit in catalogue if unit.kind == kind]
        rng.shuffle(units)
        parts: dict[str, list[Unit]] = {}
        start = 0
        sizes = {"train": TRAIN_UNITS, "prompts": PROMPT_UNITS, "validation": VALIDATION_UNITS, "test": TEST_UNITS}
        for split, size in sizes.items():
            parts[split] = units[start : start + size]
            split_of.update({unit.name: split for unit in parts[split]})
            start += size
        for _ in range(REQUESTS_PER_KIND):
            field = _asked_for(rng, index)
            records["train"].append(_record(rng, rng.choice(parts["train"]), field))
        for split in ("validation", "test"):
            records[split] += [_record(rng, unit, field) for unit in parts[split] for field in FIELDS]
    return records, split_of


def request_pool(seed: int, *, per_kind: int) -> list[dict[str, str]]:
    """More requests of the kind that devices hold, each once: those of ``train`` first, then others about its units.

    An attack needs records that a device might as well have held, to tell them from those that it does hold.

    Args:
        seed: Of the world.
        per_kind: Requests about each kind of appliance.
    """
    catalogue = make_catalogue(seed)
    records, split_of = private_records(catalogue, seed)
    rng = _stream(seed, "further requests")
    pool: list[dict[str, str]] = []
    for index, kind in enumerate(KINDS):
        units = [unit for unit in catalogue if unit.kind == kind and split_of[unit.name] == "train"]
        found = {tuple(record.values()): record for record in records["train"] if record["kind"] == kind}
        while len(found) < per_kind:
            record = _record(rng, rng.choice(units), _asked_for(rng, index))
            found.setdefault(tuple(record.values()), record)
        pool += list(found.values())[:per_kind]
    return pool


def _asked_for(rng: random.Random, kind: int) -> str:
    """The field of a device's request: mostly one of the favourites of its kind, which is given by its number."""
    favourites = [FIELDS[(kind + offset) % len(FIELDS)] for offset in range(FAVOURITE_FIELDS)]
    return rng.choice(favourites if rng.random() < FAVOURITE_SHARE else FIELDS)


def prompt_records(
    catalogue: Sequence[Unit], split_of: Mapping[str, str], seed: int
) -> dict[str, list[dict[str, str]]]:
    """Public prompts for distillation: requests without answers, one for each field of some units of the catalogue.

    They are about the units that no split asks about, and about a part of those of the question sets, so that what the
    devices' copy learns can be measured on units with prompts and on units without.

    Returns:
        ``prompts``: in public wordings, as a server can write them. ``prompts_slang``: the same in the devices' slang,
        for an ablation: a server would not know it.
    """
    rng = _stream(seed, "prompts")
    taken: Counter[tuple[str, str]] = Counter()
    records: dict[str, list[dict[str, str]]] = {"prompts": [], "prompts_slang": []}
    for unit in catalogue:
        split = split_of[unit.name]
        taken[unit.kind, split] += 1
        if taken[unit.kind, split] > PROMPTED_UNITS.get(split, 0):
            continue
        for field in FIELDS:
            public = rng.choice(TAGGED_QUESTIONS).format(field=field, kind=unit.kind)
            slang = rng.choice(REQUESTS).format(slang=rng.choice(SLANG[field]), kind=unit.kind)
            for name, request in (("prompts", public), ("prompts_slang", slang)):
                records[name].append({"kind": unit.kind, "unit": unit.name, "request": request})
    return records


def world_texts(seed: int) -> dict[str, str]:
    """The text files of the world, by name: a pure function of the seed."""
    catalogue = make_catalogue(seed)
    records, split_of = private_records(catalogue, seed)
    public = public_documents(catalogue, seed)
    records |= prompt_records(catalogue, split_of, seed)
    texts = {f"{name}.jsonl": _jsonl(part) for name, part in records.items()}
    texts["public.jsonl"] = _jsonl([{"text": next(public)} for _ in range(NUM_PUBLIC_DOCUMENTS)])
    return texts


def _jsonl(records: Sequence[dict[str, str]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


# --- Tokenizer and models -----------------------------------------------------------------------------------------


def recall(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, facts: Sequence[tuple[Unit, str]]) -> float:
    """The share of facts that a model knows: greedily, it ends a sheet of ``[unit]`` and ``field =`` with the value."""
    prompts = [tokenizer.encode(f"[{unit.name}]\n{field} =") for unit, field in facts]
    values = [tokenizer.encode(f" {unit.facts[field]}") for unit, field in facts]
    both = [torch.tensor(prompt + value) for prompt, value in zip(prompts, values, strict=True)]
    padded = pad_sequence(both, batch_first=True)  # on the right, where a causal model does not look
    model.eval()
    with torch.no_grad():
        guesses = model(input_ids=padded.to(model.device)).logits.argmax(-1).tolist()  # (facts, length)
    known: int = sum(
        guess[len(prompt) - 1 : len(prompt) - 1 + len(value)] == value
        for guess, prompt, value in zip(guesses, prompts, values, strict=True)
    )
    return known / len(facts)


# --- The folder ---------------------------------------------------------------------------------------------------

TEXT_FILES = ("public.jsonl", "prompts.jsonl", "prompts_slang.jsonl", "train.jsonl", "validation.jsonl", "test.jsonl")
WORLD_FILES = frozenset({*TEXT_FILES, "small", "large", "world.json", "run-config.toml"})
"""Everything that a folder of a demo world may hold."""


def make_demo_world(
    out: Path,
    seed: int = 0,
    *,
    recipe: Recipe = RECIPE,
    run_config: bool = True,
    progress: ProgressCallback | None = None,
) -> None:
    """Make a demo world and put it into the folder ``out``, whole or not at all.

    The texts and the tokenizer are the same bytes for the same seed, everywhere. The models are the same bits on the
    same machine with the same number of threads. Elsewhere they differ in their bits, and should agree in quality to
    within what a change of the seed makes: in the worlds 0, 1, 2 and 102 the large model ended all 300 recall probes
    right, and the small one 10 to 35 %. The packaged models were made with one thread, without bfloat16 in hardware,
    in about ten minutes of one core.

    Args:
        out: The folder to make. It may exist if it is empty or holds an older demo world, which is then replaced.
        seed: Seed of names, facts, texts and models.
        recipe: Sizes and training of the models.
        run_config: Whether to write ``run-config.toml``, which points a ``flwr run`` at the folder.
        progress: Told what is being done, how much of it is done, and the total; or None.

    Raises:
        DataError: ``out`` is a file, or holds something that does not belong to a demo world.
    """
    out = out.resolve()
    _check_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        _write_world(new, seed, recipe, progress or (lambda _description, _done, _total: None))
        if run_config:
            (new / "run-config.toml").write_text(_run_config(out), encoding="utf-8")
        if out.exists():
            out.rename(old)
        new.rename(out)


def _check_replaceable(out: Path) -> None:
    if not out.exists():
        return
    remedy = "give a new folder, or empty this one"
    if not out.is_dir():
        raise DataError("a demo world needs a folder, and this is a file", place=str(out), remedy=remedy)
    entries = {entry.name for entry in out.iterdir()}
    is_older_world = "world.json" in entries and entries <= WORLD_FILES
    if entries and not is_older_world:
        raise DataError(
            "only an empty folder or an older demo world is replaced; this one holds something else",
            value=sorted(entries - WORLD_FILES) or sorted(entries),
            place=str(out),
            remedy=remedy,
        )


def _write_world(folder: Path, seed: int, recipe: Recipe, progress: ProgressCallback) -> None:
    progress("texts and tokenizer", 0, 1)
    catalogue = make_catalogue(seed)
    _, split_of = private_records(catalogue, seed)
    texts = world_texts(seed)
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    documents = list(islice(public_documents(catalogue, seed), recipe.num_documents))
    tokenizer = train_tokenizer(documents, vocab_size=VOCAB_SIZE, max_length=recipe.small.shape.max_positions)
    tokens = token_stream(tokenizer, documents)
    facts = [(unit, field) for unit in catalogue for field in FIELDS]
    probes = _stream(seed, "recall probes").sample(facts, NUM_PROBES)
    progress("texts and tokenizer", 1, 1)

    described: dict[str, Any] = {}
    for name, model_recipe in (("small", recipe.small), ("large", recipe.large)):
        steps = model_recipe.training.steps
        report = partial(_report_step, progress, f"pre-training the {name} model", steps)
        seeded = replace(model_recipe, training=replace(model_recipe.training, seed=seed))
        model, _ = make_model(seeded, tokenizer, tokens, progress=report)
        model.to(torch.bfloat16).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        for path in (folder / name).iterdir():
            path.chmod(0o644)  # safetensors files are made readable for their owner only
        described[name] = {
            "parameters": model.num_parameters(),
            "tokens_seen": model_recipe.training.tokens_seen,
            "recall": recall(model.float(), tokenizer, probes),
            "shape": asdict(model_recipe.shape),
            "training": asdict(seeded.training),
        }

    world = {
        "generator_version": GENERATOR_VERSION,
        "seed": seed,
        "arranged": ARRANGED,
        "models": described,
        "stream": {"documents": len(documents), "tokens": len(tokens)},
        "recall_probes": NUM_PROBES,
        "sha256": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()},
        "units": {
            split: [unit.name for unit in catalogue if split_of[unit.name] == split]
            for split in ("train", "prompts", "validation", "test")
        },
    }
    (folder / "world.json").write_text(json.dumps(world, indent=2) + "\n", encoding="utf-8")


def _report_step(progress: ProgressCallback, description: str, total: int, done: int, _loss: float) -> None:
    progress(description, done, total)


def _run_config(folder: Path) -> str:
    """Run-config keys that point at a world, as flat TOML."""
    places = {
        "model.small": "small",
        "model.large": "large",
        "data.train": "train.jsonl",
        "data.validation": "validation.jsonl",
        "data.test": "test.jsonl",
        "data.public": "public.jsonl",
        "data.prompts": "prompts.jsonl",
    }
    return toml_of({key: str(folder / name) for key, name in places.items()})
