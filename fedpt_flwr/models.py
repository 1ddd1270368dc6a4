"""Language models and tokenizers: find, load, place; and the weights that tuning changes.

A model is named by a reference: ``demo:small`` and ``demo:large`` are the checkpoints that the project carries,
anything else is a hub id, ``owner/name`` or ``owner/name@revision``, or the absolute path of a folder in the hub's
layout. Nothing here knows rounds, devices or Flower.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.accelerate import load_offloaded_parameter

from fedpt_flwr.config import ModelConfig, TuningConfig
from fedpt_flwr.errors import ConfigError, ModelError
from fedpt_flwr.lora import is_right
from fedpt_flwr.paths import expanded, is_folder
from fedpt_flwr.placement import Placement

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAMPLES_PER_TENSOR = 512
_BITSANDBYTES = "bitsandbytes.autograd._functions"
"""The logger that says at every layer of every pass of an 8-bit model to what its inputs are cast."""

WORTH_RESTING_BYTES = 32 * 1024**2
"""Small models whose tuned weights take this much have memory on the server only while they are used."""


def large_placement(config: ModelConfig) -> Placement:
    """Where and in which form a run loads its large model."""
    return Placement(
        device_map=config.large_device_map,
        max_memory=config.large_max_memory,
        offload_folder=config.large_offload_folder,
        quantization=config.large_quantization,
    )


def resolve_model(ref: str) -> str:
    """The folder or hub id that a reference means.

    Args:
        ref: ``demo:small``, ``demo:large``, an absolute folder, or a hub id, with ``@`` and a revision or without.

    Raises:
        ModelError: There is no such demo model, or no such folder, or no revision after the ``@``.
    """
    if ref.startswith("demo:"):
        return str(_demo_folder(ref))
    folder = expanded(ref)
    if folder.is_absolute():
        if not is_folder(folder):
            raise ModelError(
                "a model's path must be a folder that exists",
                value=ref,
                remedy="check the path on the machine that loads it",
            )
        if not (folder / "config.json").is_file():
            raise ModelError(
                "a model's folder must hold config.json and the weights, as save_pretrained writes them", value=ref
            )
        return str(folder)
    if ref.endswith("@"):
        raise ModelError(
            "after the @ of a hub id must stand a revision",
            value=ref,
            remedy="name a commit, a tag or a branch, as in owner/name@main, or leave the @ out",
        )
    if is_folder(folder):  # transformers would take it for the hub's
        raise ModelError(
            "a model's folder must be given by its absolute path, because Flower's processes run in other folders",
            value=ref,
            remedy=f"type {folder.resolve()}",
        )
    return ref


def hub_revision(source: str) -> tuple[str, str | None]:
    """What :func:`resolve_model` returned, without the revision, and the revision that it asks for, if any."""
    if Path(source).is_absolute():
        return source, None
    name, _, revision = source.partition("@")
    return name, revision or None


def pretrained_source(ref: str) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` takes for a reference, and by which arguments; errors as of :func:`resolve_model`."""
    name, revision = hub_revision(resolve_model(ref))
    return name, {} if revision is None else {"revision": revision}


