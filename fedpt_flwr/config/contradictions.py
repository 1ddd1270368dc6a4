"""Keys of a run config that are fine one by one and not together."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from fedpt_flwr.config.keys import (
    AUTO,
    NEED_SINGLE_UPDATES,
    PLAIN_MEANS,
    SAMPLINGS,
    SECURE_SUM_DEVICES,
    RunConfig,
    names_in,
)
from fedpt_flwr.errors import ConfigError, FedPTError

_Refuse = Callable[[str, str, Any, str], None]
"""Takes the keys, joined by " and ", the rule, the value and the remedy."""


def contradictions(config: RunConfig, wrong: set[str]) -> list[FedPTError]:
    """Keys that are fine one by one and not together; keys that are wrong already are left out."""
    found: list[FedPTError] = []

    def refuse(place: str, rule: str, value: Any, remedy: str) -> None:
        if not wrong & set(place.split(" and ")):
            found.append(ConfigError(rule, value=value, place=place, remedy=remedy))

    _check_training(config, refuse)
    _check_data(config, refuse)
    _check_teaching(config, refuse)
    if config.tuning.mode == "lora" and config.tuning.lora_aggregation == "exact":
        _check_exact(config, refuse)
    _check_choices(config, refuse)
    _check_stop(config, refuse)
    _check_promises(config, refuse)
    if config.privacy.is_on:
        _check_privacy(config, refuse)
    if config.privacy.secure_sum:
        _check_secure_sum(config, refuse)
    try:
        _check_arguments(config, refuse)
    except ConfigError as error:
        found.append(error)
    return found


def _check_training(config: RunConfig, refuse: _Refuse) -> None:
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


def _check_data(config: RunConfig, refuse: _Refuse) -> None:
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


def _check_teaching(config: RunConfig, refuse: _Refuse) -> None:
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


def _check_choices(config: RunConfig, refuse: _Refuse) -> None:
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
    if config.data.partitioner == "node-local" and "train" in names_in(config.data.choices):
        refuse(
            "data.choices and data.partitioner",
            "with node-local data the server has no data.train to find answers in",
            config.data.choices,
            "set data.choices='test', or a file of the server",
        )


def _check_arguments(config: RunConfig, refuse: _Refuse) -> None:
    """Raises a ConfigError itself where ``strategy.arguments`` are no arguments."""
    arguments = config.strategy.parsed_arguments()
    if config.train.fedprox_mu > 0 and "proximal_mu" in arguments:
        refuse(
            "train.fedprox-mu and strategy.arguments",
            "FedProx's mu is given twice",
            f"{config.train.fedprox_mu} and {arguments['proximal_mu']}",
            "give it in one place",
        )


def _check_secure_sum(config: RunConfig, refuse: _Refuse) -> None:
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
    if config.min_devices < SECURE_SUM_DEVICES:
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


def _check_exact(config: RunConfig, refuse: _Refuse) -> None:
    if config.strategy.name not in PLAIN_MEANS:
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


def _check_stop(config: RunConfig, refuse: _Refuse) -> None:
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


def _check_promises(config: RunConfig, refuse: _Refuse) -> None:
    """What asks for privacy that a run does not give, whether it is private or not."""
    privacy = config.privacy
    if privacy.sampling != SAMPLINGS[0]:
        refuse(
            "privacy.sampling",
            "no amplification holds here: who trains in a round follows from the seed, which every device knows",
            privacy.sampling,
            "leave it out; every round is then counted as if each device had trained in it",
        )
    if privacy.max_epsilon > 0 and not privacy.is_on:
        refuse(
            "privacy.dp and privacy.max-epsilon",
            "a run without noise keeps no budget",
            privacy.max_epsilon,
            "set privacy.dp='server-fixed', say, or leave privacy.max-epsilon out",
        )


def _is_same_source(one: str, other: str, *, splits: tuple[str, str]) -> bool:
    """Whether two sources have text in common, as far as their names tell: files have no splits, hub data sets do."""
    if not one or not other:
        return False
    path, other_path = _path_of(one), _path_of(other)
    if path is not None and other_path is not None:
        return _share_a_file(path, other_path)
    if path is not None or other_path is not None:
        return False
    (name, _, config), (other_name, _, other_config) = one.partition(":"), other.partition(":")
    same_config = config == other_config or not config or not other_config  # without one, it may be any
    return os.path.normpath(name) == os.path.normpath(other_name) and same_config and _share_a_split(*splits)


def _path_of(source: str) -> Path | None:
    """Where a source really lies; None for one of the hub."""
    if source.startswith("/"):
        return Path(os.path.realpath(source))
    if not source.startswith("demo:"):
        return None
    name = f"{source.removeprefix('demo:')}.jsonl"
    try:
        return Path(os.path.realpath(str(resources.files("fedpt_demo_world") / name)))
    except ModuleNotFoundError:  # then nobody can read it
        return Path(source)


def _share_a_file(one: Path, other: Path) -> bool:
    """Whether one path is the other or a file in it, or both are folders with a file in common."""
    files, other_files = _files_in(one), _files_in(other)
    # By name alone too: the devices' folder need not be there where this is asked.
    is_in = (one.parent == other and files == {one}) or (other.parent == one and other_files == {other})
    return is_in or not files.isdisjoint(other_files)


def _files_in(path: Path) -> set[Path]:
    """Where the files of a folder really lie; a path that is none stands for itself."""
    try:
        return {Path(os.path.realpath(entry)) for entry in path.iterdir() if not entry.is_dir()}
    except OSError:
        return {path}


def _share_a_split(one: str, other: str) -> bool:
    """Whether two splits may overlap: of slices such as ``train[:10%]`` only the name counts."""
    names, other_names = ({part.partition("[")[0].strip() for part in split.split("+")} for split in (one, other))
    return not names.isdisjoint(other_names) or "all" in names | other_names


def _check_privacy(config: RunConfig, refuse: _Refuse) -> None:
    """What epsilon would say nothing about must not be."""
    privacy, data = config.privacy, config.data
    if config.strategy.name not in PLAIN_MEANS:
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
        splits = getattr(data, f"{name}_split"), data.train_split
        if data.partitioner != "node-local" and _is_same_source(source, data.train, splits=splits):
            refuse(
                f"privacy.dp and data.{name}",
                "must not be the devices' text: epsilon does not cover what the server reads itself",
                source,
                f"set data.{name} to text of the server",
            )
    splits = data.choices_split, data.train_split
    if "train" in names_in(data.choices) or _is_same_source(data.choices, data.train, splits=splits):
        refuse(
            "privacy.dp and data.choices",
            "answers found in data.train are the devices' text, which epsilon does not cover",
            data.choices,
            "set data.choices='test', or a file of the server",
        )
