"""How many texts a run has, and how long they are: from its data, as somebody tells, or assumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fedpt_flwr.architectures import find_architecture
from fedpt_flwr.config import DataConfig, ModelConfig, RunConfig
from fedpt_flwr.data import TokenizedExample, tokenize_answers, tokenize_examples, tokenize_prompts
from fedpt_flwr.errors import ConfigError, DataError
from fedpt_flwr.models import load_tokenizer, resolve_model
from fedpt_flwr.paths import expanded
from fedpt_flwr.sources import (
    answer_choices,
    choice_sources,
    device_shard,
    held_out_items,
    public_prompts,
    public_texts,
    training_records,
)
from fedpt_flwr.vocabulary import match_vocabularies

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Texts = Sequence[TokenizedExample]
_Cut = Callable[[TokenizedExample], TokenizedExample]

_Found = TypeVar("_Found")

MOST = 1_000_000
"""Devices, texts and tokens of a text that are counted at most: a plan walks through them."""

_SOME, _MANY = 100, 1000  # validation items; examples, test items and prompts, where nobody says how many


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a user says of the texts, in place of what they are, or where they are not here; None: nothing.

    Attributes:
        examples: A device's training examples.
        prompt_tokens: Tokens of every prompt.
        answer_tokens: Tokens of every answer, the end included.
        validation_items: The server's validation items.
        test_items: The server's test items.
        prompts: Public prompts or texts to distil on.

    Raises:
        ConfigError: One is out of range.
    """

    examples: int | None = None
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    validation_items: int | None = None
    test_items: int | None = None
    prompts: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            number = getattr(self, field.name)
            if number is not None:
                _check_number(number, f"--{field.name.replace('_', '-')}")