def load_tokenizer(ref: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer; one without a padding token pads with its end-of-text token.

    Raises:
        ModelError: It cannot be loaded, or has no end-of-text token.
    """
    source, version = pretrained_source(ref)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **version)
    except Exception as error:  # a damaged file fails in any way: AttributeError, TypeError, plain Exception
        raise _cannot_load("tokenizer", ref, error) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "a tokenizer must have an end-of-text token, or answers would never end",
            value=ref,
            remedy="set eos_token in its tokenizer_config.json",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(
    ref: str, *, dtype: str = "float32", device: str = "cpu", placement: Placement | None = None
) -> PreTrainedModel:
    """Load a causal LM, frozen and in evaluation mode.

    Args:
        ref: See :func:`resolve_model`.
        dtype: Type of the weights: ``float32``, ``bfloat16`` or ``float16``; with a quantisation, of those that stay.
        device: Torch device, or ``auto``; unused where ``placement`` divides the model.
        placement: Where the weights lie and in which form; None: all on ``device``, as they are stored.

    Raises:
        ModelError: It cannot be loaded, or not placed so.
    """
    source, version = pretrained_source(ref)
    placement = Placement() if placement is None else placement
    arguments = placement.arguments()
    if isinstance(arguments.get("device_map"), dict):
        arguments["device_map"] = _whole_device_map(arguments["device_map"], ref)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source, dtype=_DTYPES[dtype], use_safetensors=True, output_loading_info=True, **version, **arguments
        )
    except ImportError as error:
        raise placement.lacks_package(_first_line(error)) from error
    except Exception as error:  # a damaged file fails in any way
        if arguments:
            raise _cannot_place(ref, placement, error) from error
        raise _cannot_load("model", ref, error) from error
    if report["missing_keys"]:  # transformers would fill them with random numbers and go on
        raise ModelError(
            f"the checkpoint lacks {len(report['missing_keys'])} of the weights that its config.json speaks of",
            value=min(report["missing_keys"]),
            place=ref,
            remedy="get the model's files again",
        )
    if getattr(model, "is_quantized", False):
        logging.getLogger(_BITSANDBYTES).addFilter(_is_news)
    model.requires_grad_(False)
    loaded: PreTrainedModel = model.eval()
    if placement.is_divided():
        return loaded
    target = pick_device(device)
    return loaded if loaded.device == target else loaded.to(target)


def model_without_weights(ref: str) -> PreTrainedModel:
    """The model that a reference names on torch's ``meta`` device: all shapes and no memory, from its config alone.

    Args:
        ref: See :func:`resolve_model`.

    Raises:
        ModelError: Its config cannot be loaded.
    """
    source, version = pretrained_source(ref)
    try:
        config = AutoConfig.from_pretrained(source, **version)
    except Exception as error:  # a damaged file fails in any way
        raise _cannot_load("model", ref, error) from error
    return shapes_of(config, ref)


def shapes_of(config: PretrainedConfig, ref: str) -> PreTrainedModel:
    """The model that a config describes, on torch's ``meta`` device, frozen.

    Args:
        config: Of a causal LM.
        ref: What the user called it, for the error.

    Raises:
        ModelError: There is no causal LM with this config.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # sizes that contradict each other fail in any way
        raise _cannot_load("model", ref, error) from error
    return model.requires_grad_(False).eval()


def hold_frozen_weights_in(weights: Iterable[torch.nn.Parameter], dtype: str) -> None:
    """Convert weights in place, one after the other; a model's buffers (rotary frequencies) stay as they are.

    Args:
        weights: Of a frozen model.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
    """
    for weight in weights:
        weight.data = weight.data.to(_DTYPES[dtype])


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the LoRA adapter of a folder on a base model, frozen and in evaluation mode.

    Raises:
        ModelError: The folder holds no adapter that fits the base, or the base is prepared for decoding.
    """
    from peft import PeftModel

    check_plain(base)
    try:
        with _by_an_old_name():
            model = PeftModel.from_pretrained(base, str(folder), is_trainable=False)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _cannot_load("adapter", str(folder), error) from error
    return model.eval()


def pick_device(name: str) -> torch.device:
    """The torch device that a config means: ``auto`` is CUDA where there is any, else the CPU.

    Raises:
        ModelError: That device is not on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError("must be auto, cpu, cuda, cuda:1 or mps", value=name, place="device") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"this process sees {torch.cuda.device_count()} CUDA devices",
            value=name,
            place="model.device",
            remedy="use auto; in simulation, devices see a GPU only with --federation-config "
            '"client-resources-num-gpus=0.5" or the like',
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("this machine has no MPS device", value=name, place="model.device", remedy="use auto")
    return device


def check_plain(model: torch.nn.Module) -> None:
    """Make sure that a model's weights can be read and written: those packed for decoding cannot.

    Raises:
        ModelError: The model is prepared for decoding (``packing.py``).
    """
    for name, part in model.named_modules():
        if getattr(part, "prepared_for_decoding", False):
            raise ModelError(
                "weights can be saved, compared, changed or trained only while they are not prepared for decoding",
                value=name,
                remedy="undo that with packing.restore(model), or restore() of a proxy",
            )


def output_size(model: PreTrainedModel) -> int:
    """How many ids the model scores: the vocabulary with its padding, or what it was translated to."""
    head = model.get_output_embeddings()
    if head is None:  # a model that is not here has none
        return int(model.config.vocab_size)
    id_map = getattr(head, "id_map", None)  # of vocabulary.py
    return int(head.out_features if id_map is None else len(id_map.large_ids))


def input_device(model: PreTrainedModel | PeftModel) -> torch.device:
    """Where a model takes its inputs: where its first layer computes, wherever its weights lie."""
    if getattr(model, "hf_device_map", None) is None:  # of accelerate, where that divides a model
        return torch.device(model.device)
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)  # moves weights to where they are used
    device: int | str | torch.device | None = getattr(hook, "execution_device", None)
    return torch.device(model.device if device is None else device)


