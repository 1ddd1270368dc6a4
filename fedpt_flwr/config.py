"""The run config: flat keys as Flower carries them, parsed once into frozen dataclasses.

Every key of ``[tool.flwr.app.config]`` is one field below: section ``train``, field ``batch_size`` is the key
``train.batch-size``. ``parse_run_config`` checks names, types, ranges and contradictions and reports everything that is
wrong at once. What depends on files, models or Flower (does the folder exist? is there such a strategy?) is checked by
the modules that know them.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import os
import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from fedpt_flwr.errors import ConfigError, FedPTError

Scalar = bool | int | float | str

INNER_STRATEGIES = (
    "Bulyan",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedMedian",
    "FedProx",
    "FedTrimmedAvg",
    "FedYogi",
    "Krum",
    "MultiKrum",
)
"""Flower's strategies that average arrays and can be named in ``strategy.name``."""

NEED_SINGLE_UPDATES = ("Bulyan", "FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum")
"""Of these, those that compare the devices' arrays with each other; the others see no more than their weighted mean."""

DISTILLATION_MODES = ("off", "final", "carry", "paired", "paper")
"""What ``distillation.mode`` can be."""

DP_MODES = ("off", "server-fixed", "server-adaptive", "client-fixed", "client-adaptive")
"""What ``privacy.dp`` can be."""

PRIVATE_STRATEGIES = ("FedAvg", "FedProx")
"""Strategies whose mean of equal weights the accountant knows."""

SAMPLINGS = ("no-amplification", "poisson", "without-replacement")
"""What ``privacy.sampling`` can be asked to be; all but the first are refused."""

AUTO = "auto"
"""The value of ``proxy.alpha`` that lets a run choose."""

SCORED_ROWS = ("large", "untuned", "tuned", "proxy")
"""What ``scoring.rows`` can name."""

DATA_FORMATS = ("template", "auto", "instruction", "completion", "chat", "text", "classification")
"""What ``data.format`` can be."""
LORA_AGGREGATIONS = ("average", "exact", "frozen-a")
"""What ``tuning.lora-aggregation`` can be."""

_WEIGHTED_MEANS = ("FedAvg", "FedProx")
"""Strategies that make the weighted mean of the devices' weights, and nothing else."""

CHOICE_LENGTHS = ("sum", "tokens", "bytes")
"""What ``scoring.choice-length`` can be."""

_MARKDOWN_HEAD = """# Run config

Every key of `[tool.flwr.app.config]`. Its defaults are in `pyproject.toml`; for one run they are overridden by

    flwr run . --stream -c "num-server-rounds=4 train.max-steps=40 data.partitioner='iid'"

or by a TOML file of such keys, `flwr run . --stream --run-config /absolute/path.toml`. Flower takes either pairs or
one file, and refuses keys that are not here. `fedpt check-config -c "…"` says everything that is wrong with a config
without a run. Paths are absolute, because Flower's processes run in other folders.

This page is made by `fedpt check-config --markdown`."""

# A value that is meant as a path: begins like one, is deeper than `owner/name`, or ends like a data file.
_PATH_LIKE = re.compile(r"^[.~]|^[^:]*/[^:]*/|\.(jsonl|json|csv|tsv|parquet|txt)$")


def _setting(
    default: Scalar,
    doc: str,
    rule: str = "",
    holds: Callable[[Any], bool] | None = None,
    *,
    path: bool = False,
    key_variable: str = "",
) -> Any:
    """A field of a settings class: its default, what it means, and the rule that its value must obey."""
    metadata = {"doc": doc, "rule": rule, "holds": holds, "path": path, "key_variable": key_variable}
    return dataclasses.field(default=default, metadata=metadata)


def _one_of(*names: str) -> tuple[str, Callable[[Any], bool]]:
    return "must be one of " + ", ".join(names), lambda value: value in names


def _at_least(low: float) -> tuple[str, Callable[[Any], bool]]:
    return f"must be at least {low}", lambda value: value >= low


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _is_json_object(text: str) -> bool:
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, dict) and bool(found)