def _check_number(number: int, option: str) -> None:
    if not 1 <= number <= MOST:
        raise ConfigError(
            f"a plan counts from 1 to {MOST:,} of them", value=number, place=option, remedy="say fewer with this option"
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTexts:
    """The texts of a run, as far as costs depend on them: how many, and how long.

    Attributes:
        shards: Examples of each device that has any, by its number.
        validation: The server's validation items, right answers included.
        test: The server's test items.
        lessons: What is distilled on: public prompts with answers as long as others, or public texts.
        has_prompts: Whether the proxy must write the answers of ``lessons``.
        shot_tokens: Mean tokens of a public text in a few-shot prompt; 0: there is none.
        choices: Tokens of each of the answers to choose from; empty: answers are written.
        context: What both models can read, in tokens; None where neither says.
        assumed: What nobody told.
    """

    shards: Mapping[int, Texts]
    validation: Texts
    test: Texts
    lessons: Texts
    has_prompts: bool
    shot_tokens: float
    choices: Sequence[int]
    context: int | None
    assumed: Sequence[str]


def find_texts(config: RunConfig, num_devices: int, told: Told) -> PlannedTexts:
    """The texts of a run: from its data if they and the tokenizer are here, else as they are told, else assumed.

    Args:
        config: Of the run.
        num_devices: Devices.
        told: Wins over what is found.

    Raises:
        FedPTError: A file that the config names cannot be read, or the tokenizers differ.
    """
    data, scoring = config.data, config.scoring
    tokenizer, context = _tokenizer_here(config.model), _context(config.model)
    answer = told.answer_tokens or max(1, min(scoring.max_new_tokens, config.train.max_length // 2))
    prompt = told.prompt_tokens or max(1, config.train.max_length - answer)
    stand_in = TokenizedExample([0] * prompt, [0] * answer)
    assumed: list[str] = []

    longest = config.train.max_length
    if prompt + answer > longest:
        assumed.append(
            f"that training cuts these texts at train.max-length, {longest} tokens: the beginning of the prompt, down "
            "to half of that, then the end of the answer"
        )
    all_lengths = told.prompt_tokens is not None and told.answer_tokens is not None

    def unless_told(number: int | None, find: Callable[[], _Found | None]) -> _Found | None:
        """Texts of which everything is told are not looked for."""
        return None if all_lengths and number is not None else find()

    def fit(found: Texts | None, number: int | None, default: int, what: str, option: str, cut: _Cut) -> Texts:
        """As many texts as there are or as are told, as long as they are or as is told and a run would read."""
        if found is None:
            if number is None:
                _check_number(default, option)
                assumed.append(f"{default:,} {what} ({option})")
            return [cut(stand_in)] * (number or default)
        if told.prompt_tokens is not None or told.answer_tokens is not None:
            found = [
                cut(
                    TokenizedExample(
                        text.prompt_ids if told.prompt_tokens is None else stand_in.prompt_ids,
                        text.answer_ids if told.answer_tokens is None else stand_in.answer_ids,
                    )
                )
                for text in found
            ]
        number = number or len(found)
        return [found[index * len(found) // number] for index in range(number)]  # from all over: they may be sorted

    def fit_shard(found: Texts | None) -> Texts:
        return fit(found, told.examples, _MANY, "examples on every device", "--examples", _cut_at(longest))

    # Where their number is told, the data says how long they are, and is not dealt out.
    dealt = _shards(config, num_devices, tokenizer) if told.examples is None else None
    alike = None if told.examples is None else unless_told(told.examples, lambda: _training_texts(config, tokenizer))
    if dealt is None and alike is None and not all_lengths:
        assumed.append(
            f"{prompt} tokens of prompt and {answer} of answer in every text, as long as train.max-length and "
            "scoring.max-new-tokens allow (--prompt-tokens, --answer-tokens)"
        )
    if dealt is None:
        shards = dict.fromkeys(range(num_devices), fit_shard(alike))
    else:
        shards = {device: fit_shard(shard) for device, shard in dealt.items()}
    as_scored = _cut_at(context or longest)  # losses are of as much as the models can read
    validation = fit(
        unless_told(told.validation_items, lambda: _items(config, "validation", tokenizer, context)),
        told.validation_items,
        max(_SOME, scoring.round_items),
        "validation items",
        "--validation-items",
        as_scored,
    )
    test = fit(
        unless_told(told.test_items, lambda: _items(config, "test", tokenizer, context)),
        told.test_items,
        scoring.num_items or _MANY,
        "test items",
        "--test-items",
        as_scored,
    )

    def as_asked(text: TokenizedExample) -> TokenizedExample:
        return TokenizedExample(text.prompt_ids[-longest:], text.answer_ids[: scoring.max_new_tokens])

    lessons: Texts = ()
    if config.distillation.mode != "off":
        written = round(mean(len(text.answer_ids) for text in validation))
        lessons = fit(
            unless_told(told.prompts, lambda: _lessons(config, tokenizer, written)),
            told.prompts,
            max(_MANY, config.distillation.num_prompts, config.distillation.final_num_prompts),
            "public prompts",
            "--prompts",
            as_asked if data.prompts else _cut_at(longest),
        )
    shot_tokens = 0.0
    if scoring.few_shot and data.public:
        shots = None if all_lengths else _few_shot_texts(config, tokenizer)
        shot_tokens = prompt + answer if shots is None else mean(map(len, shots))
    return PlannedTexts(
        shards=shards,
        validation=validation,
        test=test,
        lessons=lessons,
        has_prompts=bool(data.prompts),
        shot_tokens=shot_tokens,
        choices=_choices(config, tokenizer, assumed) if data.choices else (),
        context=context,
        assumed=assumed,
    )


def _cut_at(longest: int) -> _Cut:
    """As ``data.tokenize_examples`` cuts."""

    def cut(text: TokenizedExample) -> TokenizedExample:
        prompt = text.prompt_ids[-max(longest // 2, longest - len(text.answer_ids)) :]
        return TokenizedExample(prompt, text.answer_ids[: longest - len(prompt)])

    return cut


def _tokenizer_here(model: ModelConfig) -> PreTrainedTokenizerBase | None:
    """The small model's tokenizer, if it lies in a folder here; where the large one's does too, they must agree."""
    refs = [model.small] if model.large_url else [model.large, model.small]
    found = [load_tokenizer(ref) for ref in refs if _has_tokenizer(ref)]
    if len(found) == 2:
        match_vocabularies(*found)
    return found[-1] if _has_tokenizer(model.small) else None


def _has_tokenizer(ref: str) -> bool:
    path = expanded(ref)
    if ref.startswith("demo:") or (path.is_absolute() and path.is_dir()):
        return any((Path(resolve_model(ref)) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return False


def _is_here(source: str) -> bool:
    """Whether a data source can be read without a network."""
    return source.startswith("demo:") or Path(source).is_absolute()


def _training_texts(config: RunConfig, tokenizer: PreTrainedTokenizerBase | None) -> Texts | None:
    """All that devices train on, together."""
    if tokenizer is None or not _is_dealt_from_here(config.data):
        return None
    records = training_records(config.data, seed=config.seed, tokenizer=tokenizer)
    examples = [example for record in records for example in record.examples]
    return _some(tokenize_examples(examples, tokenizer, max_length=config.train.max_length)[0], "data.train")


def _is_dealt_from_here(data: DataConfig) -> bool:
    return data.partitioner != "node-local" and _is_here(data.train)


def _shards(config: RunConfig, num_devices: int, tokenizer: PreTrainedTokenizerBase | None) -> dict[int, Texts] | None:
    data, longest = config.data, config.train.max_length
    if tokenizer is None or not _is_dealt_from_here(data):
        return None
    shards: dict[int, Texts] = {}
    for device in range(num_devices):
        examples = device_shard(data, device=device, num_devices=num_devices, seed=config.seed, tokenizer=tokenizer)
        shards[device] = tokenize_examples(examples, tokenizer, max_length=longest)[0]
    with_examples = [(device, shard) for device, shard in shards.items() if shard]
    return dict(_some(with_examples, "data.train"))


def _items(
    config: RunConfig, which: str, tokenizer: PreTrainedTokenizerBase | None, context: int | None
) -> Texts | None:
    data = config.data
    if tokenizer is None or not _is_here(getattr(data, which) or data.train):
        return None
    items = held_out_items(data, which, seed=config.seed, tokenizer=tokenizer).examples
    longest = context or config.train.max_length  # losses are of as much as the models can read
    return _some(tokenize_examples(items, tokenizer, max_length=longest)[0], f"data.{which}")


def _lessons(config: RunConfig, tokenizer: PreTrainedTokenizerBase | None, answer_tokens: int) -> Texts | None:
    data, longest = config.data, config.train.max_length
    if tokenizer is None or not _is_here(data.prompts or data.public):
        return None
    prompts = public_prompts(data, tokenizer=tokenizer)
    if prompts is not None:
        answer = [0] * min(answer_tokens, config.scoring.max_new_tokens)
        asked = tokenize_prompts(prompts.texts, tokenizer, max_length=longest)
        return _some([TokenizedExample(ids, answer) for ids in asked], "data.prompts")
    texts = _tokenized(public_texts(data, tokenizer=tokenizer), tokenizer)
    return _some([TokenizedExample([0], ids[: longest - 1]) for ids in texts if ids], "data.public")


def _few_shot_texts(config: RunConfig, tokenizer: PreTrainedTokenizerBase | None) -> list[list[int]] | None:
    if tokenizer is None or not _is_here(config.data.public):
        return None
    texts = [text.strip() + "\n\n" for text in public_texts(config.data, tokenizer=tokenizer)[:_MANY]]
    return _some(_tokenized(texts, tokenizer), "data.public")


def _choices(config: RunConfig, tokenizer: PreTrainedTokenizerBase | None, assumed: list[str]) -> Sequence[int]:
    if tokenizer is None or not all(_is_here(source) for source, _ in choice_sources(config.data)):
        assumed.append(
            "that answers are written: what data.choices names is not here, and reading all choices takes more"
        )
        return ()
    return [len(ids) for ids in tokenize_answers(answer_choices(config.data), tokenizer)]


def _tokenized(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return ids


def _some(found: list[_Found], place: str) -> list[_Found]:
    if not found:
        raise DataError("must hold at least one example", place=place)
    return found


def _context(model: ModelConfig) -> int | None:
    """What both models can read, in tokens; None where neither says."""
    refs = [model.small] if model.large_url else [model.large, model.small]
    configs = map(find_architecture, refs)
    said = [getattr(config, "max_position_embeddings", None) for config in configs]
    return min((context for context in said if context is not None), default=None)


def mean(numbers: Iterable[float]) -> float:
    """Of at least one number."""
    found = list(numbers)
    return sum(found) / len(found)


def length(text: TokenizedExample) -> int:
    """Tokens of prompt and answer."""
    return len(text.prompt_ids) + len(text.answer_ids)
