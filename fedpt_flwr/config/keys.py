"""Every key of the run config, as frozen dataclasses: default, meaning, and the rule that its value must obey.

Section ``train``, field ``batch_size`` is the key ``train.batch-size`` of ``[tool.flwr.app.config]``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
from collections.abc import Callable
from typing import Any

from fedpt_flwr.errors import ConfigError

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

PLAIN_MEANS = ("FedAvg", "FedProx")
"""Of the former, those that make the weighted mean of the devices' weights, and nothing else."""

DISTILLATION_MODES = ("off", "final", "carry", "paired", "paper")
"""What ``distillation.mode`` can be."""

DP_MODES = ("off", "server-fixed", "server-adaptive", "client-fixed", "client-adaptive")
"""What ``privacy.dp`` can be."""

SECURE_SUM_DEVICES = 3
"""A secure sum's fewest: each of two would have the other's change, when it takes off its own."""

SECURE_SUM_WIDTHS = (16, 32)
"""What ``privacy.secure-sum-bits`` can be."""

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

CHOICE_LENGTHS = ("sum", "tokens", "bytes")
"""What ``scoring.choice-length`` can be."""


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


def _one_of(*names: str | int) -> tuple[str, Callable[[Any], bool]]:
    return "must be one of " + ", ".join(map(str, names)), lambda value: value in names


def _at_least(low: float) -> tuple[str, Callable[[Any], bool]]:
    return f"must be at least {low}", lambda value: value >= low


def _between(low: str, high: str) -> tuple[str, Callable[[Any], bool]]:
    return f"must be from {low} to {high}", lambda value: float(low) <= value <= float(high)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _is_json_object(text: str) -> bool:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and bool(found)


def names_in(text: str) -> list[str]:
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
        "Small LM that the devices tune: `demo:small`, a hub id (`owner/name`, or `owner/name@revision`), or the "
        "absolute path of a folder. Every device loads the same one.",
        *_NOT_EMPTY,
        path=True,
    )
    large: str = _setting(
        "demo:large",
        "Large LM, loaded by the server alone: `demo:large`, a hub id (`owner/name`, or `owner/name@revision`), or the "
        "absolute path of a folder.",
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
        "Linear modules that get an adapter: `all-linear`, or names separated by commas such as `q_proj,v_proj`.",
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
        *_FRACTION,  # not 0: a round at that rate is trained for nothing, and a change of zero is none to clip
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
        "Empty: the texts of `data.public` are learnt from as they stand. What is longer than the models read and "
        "`train.max-length` allows is cut, which the log says.",
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
        1.0,
        "Standard deviation of the noise on the sum of all changes, as a multiple of the norm.",
        *_between("0.001", "1000000"),
    )
    clipping_norm: float = _setting(
        1.0,
        "L2 norm that each device's change is clipped to; with `…-adaptive` in the first round.",
        *_between("0.000001", "1000000"),
    )
    clipped_share: float = _setting(
        0.5,
        "`…-adaptive`: share of the changes that are to be clipped.",
        "must be greater than 0 and below 1",
        lambda value: 0 < value < 1,
    )
    clipping_rate: float = _setting(
        0.2,
        "`…-adaptive`: how fast the norm follows; from round to round by at most about this factor.",
        "must be greater than 0 and at most 10",
        lambda value: 0 < value <= 10,
    )
    clipped_count_stddev: float = _setting(
        0.0,
        "`…-adaptive`: standard deviation of the noise on the number of clipped changes; 0: a twentieth of the devices "
        "of a round. It must exceed half of `privacy.noise-multiplier`, and just above that the noise on the weights "
        "is many times as long; from `privacy.noise-multiplier` on at most 1.16 times.",
        *_at_least(0),
    )
    delta: float = _setting(
        1e-5,
        "The delta that epsilon is told at; it must be below one over the number of devices.",
        "must be greater than 0 and below 1",
        lambda value: 0 < value < 1,
    )
    max_epsilon: float = _setting(
        0.0,
        "Budget of a private run: a round that would bring epsilon above this is not begun; 0: no limit.",
        *_at_least(0),
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
        "Share of the devices which begin a secure sum that must stay until it is opened, rounded up and at least 3 "
        "and `min-replies`; with fewer the round fails. The others may drop out.",
        "must be greater than 0.5 and at most 1",
        lambda value: 0.5 < value <= 1,
    )
    secure_sum_range: float = _setting(
        1.0,
        "Largest change of a weight in a round that a secure sum carries; larger ones are cut to it, counted and warned"
        " about. The rounding error is in proportion to it.",
        *_between("0.000000001", "1000000"),
    )
    secure_sum_bits: int = _setting(
        32,
        "Bits of a number in a masked answer. 16 halve what devices send; the mean is then off by at most about the "
        "number of devices times the range divided by 65536.",
        *_one_of(*SECURE_SUM_WIDTHS),
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
        "`paired`: strength of the term that keeps `large + alpha (tuned - untuned)` where the proxy was.",
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
        lambda value: bool(names_in(value)) and set(names_in(value)) <= set(SCORED_ROWS),
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
        return tuple(name for name in SCORED_ROWS if name in names_in(self.rows))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ThreadsConfig:
    """CPU threads; part of the config because sums over more threads round differently."""

    device: int = _setting(1, "Threads of a device's training.", *_between("1", "1024"))
    server: int = _setting(
        1,
        "Threads of the server's models; more pay for models of some hundred million weights on a CPU.",
        *_between("1", "1024"),
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything that a run is told; what two runs must share to give the same result."""

    num_server_rounds: int = _setting(8, "Rounds.", *_at_least(1))
    fraction_train: float = _setting(1.0, "Share of the devices that train in a round.", *_FRACTION)
    min_devices: int = _setting(2, "Devices that must be there before a round begins.", *_at_least(1))
    min_replies: int = _setting(
        1,
        "Usable replies that a round needs. With `privacy.secure-sum` a device takes part in no sum of fewer.",
        *_at_least(1),
    )
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
        "the newest that was begun. The devices and all other keys must be as they were, but for `min-devices`, "
        "`max-failed-rounds`, `round-timeout-s`, `wait-timeout-s`, `keep-rounds`, `output-dir`, and what `remote` may "
        "take of time, money and disk.",
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

    @property
    def replies_needed(self) -> int:
        """Usable replies without which no round is complete."""
        return max(self.min_replies, SECURE_SUM_DEVICES if self.privacy.secure_sum else 1)