def is_remote(model: torch.nn.Module) -> bool:
    """Whether a model is a service's, so that every position which is looked at costs something."""
    return bool(getattr(model, "is_remote", False))


def hides_tokens(model: torch.nn.Module) -> bool:
    """Whether a model shows the log-probabilities of its likeliest tokens only; the others stand at -inf."""
    return bool(getattr(model, "hides_tokens", False))


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest text in tokens that the model was made for, or None where its config does not say."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def rope_parameters(config: PretrainedConfig) -> dict[str, Mapping[str, Any]]:
    """What a text model's config says of its rotary positions, by their kind; some models have several."""
    given = getattr(config, "rope_parameters", None) or {}
    all_given = [given, *(value for value in given.values() if isinstance(value, Mapping))]
    return {one["rope_type"]: one for one in all_given if one.get("rope_type") is not None}


def longrope_switch(model: PreTrainedModel) -> int | None:
    """The length in tokens past which all keys of a text are others (``longrope``); None where there is none."""
    switch = rope_parameters(model.config.get_text_config(decoder=True)).get("longrope", {})
    return switch.get("original_max_position_embeddings")


def steady_positions(model: PreTrainedModel) -> int | None:
    """The longest text in tokens whose keys stay as they are while it is written; None: of any length.

    Past it rotary positions of the kinds ``longrope`` and ``dynamic`` take other frequencies, for all keys and for
    every row of a pass.
    """
    kinds = rope_parameters(model.config.get_text_config(decoder=True))
    lengths = [longrope_switch(model)] if "longrope" in kinds else []
    lengths += [max_positions(model)] if "dynamic" in kinds else []
    return min((length for length in lengths if length is not None), default=None)


def check_context(config: PretrainedConfig, max_length: int) -> None:
    """Make sure that a small model can read texts as long as devices train on.

    Args:
        config: The small model's.
        max_length: The run config's ``train.max-length``.

    Raises:
        ConfigError: It cannot.
    """
    context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context is not None and max_length > context:
        raise ConfigError(
            f"must not exceed the {context} tokens that the small model can read",
            value=max_length,
            place="train.max-length",
        )


def make_tunable(model: PreTrainedModel, config: TuningConfig, *, seed: int) -> PreTrainedModel | PeftModel:
    """Choose the weights that tuning changes: all of them, or a new LoRA adapter.

    Args:
        model: The small model; it is changed in place.
        config: What to tune.
        seed: Seed of the adapter's first weights.

    Returns:
        The model, or the adapter around it, with ``requires_grad`` set.

    Raises:
        ModelError: The adapter's targets are not linear modules of the model, or it is prepared for decoding.
    """
    check_plain(model)
    if config.mode == "full":
        return model.requires_grad_(True)
    from peft import LoraConfig, get_peft_model

    wrong_targets = _wrong_targets(model, config.lora_targets)  # before peft changes the model
    targets: str | list[str] = config.lora_targets
    if targets != "all-linear":
        targets = [name.strip() for name in config.lora_targets.split(",") if name.strip()]
        modules = [(f".{name}", part) for name, part in model.named_modules()]
        found = [[part for name, part in modules if name.endswith(f".{target}")] for target in targets]
        # peft is content if one of several names is found, and gives the factors of an embedding other names.
        if not targets or not all(parts and all(map(_is_linear, parts)) for parts in found):
            raise wrong_targets
    with torch.random.fork_rng(devices=[]), _by_an_old_name():
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(
                model,
                LoraConfig(
                    r=config.lora_rank,
                    lora_alpha=config.lora_alpha,
                    lora_dropout=config.lora_dropout,
                    target_modules=targets,
                    fan_in_fan_out=_has_conv1d(model),
                    task_type="CAUSAL_LM",
                ),
            )
        except ValueError as error:
            raise wrong_targets from error
    if config.lora_aggregation == "frozen-a":
        for weight in _first_factors(adapted).values():
            weight.requires_grad_(False)
    return adapted


def _first_factors(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if is_right(name)}


def frozen_fingerprint(model: PreTrainedModel | PeftModel) -> str:
    """A hash of an adapter's first matrices where they are drawn and never sent; else empty."""
    frozen = {name: weight for name, weight in _first_factors(model).items() if not weight.requires_grad}
    digest = hashlib.sha256()
    for name, weight in frozen.items():
        digest.update(name.encode() + b"\0" + weight.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16] if frozen else ""