def _names(text: str) -> list[str]:
    """The names in a list that is separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


_POSITIVE = ("must be greater than 0", lambda value: value > 0)
_NOT_EMPTY = ("must not be empty", lambda value: value.strip() != "")
_FRACTION = ("must be greater than 0 and at most 1", lambda value: 0 < value <= 1)
_DTYPE = _one_of("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The two language models."""

    small: str = _setting(
        "demo:small",
        "Small LM that the devices tune: `demo:small`, a hub id, or the absolute path of a folder. Every device loads "
        "the same one.",
        *_NOT_EMPTY,
        path=True,
    )
    large: str = _setting(
        "demo:large",
        "Large LM, loaded by the server alone: `demo:large`, a hub id, or the absolute path of a folder.",
        *_NOT_EMPTY,
        path=True,
    )
    large_url: str = _setting(
        "",
        "Address of an OpenAI-compatible service whose model is the large LM instead, which is then not loaded here; "
        "its key is in the environment variable `FEDPT_LARGE_API_KEY` ([remote.md](remote.md)). Empty: `model.large`.",
        "must begin with http:// or https://, and hold no key",
        lambda value: not value or re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", value) is not None,
        key_variable="FEDPT_LARGE_API_KEY",
    )
    large_device_map: str = _setting(
        "",
        "How the large LM is divided where it is larger than one device: `auto`, `balanced`, `balanced_low_0`, "
        '`sequential`, or a JSON object of modules and devices such as `{"model.layers.0": 0, "": "cpu"}` (numbers '
        "of GPUs, `cpu`, `disk`). Empty: all of it is on `model.device`.",
        "must be empty, auto, balanced, balanced_low_0, sequential or a JSON object",
        lambda value: value in ("", "auto", "balanced", "balanced_low_0", "sequential") or _is_json_object(value),
    )
    large_max_memory: str = _setting(
        "",
        'What the devices of an automatic map may take: a JSON object such as `{"0": "20GiB", "cpu": "60GiB"}`. '
        "What is left lies on disk. Empty: all there is.",
        "must be empty or a JSON object",
        lambda value: not value or _is_json_object(value),
    )
    large_offload_folder: str = _setting(
        "",
        "Absolute path of a folder for weights on disk that are not read from the checkpoint itself.",
        path=True,
    )
    large_quantization: str = _setting(
        "",
        'JSON object that is transformers\' `quantization_config` for the large LM, such as `{"load_in_8bit": true}`; '
        "its package must be installed on the server. Empty: weights as they are stored.",
        "must be empty or a JSON object",
        lambda value: not value or _is_json_object(value),
    )
    small_dtype: str = _setting("float32", "Floating-point type of the small LM's weights.", *_DTYPE)
    large_dtype: str = _setting("float32", "Floating-point type of the large LM's weights.", *_DTYPE)
    device: str = _setting(
        "auto",
        "Where models compute, on server and devices: `auto` (CUDA if there is any, else CPU), `cpu`, `cuda`, "
        "`cuda:1`, `mps`.",
        "must be auto, cpu, cuda, cuda:<number> or mps",
        lambda value: re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", value) is not None,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RemoteConfig:
    """How a large model behind an API is asked (`model.large-url`)."""

    model: str = _setting(
        "", "Its name there. Empty: `large` of a service of this project, else the only model that there is."
    )
    api: str = _setting(
        "auto",
        "What a request gets. `full`: all log-probabilities at any places of a text (a service of this project). "
        "`echo`: the likeliest tokens at all places of a text. `next`: those of the token that follows. "
        "`auto`: the best that "
        "works.",
        *_one_of("auto", "full", "echo", "next"),
    )
    top_logprobs: int = _setting(
        0, "Tokens whose log-probabilities are used at each place; 0: as many as the service gives.", *_at_least(0)
    )
    hidden: str = _setting(
        "auto",
        "What becomes of tokens that are not shown. `restrict`: they are ruled out. `fill`: the untuned LM shares out "
        "what probability is left. `auto`: ruled out where always the likeliest token is taken, filled in where tokens "
        "are drawn.",
        *_one_of("auto", "restrict", "fill"),
    )
    timeout_s: float = _setting(60.0, "Seconds that a request may take.", *_POSITIVE)
    retries: int = _setting(
        4, "How often a request that failed is sent again, each time after a longer wait.", *_at_least(0)
    )
    concurrency: int = _setting(8, "Requests at the same time.", *_at_least(1))
    draft_tokens: int = _setting(
        3,
        "Tokens that the tuned model drafts in scoring, to save requests; 0 with `next`, which would save none.",
        *_at_least(0),
    )
    token_budget: int = _setting(
        0, "Tokens sent and received together, after which nothing more is asked; 0: no limit.", *_at_least(0)
    )
    price_sent: float = _setting(0.0, "Price of a million tokens sent, for the ledger.", *_at_least(0))
    price_received: float = _setting(0.0, "Price of a million tokens received, for the ledger.", *_at_least(0))
    cache: str = _setting(
        "",
        "Absolute path of a folder that keeps what was answered, so that nothing is paid twice; empty: "
        "`$FEDPT_HOME/remote`, or `~/.fedpt/remote`; `off`: nothing is kept.",
        path=True,
    )
    cache_mb: int = _setting(2048, "Megabytes up to which answers are kept.", *_at_least(1))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TuningConfig:
    """Which weights of the small LM are tuned, sent and aggregated."""

    mode: str = _setting(
        "full", "`full`: all weights of the small LM. `lora`: an adapter only.", *_one_of("full", "lora")
    )
    lora_rank: int = _setting(8, "Rank of the adapter's matrices.", *_at_least(1))
    lora_alpha: float = _setting(16.0, "Scale of the adapter: its product is multiplied by alpha / rank.", *_POSITIVE)
    lora_dropout: float = _setting(
        0.0, "Dropout before the adapter.", "must be at least 0 and below 1", lambda value: 0 <= value < 1
    )
    lora_targets: str = _setting(
        "all-linear",
        "Modules that get an adapter: `all-linear`, or names separated by commas such as `q_proj,v_proj`.",
        *_NOT_EMPTY,
    )
    lora_aggregation: str = _setting(
        "average",
        "How adapters become one. `average`: each of their two matrices by itself, which is not the mean of what they "
        "do. `exact`: the mean of their products, cut to the rank again; what that leaves out is in `metrics.jsonl`. "
        "`frozen-a`: the first matrix stays as it was drawn, only the second is tuned and sent: half the bytes, and "
        "the mean is exact.",
        *_one_of(*LORA_AGGREGATIONS),
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """What one device does in one round."""

    epochs: int = _setting(0, "Passes over the device's shard per round; 0: no such limit.", *_at_least(0))
    max_steps: int = _setting(
        20, "Optimizer steps per round, counted after accumulation; 0: no such limit.", *_at_least(0)
    )
    batch_size: int = _setting(16, "Examples per forward pass.", *_at_least(1))
    accumulation_steps: int = _setting(1, "Forward passes per optimizer step.", *_at_least(1))
    learning_rate: float = _setting(0.003, "AdamW's learning rate in round 1.", *_POSITIVE)
    learning_rate_end: float = _setting(
        0.2,
        "Learning rate of the last round as a fraction of the first round's.",
        "must be at least 0 and at most 1",
        lambda value: 0 <= value <= 1,
    )
    schedule: str = _setting(
        "linear", "Course of the learning rate over the rounds.", *_one_of("constant", "linear", "cosine")
    )
    weight_decay: float = _setting(0.0, "AdamW's weight decay.", *_at_least(0))
    beta2: float = _setting(
        0.99, "AdamW's second-moment decay.", "must be at least 0 and below 1", lambda value: 0 <= value < 1
    )
    max_grad_norm: float = _setting(1.0, "Gradients are scaled down to this norm; 0: never.", *_at_least(0))
    max_length: int = _setting(
        256,
        "Tokens of prompt and answer together. What is longer loses the beginning of the prompt, down to half of "
        "this, then the end of the answer.",
        *_at_least(2),
    )
    packing: bool = _setting(
        False,
        "Put short examples of a batch behind one another, into rows as long as the longest, each read as if it were "
        "alone: the same update without the time for padding. Refused for a model that cannot keep them apart.",
    )
    mixed_precision: str = _setting(
        "no", "Forward and backward passes in a shorter type (accelerate).", *_one_of("no", "bf16", "fp16")
    )
    gradient_checkpointing: bool = _setting(False, "Recompute activations in the backward pass to save memory.")
    fedprox_mu: float = _setting(
        0.0,
        "FedProx: strength of the pull towards the weights that the round began with (adds mu/2 times the squared "
        "distance to the loss).",
        *_at_least(0),
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Texts: the devices' private shards, and what the server scores on."""

    train: str = _setting(
        "demo:train",
        "The devices' examples: `demo:train`, a hub id (`owner/name` or `owner/name:config`), or the absolute path of "
        "a JSONL, JSON, CSV, TSV, Parquet or text file, or of a folder of them. Unused with `node-local`.",
        path=True,
    )
    train_split: str = _setting("train", "Split of a hub data set.", *_NOT_EMPTY)
    validation: str = _setting(
        "demo:validation",
        "The server's validation examples, scored after every round; empty: `data.holdout-fraction` of `data.train`, "
        "which no device gets.",
        path=True,
    )
    validation_split: str = _setting("validation", "Split of a hub data set.", *_NOT_EMPTY)
    test: str = _setting(
        "demo:test",
        "The server's test examples, scored once, at the end; empty: another `data.holdout-fraction` of `data.train`.",
        path=True,
    )
    test_split: str = _setting("test", "Split of a hub data set.", *_NOT_EMPTY)
    public: str = _setting(
        "demo:public",
        "Public texts of the server; examples for the row `large_few_shot`. Empty: that row is absent.",
        path=True,
    )
    public_split: str = _setting("train", "Split of a hub data set.", *_NOT_EMPTY)
    format: str = _setting(
        "template",
        "What a record looks like (docs/data.md). `template`: any fields, written by `data.template`. `instruction`, "
        "`completion`, `chat`, `text`, `classification`: fields of fixed names, and prompts of a fixed form; "
        "`data.template` and `data.answer-field` are then unused. `auto`: one of these, by the first record's fields.",
        *_one_of(*DATA_FORMATS),
    )
    template: str = _setting(
        "> {request}\n[{unit}]\n",
        "The prompt, with a record's fields in braces; `\\n` is a line break however it is quoted. Empty: no prompt "
        "but the tokenizer's first token, for plain texts (with `data.answer-field='text'`).",
    )
    answer_field: str = _setting("answer", "Field that holds the answer to learn.", *_NOT_EMPTY)
    answer_pattern: str = _setting(
        "",
        "Regular expression for the part of an answer that counts for exact match (last match, first group), such as "
        "`#### (.+)`; empty: the whole answer.",
        "must be a valid regular expression",
        _compiles,
    )
    choices: str = _setting(
        "",
        "All that may be answered, such as the labels of a classification: the different answers of some of `train`, "
        "`validation`, `test` and `public`, separated by commas, or of a source of its own (a text file has one on "
        "each line). An answer is then not written but chosen by its likelihood. Empty: answers are written.",
        path=True,
    )
    choices_split: str = _setting("train", "Split of a hub data set.", *_NOT_EMPTY)
    public_template: str = _setting(
        "{text}",
        "How a public record becomes a text; empty: as the devices' records do (`data.format`), answer included.",
    )
    prompts: str = _setting(
        "demo:prompts",
        "Public prompts of the server for distillation: records without answers, written out by `data.template`. "
        "Empty: the texts of `data.public` are learnt from as they stand.",
        path=True,
    )
    prompts_split: str = _setting("train", "Split of a hub data set.", *_NOT_EMPTY)
    cover_field: str = _setting(
        "unit",
        "Field whose values say which test items the public prompts cover: the devices' copy is scored on covered "
        "and other items separately. Empty or absent: on all together.",
    )
    group_field: str = _setting("kind", "Field that groups examples for `natural` and `dirichlet`.")
    value_field: str = _setting(
        "value", "Field whose value a good answer contains (metric contains_value); empty or absent: not measured."
    )
    name_field: str = _setting(
        "field",
        "Field that names what is asked for: answers of the form `name = value` (metric right_field); empty or absent: "
        "not measured.",
    )
    partitioner: str = _setting(
        "natural",
        "How `data.train` is dealt out: `natural` (whole groups), `dirichlet` (skewed mixtures of groups), `iid`, or "
        "`node-local`: each device reads the file or folder that its node config names as `data-path`.",
        *_one_of("natural", "dirichlet", "iid", "node-local"),
    )
    dirichlet_alpha: float = _setting(0.5, "Concentration; smaller means more skewed.", *_POSITIVE)
    disclose: str = _setting(
        "groups",
        "What devices say of their shards before the first round. `size`: the number of examples. `groups`: also how "
        "many are of which group (`data.group-field`); of `node-local` data only a device whose node config allows it.",
        *_one_of("size", "groups"),
    )
    holdout_fraction: float = _setting(
        0.1,
        "Share of `data.train` kept back where there is no validation or test file.",
        "must be greater than 0 and below 0.5",
        lambda value: 0 < value < 0.5,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WireConfig:
    """How arrays travel."""

    dtype: str = _setting(
        "float32",
        "Type of the arrays on the wire. `float16` and `bfloat16` halve the bytes: the server sends its arrays "
        "rounded, a device sends back its change of them, rounded; the server's own arrays and all sums stay float32. "
        "`float16` is the more exact (11 bits, to 65504; changes below 3e-8 are lost), `bfloat16` has the range of "
        "float32 (8 bits). `int8`: the server sends `float16`, a device sends its change in 8 bits a value with a "
        "scale for 256 values each, and adds what that lost to its next change (not with "
        "`tuning.lora-aggregation='exact'`); what was lost last lies under `FEDPT_HOME` on the device.",
        *_one_of("float32", "bfloat16", "float16", "int8"),
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StrategyConfig:
    """The Flower strategy that aggregates the devices' weights."""

    name: str = _setting(
        "FedAvg", "Which of Flower's strategies aggregates the devices' weights.", *_one_of(*INNER_STRATEGIES)
    )
    arguments: str = _setting(
        "",
        "Its keyword arguments as `name = value` separated by commas, such as `eta = 0.01, tau = 0.001`.",
    )
    max_update_norm: float = _setting(
        0.0, "Longest change of the weights (L2 norm over all of them) that a device may send; 0: any.", *_at_least(0)
    )
    above_norm: str = _setting(
        "clip",
        "What becomes of a longer change: `clip`: it is scaled down to that norm. `refuse`: the reply is not used.",
        *_one_of("clip", "refuse"),
    )

    def parsed_arguments(self) -> dict[str, Any]:
        """The arguments as a dictionary.

        Raises:
            ConfigError: They are not a list of ``name = value``.
        """
        try:
            arguments: dict[str, Any] = tomllib.loads(f"arguments = {{ {self.arguments} }}")["arguments"]
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(
                "must be `name = value` pairs separated by commas",
                value=self.arguments,
                place="strategy.arguments",
                remedy=f"for example 'eta = 0.01, tau = 0.001' ({error})",
            ) from error
        return {name.replace("-", "_"): value for name, value in arguments.items()}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyConfig:
    """What the server may learn of a device (docs/secure-sum.md), and what the result may tell (docs/privacy.md)."""

    dp: str = _setting(
        "off",
        "Differential privacy on the level of devices: each change is clipped, on the server (`server-…`) or by the "
        "device itself (`client-…`), to a norm that is given (`…-fixed`) or follows the devices (`…-adaptive`), and "
        "Gaussian noise is added to the mean.",
        *_one_of(*DP_MODES),
    )
    noise_multiplier: float = _setting(
        1.0, "Standard deviation of the noise on the sum of all changes, as a multiple of the norm.", *_POSITIVE
    )
    clipping_norm: float = _setting(
        1.0, "L2 norm that each device's change is clipped to; with `…-adaptive` in the first round.", *_POSITIVE
    )
    clipped_share: float = _setting(
        0.5,
        "`…-adaptive`: share of the changes that are to be clipped.",
        "must be greater than 0 and below 1",
        lambda value: 0 < value < 1,
    )
    clipping_rate: float = _setting(
        0.2, "`…-adaptive`: how fast the norm follows; from round to round by at most about this factor.", *_POSITIVE
    )
    clipped_count_stddev: float = _setting(
        0.0,
        "`…-adaptive`: standard deviation of the noise on the number of clipped changes; 0: a twentieth of the devices "
        "of a round. It must exceed half of `privacy.noise-multiplier`.",
        *_at_least(0),
    )
    delta: float = _setting(
        1e-5,
        "The delta that epsilon is told at; it must be below one over the number of devices.",
        "must be greater than 0 and below 1",
        lambda value: 0 < value < 1,
    )
    max_epsilon: float = _setting(
        0.0, "Budget: a round that would bring epsilon above this is not begun; 0: no limit.", *_at_least(0)
    )
    sampling: str = _setting(
        "no-amplification",
        "What epsilon may count on about who trains in a round. `no-amplification`: nothing, which always holds. The "
        "others are refused: who trains follows from the seed, which every device knows.",
        *_one_of(*SAMPLINGS),
    )

    secure_sum: bool = _setting(
        False,
        "The server learns the sum of the devices' changes and no single one (docs/secure-sum.md). Needs three devices "
        "and a strategy that makes a mean; losses of single devices are no longer told.",
    )
    secure_sum_threshold: float = _setting(
        0.7,
        "Share of the devices which begin a secure sum that must stay until it is opened, rounded up and at least 3; "
        "with fewer the round fails. The others may drop out.",
        "must be greater than 0.5 and at most 1",
        lambda value: 0.5 < value <= 1,
    )
    secure_sum_range: float = _setting(
        1.0,
        "Largest change of a weight in a round that a secure sum carries; larger ones are cut to it, counted and warned"
        " about. The rounding error is in proportion to it.",
        "must be greater than 0 and at most 1000000",
        lambda value: 0 < value <= 1e6,
    )
    secure_sum_bits: int = _setting(
        32,
        "Bits of a number in a masked answer. 16 halve what devices send; the mean is then off by at most about the "
        "number of devices times the range divided by 65536.",
        "must be one of 16, 32",
        lambda value: value in (16, 32),
    )

    @property
    def is_on(self) -> bool:
        """Whether the run is private."""
        return self.dp != "off"

    @property
    def clips_on_devices(self) -> bool:
        """Whether each device clips its own change."""
        return self.dp.startswith("client")

    @property
    def is_adaptive(self) -> bool:
        """Whether the norm follows the devices."""
        return self.dp.endswith("adaptive")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProxyConfig:
    """How strongly the small LM's change steers the large LM."""

    alpha: float | str = _setting(
        1.0,
        "Strength of the shift in `large + alpha * (tuned - untuned)`; 1 as published, 0 leaves the large LM alone. "
        "`auto`: after every round this and the mask are chosen by exact match on the validation items (where none is "
        "right, this alone by loss); of equally good ones the larger alpha.",
        "must be a finite number or 'auto'",
        lambda value: value == AUTO if isinstance(value, str) else math.isfinite(value),
    )
    plausibility: float = _setting(
        0.0,
        "Keep only tokens with at least this share of the tuned LM's largest probability; 0: keep all. Chosen too "
        "with `proxy.alpha='auto'`.",
        "must be at least 0 and below 1",
        lambda value: 0 <= value < 1,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DistillationConfig:
    """What the small LM learns back from the proxy on public text."""

    mode: str = _setting(
        "final",
        "`off`: nothing. `final`: after the last round a copy of the small LM for the devices learns from the proxy. "
        "`carry`: also the small LM that each round begins with, which the proxy itself does not see. `paired`: both "
        "small LMs of the proxy learn, tuned from the proxy and untuned from the large LM. `paper`: the small LM of "
        "each round learns from the proxy, which then counts the large LM again and again: for ablations.",
        *_one_of(*DISTILLATION_MODES),
    )
    steps: int = _setting(20, "Optimizer steps after a round (`carry`, `paired`, `paper`).", *_at_least(1))
    learning_rate: float = _setting(0.0001, "AdamW's learning rate after a round.", *_POSITIVE)
    num_prompts: int = _setting(
        128, "Public prompts, drawn anew for each round, that the proxy answers to teach; 0: all.", *_at_least(0)
    )
    gamma: float = _setting(
        1.0,
        "`paired`: strength of the term that keeps `large + tuned - untuned` where the proxy was.",
        *_at_least(0),
    )
    final_steps: int = _setting(600, "Optimizer steps of the devices' copy after the last round.", *_at_least(1))
    final_learning_rate: float = _setting(0.0005, "AdamW's learning rate for the devices' copy.", *_POSITIVE)
    final_num_prompts: int = _setting(
        0, "Public prompts that the proxy answers to teach the devices' copy; 0: all.", *_at_least(0)
    )
    batch_size: int = _setting(16, "Texts per step.", *_at_least(1))
    temperature: float = _setting(1.0, "Divides the scores of teacher and student before the softmax.", *_POSITIVE)
    direction: str = _setting(
        "forward",
        "`forward`: KL(teacher || student), the student covers all that the teacher finds likely. `reverse`: "
        "KL(student || teacher), it keeps to what the teacher finds likeliest; the teacher then has no mask, whose "
        "ruled-out tokens would make that infinite.",
        *_one_of("forward", "reverse"),
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StopConfig:
    """When a run is good enough to end before its last round."""

    metric: str = _setting(
        "",
        "What decides, of the proxy on the validation items: `exact_match` or `loss`; empty: all rounds are run.",
        "must be exact_match, loss or empty",
        lambda value: value in ("", "exact_match", "loss"),
    )
    target: float = _setting(0.0, "End as soon as the metric is at least this good; 0: no such target.", *_at_least(0))
    patience: int = _setting(
        0, "End after so many rounds without a better value than the best before; 0: never.", *_at_least(0)
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ScoringConfig:
    """What the server measures, and on how much."""

    rows: str = _setting(
        "large,untuned,tuned,proxy",
        "Models scored on the test examples, separated by commas.",
        "must be some of large, untuned, tuned and proxy, separated by commas",
        lambda value: bool(_names(value)) and set(_names(value)) <= set(SCORED_ROWS),
    )
    num_items: int = _setting(0, "Test examples scored at the end; 0: all.", *_at_least(0))
    round_items: int = _setting(
        48, "Validation examples scored after every round; 0: rounds are not scored.", *_at_least(0)
    )
    max_new_tokens: int = _setting(32, "Longest answer that is generated, in tokens.", *_at_least(1))
    batch_size: int = _setting(64, "Examples scored at once.", *_at_least(1))
    rouge_l: bool = _setting(
        False,
        "Measure ROUGE-L too: how much of an answer and of the right one is the same words in the same order.",
    )
    choice_length: str = _setting(
        "sum",
        "How the length of a choice counts (`data.choices`). `sum`: the likelihood of the whole of it, end of answer "
        "included. `tokens`, `bytes`: its logarithm per token or byte, which does not favour short ones.",
        *_one_of(*CHOICE_LENGTHS),
    )
    few_shot: int = _setting(
        8, "Public examples in the prompt of the row `large_few_shot`; 0: no such row.", *_at_least(0)
    )
    loss_alpha: float = _setting(
        1.0,
        "Alpha at which the proxy's loss is computed, always without mask.",
        "must be a finite number",
        math.isfinite,
    )

    def row_names(self) -> tuple[str, ...]:
        """The rows to score, in the order of the table."""
        return tuple(name for name in SCORED_ROWS if name in _names(self.rows))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ThreadsConfig:
    """CPU threads; part of the config because sums over more threads round differently."""

    device: int = _setting(1, "Threads of a device's training.", *_at_least(1))
    server: int = _setting(
        1,
        "Threads of the server's models; more pay for models of some hundred million weights on a CPU.",
        *_at_least(1),
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything that a run is told; what two runs must share to give the same result."""

    num_server_rounds: int = _setting(8, "Rounds.", *_at_least(1))
    fraction_train: float = _setting(1.0, "Share of the devices that train in a round.", *_FRACTION)
    min_devices: int = _setting(2, "Devices that must be there before a round begins.", *_at_least(1))
    min_replies: int = _setting(1, "Usable replies that a round needs.", *_at_least(1))
    max_failed_rounds: int = _setting(
        0, "Rounds in a row that may lack replies (the model stays as it was); one more ends the run.", *_at_least(0)
    )
    round_timeout_s: float = _setting(
        3600.0, "Seconds that a round waits for its devices; later replies are lost.", *_POSITIVE
    )
    wait_timeout_s: float = _setting(120.0, "Seconds that a round waits for enough devices to connect.", *_POSITIVE)
    output_dir: str = _setting(
        "",
        "Absolute path of the folder that holds the runs; empty: `$FEDPT_HOME/runs`, or `~/.fedpt/runs`.",
        path=True,
    )
    keep_rounds: int = _setting(3, "Checkpoints kept; 0: all.", *_at_least(0))
    resume: str = _setting(
        "",
        "Go on with a run after its last complete round: its id, a unique beginning of it, its folder, or `latest`, "
        "the newest that was begun. All other keys and the number of devices must be as they were.",
    )
    seed: int = _setting(0, "Seed of everything random.", "must be from 0 to 4294967295", lambda v: 0 <= v < 2**32)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    remote: RemoteConfig = dataclasses.field(default_factory=RemoteConfig)
    tuning: TuningConfig = dataclasses.field(default_factory=TuningConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    wire: WireConfig = dataclasses.field(default_factory=WireConfig)
    strategy: StrategyConfig = dataclasses.field(default_factory=StrategyConfig)
    privacy: PrivacyConfig = dataclasses.field(default_factory=PrivacyConfig)
    proxy: ProxyConfig = dataclasses.field(default_factory=ProxyConfig)
    distillation: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)
    stop: StopConfig = dataclasses.field(default_factory=StopConfig)
    scoring: ScoringConfig = dataclasses.field(default_factory=ScoringConfig)
    threads: ThreadsConfig = dataclasses.field(default_factory=ThreadsConfig)


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
    return config, problems + _contradictions(config, {str(problem.place) for problem in problems})


def flat_values(config: RunConfig) -> dict[str, Scalar]:
    """A config as the flat keys that give it: the inverse of :func:`parse_run_config`."""

    def walk(part: Any, prefix: str) -> dict[str, Scalar]:
        found: dict[str, Scalar] = {}
        for field in dataclasses.fields(part):
            key, value = prefix + field.name.replace("_", "-"), getattr(part, field.name)
            found |= walk(value, f"{key}.") if dataclasses.is_dataclass(value) else {key: value}
        return found

    return walk(config, "")


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
    if isinstance(value, float) and not (abs(value) <= sys.float_info.max):
        return ConfigError("must be a finite number", value=value, place=setting.key)
    if setting.holds is not None and not setting.holds(value):
        if setting.key_variable:
            remedy = f"give the key in {setting.key_variable}; the value may hold one and is not shown here"
            return ConfigError(setting.rule, place=setting.key, remedy=remedy)
        return ConfigError(setting.rule, value=value, place=setting.key)
    meant_as_path = setting.key == "output-dir" or _PATH_LIKE.search(value) if setting.path and value else False
    if meant_as_path and not Path(value).is_absolute():
        full = Path(value).expanduser().resolve()
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


def _contradictions(config: RunConfig, wrong: set[str]) -> list[FedPTError]:
    """Keys that are fine one by one and not together; keys that are wrong already are left out."""
    found: list[FedPTError] = []

    def refuse(place: str, rule: str, value: Any, remedy: str) -> None:
        if not wrong & set(place.split(" and ")):
            found.append(ConfigError(rule, value=value, place=place, remedy=remedy))

    if config.train.epochs == 0 and config.train.max_steps == 0:
        refuse("train.epochs and train.max-steps", "must not both be 0", 0, "say how long a device trains in a round")
    if config.tuning.mode == "full" and config.model.small_dtype != "float32":
        refuse(
            "tuning.mode and model.small-dtype",
            "tuning all weights needs them in float32, or small updates are rounded away",
            config.model.small_dtype,
            "set model.small-dtype='float32' (train.mixed-precision='bf16' shortens the passes), or tuning.mode='lora'",
        )
    if config.min_replies > config.min_devices:
        refuse(
            "min-replies and min-devices",
            "min-replies must not exceed min-devices",
            f"{config.min_replies} > {config.min_devices}",
            f"raise min-devices to {config.min_replies}",
        )
    if config.data.partitioner in ("natural", "dirichlet") and not config.data.group_field:
        refuse(
            "data.group-field and data.partitioner",
            f"the partitioner {config.data.partitioner} needs a group field",
            "",
            "set data.group-field, or data.partitioner='iid'",
        )
    if config.data.partitioner == "node-local":
        for key, value in (("data.validation", config.data.validation), ("data.test", config.data.test)):
            if not value:
                refuse(
                    f"{key} and data.partitioner",
                    "cannot be held out of data.train, because with node-local data the server has none of it",
                    value,
                    f"set {key} to a file of the server",
                )
    elif not config.data.train:
        refuse("data.train", "must not be empty", "", "name a data set, or set data.partitioner='node-local'")
    if config.distillation.mode != "off" and not config.data.prompts and not config.data.public:
        refuse(
            "distillation.mode and data.prompts",
            "distillation needs public prompts (data.prompts) or public texts (data.public)",
            config.distillation.mode,
            "name one of them, or set distillation.mode='off'",
        )
    if config.proxy.alpha == AUTO and config.proxy.plausibility > 0:
        refuse(
            "proxy.alpha and proxy.plausibility",
            "with proxy.alpha='auto' the mask is chosen too",
            config.proxy.plausibility,
            "leave proxy.plausibility out, or give both",
        )
    if config.distillation.mode == "paired" and config.tuning.mode == "lora":
        refuse(
            "distillation.mode and tuning.mode",
            "paired distillation changes both small models, and an adapter is on one of them",
            "paired with lora",
            "set distillation.mode='carry', or tuning.mode='full'",
        )
    if config.tuning.mode == "lora" and config.tuning.lora_aggregation == "exact":
        _check_exact(config, refuse)
    if config.data.choices and config.data.answer_pattern:
        refuse(
            "data.choices and data.answer-pattern",
            "an answer that is chosen counts as a whole",
            config.data.answer_pattern,
            "leave one of them out",
        )
    if config.data.format == "classification" and not config.data.choices:
        refuse(
            "data.choices and data.format",
            "a classification needs the labels to choose from",
            "",
            "set data.choices='test', or a text file with a label on each line",
        )
    if config.data.format in ("chat", "text") and config.data.choices:
        refuse(
            "data.choices and data.format",
            f"the shape {config.data.format} has no labels to choose from",
            config.data.choices,
            "leave data.choices out, or set data.format='classification'",
        )
    if config.data.partitioner == "node-local" and "train" in _names(config.data.choices):
        refuse(
            "data.choices and data.partitioner",
            "with node-local data the server has no data.train to find answers in",
            config.data.choices,
            "set data.choices='test', or a file of the server",
        )
    _check_stop(config, refuse)
    if config.privacy.is_on:
        _check_privacy(config, refuse)
    _check_secure_sum(config, refuse)
    try:
        arguments = config.strategy.parsed_arguments()
    except ConfigError as error:
        found.append(error)
    else:
        if config.train.fedprox_mu > 0 and "proximal_mu" in arguments:
            refuse(
                "train.fedprox-mu and strategy.arguments",
                "FedProx's mu is given twice",
                f"{config.train.fedprox_mu} and {arguments['proximal_mu']}",
                "give it in one place",
            )
    return found


def _check_secure_sum(config: RunConfig, refuse: Callable[[str, str, Any, str], None]) -> None:
    if not config.privacy.secure_sum:
        return
    if config.strategy.name in NEED_SINGLE_UPDATES:
        refuse(
            "privacy.secure-sum and strategy.name",
            "this strategy compares the devices' changes with each other, and a secure sum shows none of them",
            config.strategy.name,
            "set strategy.name='FedAvg', say, or privacy.secure-sum=false",
        )
    if config.privacy.is_on:
        refuse(
            "privacy.secure-sum and privacy.dp",
            "noise is accounted for where the server, or Flower's own average, has each device's change, and a secure "
            "sum shows none of them",
            config.privacy.dp,
            "set one of the two",
        )
    if config.strategy.max_update_norm > 0:
        refuse(
            "privacy.secure-sum and strategy.max-update-norm",
            "the norm of a single change cannot be seen in a secure sum",
            config.strategy.max_update_norm,
            "leave it out; privacy.secure-sum-range bounds each weight's change",
        )
    if config.min_devices < 3:
        refuse(
            "privacy.secure-sum and min-devices",
            "a secure sum needs three devices: each of two would have the other's change, when it takes off its own",
            config.min_devices,
            "set min-devices=3 or more, or privacy.secure-sum=false",
        )
    if config.wire.dtype == "int8":
        refuse(
            "privacy.secure-sum and wire.dtype",
            "what 8 bits lose a device adds to its next change, and in a secure sum changes have bits of their own",
            config.wire.dtype,
            "set wire.dtype='float16' and privacy.secure-sum-bits=16",
        )
    if config.tuning.mode == "lora" and config.tuning.lora_aggregation == "exact":
        refuse(
            "privacy.secure-sum and tuning.lora-aggregation",
            "exact aggregation multiplies the two matrices of each device, and a secure sum shows none of them",
            config.tuning.lora_aggregation,
            "set tuning.lora-aggregation='frozen-a', whose mean is exact too",
        )


def _check_exact(config: RunConfig, refuse: Callable[[str, str, Any, str], None]) -> None:
    if config.strategy.name not in _WEIGHTED_MEANS:
        refuse(
            "tuning.lora-aggregation and strategy.name",
            "exact aggregation writes the adapter in new directions after every round, so that momentum, medians and "
            "distances between the old ones mean nothing",
            config.strategy.name,
            "set strategy.name='FedAvg', or tuning.lora-aggregation='frozen-a', which goes with every strategy",
        )
    if config.distillation.mode == "carry":
        refuse(
            "tuning.lora-aggregation and distillation.mode",
            "carry adds up what the rounds changed, and exact aggregation writes the adapter in new directions after "
            "every round",
            config.distillation.mode,
            "set distillation.mode='final', or tuning.lora-aggregation='frozen-a'",
        )


def _check_stop(config: RunConfig, refuse: Callable[[str, str, Any, str], None]) -> None:
    stop = config.stop
    if not stop.metric and (stop.target or stop.patience):
        refuse(
            "stop.metric and stop.target and stop.patience",
            "a target or patience needs a metric",
            "",
            "set stop.metric='exact_match' or 'loss'",
        )
    if stop.metric and not (stop.target or stop.patience):
        refuse(
            "stop.metric and stop.target and stop.patience",
            "a metric needs a target or patience",
            stop.metric,
            "set stop.patience=3, say, or stop.target",
        )
    if stop.metric == "exact_match" and stop.target > 1:
        refuse(
            "stop.metric and stop.target",
            "exact match is a share, so no run can reach a target above 1",
            stop.target,
            "set stop.target=0.9, say",
        )
    if stop.metric and not config.scoring.round_items:
        refuse(
            "stop.metric and scoring.round-items",
            "rounds must be scored to decide when to end",
            config.scoring.round_items,
            "set scoring.round-items to the number of validation items that decide",
        )


def _is_same_source(one: str, other: str, *, same_split: bool) -> bool:
    """Whether two sources are one text: files have no splits, data sets of the hub do."""
    has_splits = not one.startswith(("/", "demo:"))
    return bool(one) and os.path.normpath(one) == os.path.normpath(other) and (same_split or not has_splits)


def _check_privacy(config: RunConfig, refuse: Callable[[str, str, Any, str], None]) -> None:
    """What epsilon would say nothing about must not be."""
    privacy, data = config.privacy, config.data
    if config.strategy.name not in PRIVATE_STRATEGIES:
        refuse(
            "privacy.dp and strategy.name",
            "noise is accounted for on the plain mean of equal weights alone",
            config.strategy.name,
            "set strategy.name='FedAvg' or 'FedProx', or privacy.dp='off'",
        )
    if config.strategy.max_update_norm > 0:
        refuse(
            "privacy.dp and strategy.max-update-norm",
            "changes are clipped to privacy.clipping-norm already",
            config.strategy.max_update_norm,
            "leave strategy.max-update-norm out",
        )
    if config.tuning.mode == "lora" and config.tuning.lora_aggregation == "exact":
        refuse(
            "privacy.dp and tuning.lora-aggregation",
            "noise is accounted for on the plain mean of what devices send, and this one averages products",
            config.tuning.lora_aggregation,
            "set tuning.lora-aggregation='frozen-a', whose plain mean is exact",
        )
    if privacy.sampling != SAMPLINGS[0]:
        refuse(
            "privacy.sampling",
            "no amplification holds here: who trains in a round follows from the seed, which every device knows",
            privacy.sampling,
            "leave it out; every round is then counted as if each device had trained in it",
        )
    if privacy.clips_on_devices and config.wire.dtype != "float32":
        refuse(
            "privacy.dp and wire.dtype",
            "a device clips its change as it is sent, in float32",
            config.wire.dtype,
            f"set privacy.dp='server-{privacy.dp.partition('-')[2]}', or wire.dtype='float32'",
        )
    sources = {"validation": data.validation, "test": data.test, "public": data.public, "prompts": data.prompts}
    for name, source in sources.items():
        if name in ("validation", "test") and not source and data.partitioner != "node-local":
            refuse(
                f"privacy.dp and data.{name}",
                "would be held out of data.train, and epsilon does not cover private text that the server reads",
                source,
                f"set data.{name} to a file of the server",
            )
        same_split = getattr(data, f"{name}_split") == data.train_split
        if data.partitioner != "node-local" and _is_same_source(source, data.train, same_split=same_split):
            refuse(
                f"privacy.dp and data.{name}",
                "must not be the devices' text: epsilon does not cover what the server reads itself",
                source,
                f"set data.{name} to text of the server",
            )
    same_split = data.choices_split == data.train_split
    if "train" in _names(data.choices) or _is_same_source(data.choices, data.train, same_split=same_split):
        refuse(
            "privacy.dp and data.choices",
            "answers found in data.train are the devices' text, which epsilon does not cover",
            data.choices,
            "set data.choices='test', or a file of the server",
        )