@torch.no_grad()
def cut_adapter(model: PreTrainedModel | PeftModel, rank: int) -> None:
    """Leave an adapter its first directions, in place; the scale of their product stays.

    Args:
        model: What :func:`make_tunable` made.
        rank: At most the adapter's.
    """
    for module in model.modules():
        if not hasattr(module, "lora_A") or not hasattr(module, "scaling"):
            continue
        for adapter in module.r:
            first, second = module.lora_A[adapter], module.lora_B[adapter]
            for part, kept in ((first, first.weight[:rank]), (second, second.weight[:, :rank])):
                part.weight = torch.nn.Parameter(kept.clone(), requires_grad=part.weight.requires_grad)
            first.out_features = second.in_features = module.r[adapter] = rank


@contextmanager
def _by_an_old_name() -> Iterator[None]:
    """Keep a warning from users who can do nothing about it: peft asks transformers by a name that will go."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        yield


def tunable_arrays(model: PreTrainedModel | PeftModel) -> dict[str, Tensor]:
    """The weights that tuning changes, by name, as float32 on the CPU; tied weights appear once.

    Raises:
        ModelError: The model is prepared for decoding.
    """
    check_plain(model)
    return {
        name: weight.detach().to("cpu", torch.float32, copy=True)
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


@torch.no_grad()
def set_arrays(model: PreTrainedModel | PeftModel, arrays: Mapping[str, Tensor]) -> None:
    """Overwrite weights by name, in place; the others stay.

    Args:
        model: The model.
        arrays: Tensors with the names and shapes of :func:`tunable_arrays`.

    Raises:
        ModelError: The model has no weight of that name and shape, or is prepared for decoding.
    """
    check_plain(model)
    for name, weight in _weights_for(model, arrays).items():
        weight.copy_(arrays[name])


@torch.no_grad()
def put_away(model: PreTrainedModel | PeftModel, names: Iterable[str]) -> None:
    """Give back the memory of some weights; they are zeros that must not be used until :func:`bring_back`.

    Args:
        model: The model.
        names: Of the weights.
    """
    weights = dict(model.named_parameters())
    for name in names:
        weights[name].data = weights[name].new_zeros(()).expand(weights[name].shape)


@torch.no_grad()
def bring_back(model: PreTrainedModel | PeftModel, arrays: Mapping[str, Tensor], *, copy: bool = True) -> None:
    """Give weights that were put away, or others, memory of their own with these values.

    Args:
        model: The model.
        arrays: Tensors with the names and shapes of the weights.
        copy: False: the very tensors that are given, where their device and type are the weights'.

    Raises:
        ModelError: The model has no weight of that name and shape.
    """
    for name, weight in _weights_for(model, arrays).items():
        # In memory that torch gets, which lies the same way in every run: the last bits of products depend on that.
        weight.data = arrays[name].to(weight.device, weight.dtype, copy=copy)


def _weights_for(model: PreTrainedModel | PeftModel, arrays: Mapping[str, Tensor]) -> dict[str, torch.nn.Parameter]:
    """The weights of these names; all are checked before one is changed."""
    weights = dict(model.named_parameters())
    for name, values in arrays.items():
        if name not in weights or weights[name].shape != values.shape:
            found = tuple(weights[name].shape) if name in weights else "no such weight"
            raise ModelError(
                f"array {name} of shape {tuple(values.shape)} must fit the small model",
                value=found,
                remedy="use the same model.small and tuning settings everywhere",
            )
    return {name: weights[name] for name in arrays}


@contextmanager
def cpu_threads(number: int) -> Iterator[None]:
    """Compute with this many CPU threads, and with as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fingerprint(model: torch.nn.Module) -> str:
    """A short hash of a model's weights as loaded: names, shapes, types and values at fixed places.

    It reads a few hundred values of each tensor, so it takes the same time for a model of any size; it tells models
    apart, and is no protection against somebody who wants to deceive.

    Raises:
        ModelError: The model is prepared for decoding.
    """
    check_plain(model)
    digest = hashlib.sha256(getattr(model, "identity", "").encode())  # of a model without weights
    for name, stored in model.named_parameters():
        weight = load_offloaded_parameter(model, name) if stored.is_meta else stored  # on disk, or in memory elsewhere
        flat = weight.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLES_PER_TENSOR)
        values = flat[::step].to("cpu", torch.float32).contiguous()
        digest.update(json.dumps([name, list(weight.shape), str(weight.dtype)]).encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


def _demo_folder(ref: str) -> Path:
    name = ref.removeprefix("demo:")
    try:
        root = Path(str(importlib.resources.files("fedpt_demo_world")))
    except ModuleNotFoundError as error:
        raise ModelError(
            "the package fedpt_demo_world is not installed here",
            value=ref,
            remedy="install the project with pip (`pip install -e .`), on every machine that runs a part of it",
        ) from error
    if name not in ("small", "large") or not (root / name / "config.json").is_file():
        raise ModelError("the demo world has the models demo:small and demo:large", value=ref)
    return root / name


def _whole_device_map(devices: Mapping[str, int | str], ref: str) -> dict[str, int | str]:
    """A device map in which no module lies within another and every weight has its place, as accelerate wants it.

    Raises:
        ModelError: A module or a device is not there, or a weight is left out; found before any weight is read.
    """
    place = "model.large-device-map"
    model = model_without_weights(ref)
    names = [name for name, _ in model.named_parameters()]
    # Of tied weights, accelerate wants a place for each; they are one, so the first's place is all of theirs.
    first = {id(weight): name for name, weight in model.named_parameters()}
    twins = {name: first[id(weight)] for name, weight in model.named_parameters(remove_duplicate=False)}
    for module, device in devices.items():
        if not any(_is_in(name, module) for name in twins):
            raise ModelError("a device map must name modules of the large model", value=module, place=place)
        if device not in ("cpu", "disk"):
            try:
                pick_device(f"cuda:{device}" if isinstance(device, int) else device)
            except ModelError as error:
                remedy = "name devices of this machine, cpu or disk"
                raise ModelError(error.rule, value=device, place=place, remedy=remedy) from error
    nearest = {name: max((part for part in devices if _is_in(name, part)), key=len, default=None) for name in names}
    left = [name for name, module in nearest.items() if module is None]
    if left:
        raise ModelError(
            f"a device map must place all weights; {len(left)} are left out, the first {left[0]}",
            value=dict(devices),
            place=place,
            remedy="name its module too, or set auto",
        )
    device_of = {name: devices[module] for name, module in nearest.items() if module is not None}
    device_of = {name: device_of[twin] for name, twin in twins.items()}

    def divided(name: str, module: torch.nn.Module) -> dict[str, int | str]:
        inside = {device for weight, device in device_of.items() if _is_in(weight, name)}
        children = [(f"{name}.{child}".lstrip("."), part) for child, part in module.named_children()]
        # A list of layers is never called, so nothing would be moved for it.
        if len(inside) == 1 and not isinstance(module, torch.nn.ModuleList):
            return dict.fromkeys([name], inside.pop())
        own = [f"{name}.{weight}".lstrip(".") for weight, _ in module.named_parameters(recurse=False)]
        found = {weight: device_of[weight] for weight in own if weight in device_of}
        for child, part in children:
            found |= divided(child, part)
        return found

    return divided("", model)


def _is_in(weight: str, module: str) -> bool:
    return not module or weight == module or weight.startswith(f"{module}.")


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


def _cannot_place(ref: str, placement: Placement, error: Exception) -> ModelError:
    keys = ", ".join(f"model.large-{name.replace('_', '-')}" for name in placement.to_entry())
    return ModelError(
        f"the model cannot be loaded in this way ({type(error).__name__}: {_first_line(error)})",
        value=ref,
        remedy=f"change {keys}",
    )


def _first_line(error: Exception) -> str:
    first, *others = (line.strip() for line in str(error).strip().split("\n"))
    return " ".join([first, *others[:1]] if first.endswith(":") else [first])[:300]


def _cannot_load(what: str, ref: str, error: Exception) -> ModelError:
    if isinstance(error.__cause__, LocalEntryNotFoundError):
        return ModelError(
            "the model is not on this machine, and the hub cannot be reached",
            value=ref,
            remedy=f"connect, or run `hf download {ref.replace('@', ' --revision ')}` while there is a connection, or "
            "give the absolute path of a folder",
        )
    return ModelError(
        f"the {what} cannot be loaded ({type(error).__name__}: {_first_line(error)})",
        value=ref,
        remedy="give an absolute folder with config.json, *.safetensors and tokenizer files, or a hub id that this "
        "machine can reach; weights in another format (.bin) are not loaded, save them again with save_pretrained",
    )


def _wrong_targets(model: torch.nn.Module, targets: str) -> ModelError:
    linear = sorted({name.rsplit(".", 1)[-1] for name, part in model.named_modules() if _is_linear(part)})
    return ModelError(
        "lora targets must be linear modules of the small model",
        value=targets,
        place="tuning.lora-targets",
        remedy=f"it has {', '.join(linear)}",
    )


def _is_linear(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _has_conv1d(model: torch.nn.Module) -> bool:
    return any(type(part).__name__ == "Conv1D" for part in model.modules())
