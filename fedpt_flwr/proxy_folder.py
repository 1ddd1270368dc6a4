"""The folder of a proxy: the tuned small model, and references to the two other models, which are never copied.

``config.json`` says where they are and which they are, by fingerprints of their weights. What is read from there is
checked before a weight is loaded.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fedpt_flwr import packing
from fedpt_flwr.errors import ModelError
from fedpt_flwr.logits import check_alpha, check_plausibility
from fedpt_flwr.models import (
    fingerprint,
    hub_revision,
    is_remote,
    load_adapter,
    load_causal_lm,
    load_tokenizer,
    resolve_model,
)
from fedpt_flwr.paths import expanded, is_folder
from fedpt_flwr.placement import Placement
from fedpt_flwr.remote import connect_again, is_address
from fedpt_flwr.vocabulary import IdMap, translate, translation_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_TUNED_FOLDER = "tuned"
_UNTUNED_FOLDER = "untuned"

BUNDLED = "bundled:untuned"
"""The reference of an untuned model that lies in the proxy's own folder, because it is nowhere else."""

_OF_LARGE = ("ref", "fingerprint", "dtype", "ids")
_DTYPES = ("float32", "bfloat16", "float16")


class ProxyConfig(PreTrainedConfig):
    """What a proxy folder's ``config.json`` holds."""

    model_type = "fedpt_proxy"
    keys_to_ignore_at_inference = ["cache"]  # noqa: RUF012 (the name and form that transformers reads)

    alpha: float = 1.0
    """Strength of the shift."""
    plausibility: float = 0.0
    """Mask threshold in [0, 1); 0 is off."""
    large: dict[str, str] = field(default_factory=dict)
    """The large model's ``ref``, ``fingerprint`` and ``dtype``; empty until saved. With ``ids`` (a hash of the map in
    the folder) it is translated to the small model's ids; with the names of a ``Placement`` it is loaded so."""
    untuned: dict[str, str] = field(default_factory=dict)
    """The same of the small model before tuning."""
    tuned: dict[str, str] = field(default_factory=dict)
    """``form`` (``full`` or ``adapter``) and ``dtype`` of the folder ``tuned``."""
    vocab_size: int = 0
    """Width of the scores, padding included: the large model's."""
    real_vocab_size: int = 0
    """Number of ids that are tokens; scores of later ids are -inf."""
    max_position_embeddings: int | None = None
    """The longest text in tokens that all three models take; None if none of them says."""
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True


class Models(NamedTuple):
    """The parts of a proxy, and what is known of them."""

    large: PreTrainedModel
    tuned: PreTrainedModel | PeftModel
    untuned: PreTrainedModel | None
    config: ProxyConfig


def write_folder(
    folder: Path,
    models: Models,
    *,
    large_ref: str | None,
    untuned_ref: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Write a proxy's folder, ``config.json`` last; see :meth:`~fedpt_flwr.proxy.ProxyModel.save_pretrained`."""
    config, tuned = models.config, models.tuned
    small = base_model(tuned if models.untuned is None else models.untuned)
    large_ref = _reference("large", large_ref, config.large, models.large)
    untuned_ref = _reference("untuned", untuned_ref, config.untuned, small)
    untuned_fingerprint = fingerprint(_Unadapted(tuned) if models.untuned is None else models.untuned)
    if is_adapted(tuned) and fingerprint(_Unadapted(tuned)) != untuned_fingerprint:
        raise ModelError(
            "an adapter can be saved only if it sits on the untuned model's weights",
            value=untuned_ref,
            place=str(folder),
            remedy="merge the adapter into the tuned model (merge_and_unload) before making the proxy",
        )
    if is_adapted(tuned) and untuned_ref == BUNDLED:
        raise ModelError(
            "an adapter is saved with a reference to its base model, which is not written along",
            value=untuned_ref,
            place=str(folder),
            remedy="pass untuned_ref: demo:small, a hub id or a folder",
        )
    (folder / "config.json").unlink(missing_ok=True)
    # Removed, not overwritten: the weights in memory may be mapped from these very files.
    shutil.rmtree(folder / _TUNED_FOLDER, ignore_errors=True)
    (folder / _TUNED_FOLDER).mkdir(parents=True)
    if is_adapted(tuned):
        _save_adapter(tuned, folder / _TUNED_FOLDER, base_ref=untuned_ref)
    else:
        tuned.save_pretrained(folder / _TUNED_FOLDER)
    shutil.rmtree(folder / _UNTUNED_FOLDER, ignore_errors=True)
    if untuned_ref == BUNDLED:
        small.save_pretrained(folder / _UNTUNED_FOLDER)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    # What else the entry says stays: how the large model is loaded.
    entry = {"ref": large_ref, "fingerprint": fingerprint(models.large), "dtype": dtype_name(models.large)}
    if is_remote(models.large):
        entry |= models.large.reference()
    id_map = translation_of(models.large)
    if id_map is not None:
        id_map.save(folder)
        entry["ids"] = id_map.digest()
    config.large = Placement.from_entry(config.large).to_entry() | entry
    config.untuned = {"ref": untuned_ref, "fingerprint": untuned_fingerprint, "dtype": dtype_name(small)}
    config.tuned = {"form": "adapter" if is_adapted(tuned) else "full", "dtype": dtype_name(tuned)}
    config.save_pretrained(folder)


def save_small(
    model: PreTrainedModel | PeftModel, folder: Path, base_ref: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write a small model by itself, full or as an adapter on the base model, with its tokenizer."""
    if is_adapted(model):
        # Resolved: whoever loads the adapter knows no demo world.
        _save_adapter(model, folder, base_ref=_absolute(resolve_model(base_ref)))
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _save_adapter(model: PeftModel, folder: Path, *, base_ref: str) -> None:
    """Write the active adapter. peft's own method adds a model card, names this machine's paths and may ask the hub."""
    from peft import get_peft_model_state_dict

    name = model.active_adapter
    config = copy.copy(model.peft_config[name])
    config.inference_mode = True
    config.base_model_name_or_path, config.revision = hub_revision(base_ref)
    config.save_pretrained(str(folder))
    weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    # Cloned, because safetensors refuses tensors that share memory.
    weights = {key: weight.detach().to("cpu", copy=True).contiguous() for key, weight in weights.items()}
    save_file(weights, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})


def _reference(role: str, given: str | None, stored: Mapping[str, str], model: PreTrainedModel) -> str:
    """Where a model can be found again: as told, as loaded, or as transformers remembers."""
    ref = given or stored.get("ref") or getattr(model, "name_or_path", "")
    if not ref:
        raise ModelError(
            f"it is unknown where the {role} model came from, so the proxy could not be loaded again",
            place="save_pretrained",
            remedy=f"pass {role}_ref: demo:{'large' if role == 'large' else 'small'}, a hub id or a folder",
        )
    return _absolute(ref)


def _absolute(ref: str) -> str:
    """A reference that means the same in every working directory."""
    if ref.startswith("demo:") or ref == BUNDLED or is_address(ref):
        return ref
    path = expanded(ref)
    return str(path.resolve()) if is_folder(path) or ref.startswith((".", "~")) else ref


def proxy_folder(path: Path) -> Path:
    """The folder that holds the proxy's files; a run's link is followed once, since a running server may swap it."""
    path = expanded(path)
    if not is_folder(path):
        raise ModelError(
            "a proxy is loaded from a folder that exists",
            value=str(path),
            remedy="pass a run's folder, or the proxy in it",
        )
    folder = path / "proxy" if (path / "proxy").is_dir() else path
    folder = folder.resolve()
    if not (folder / "config.json").is_file():
        raise ModelError(
            "a proxy's folder must hold config.json",
            value=str(path),
            remedy="pass the folder of a run that has completed a round, or its proxy",
        )
    return folder


def check_proxy(folder: Path) -> None:
    """Check that a folder holds all of a proxy's own files, without loading its weights.

    Raises:
        ModelError: It does not.
    """
    config = checked(read_config(proxy_folder(folder)), folder)
    for name in (_TUNED_FOLDER, *([_UNTUNED_FOLDER] if config.untuned["ref"] == BUNDLED else [])):
        if not any((folder / name).glob("*.safetensors")):
            raise ModelError("a proxy's folder must hold its weights", value=f"none in {name}", place=str(folder))


def read_config(folder: Path) -> ProxyConfig:
    """What ``config.json`` says, unchecked but for being a proxy's."""
    file = folder / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # lists within lists without end
        raise ModelError(
            f"config.json of a proxy must be readable JSON ({error})", place=str(file), remedy="copy the folder again"
        ) from error
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if model_type != ProxyConfig.model_type:
        raise ModelError(
            f"config.json of a proxy must have model_type {ProxyConfig.model_type!r}",
            value=model_type,
            place=str(file),
            remedy="pass the folder of a run or of a proxy; other models are loaded with AutoModelForCausalLM",
        )
    try:
        config: ProxyConfig = ProxyConfig.from_dict(content)
    except Exception as error:  # a value of another type fails in any way: AttributeError, TypeError, validators' own
        raise ModelError(
            f"config.json of a proxy holds what no config does ({type(error).__name__}: {error})",
            place=str(file),
            remedy="write the folder again with save_pretrained",
        ) from error
    return config


def checked(config: ProxyConfig, folder: Path) -> ProxyConfig:
    """The config, if it says all that loading needs."""
    place = str(folder / "config.json")
    try:
        check_alpha(config.alpha)
        check_plausibility(config.plausibility)
    except ModelError as error:
        error.place = place
        raise
    wanted = {
        "large": ("ref", "fingerprint", "dtype"),
        "untuned": ("ref", "fingerprint", "dtype"),
        "tuned": ("form", "dtype"),
    }
    for name, keys in wanted.items():
        entry = getattr(config, name)
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) and entry[key] for key in keys):
            raise ModelError(
                f"config.json of a proxy must say {', '.join(keys)} of {name}",
                value=entry,
                place=place,
                remedy="write the folder again with save_pretrained",
            )
        for key, value in entry.items():
            if not isinstance(value, str):
                raise ModelError(
                    f"config.json of a proxy must say {key} of {name} as text, as a run config does",
                    value=value,
                    place=place,
                    remedy="write the folder again with save_pretrained",
                )
        known_dtype(entry["dtype"], place=place)
    if config.tuned["form"] not in ("full", "adapter"):
        raise ModelError("the form of a tuned model must be full or adapter", value=config.tuned["form"], place=place)
    if type(config.real_vocab_size) is not int or config.real_vocab_size < 1:
        raise ModelError("real_vocab_size must be a positive number", value=config.real_vocab_size, place=place)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = getattr(config, name)
        if not all(number is None or type(number) is int for number in (given if isinstance(given, list) else [given])):
            raise ModelError(f"{name} must be a token's number", value=given, place=place)
    return config


def load_large(
    folder: Path,
    config: ProxyConfig,
    large: str | Path | PreTrainedModel | None,
    device: str,
    placement: Placement,
    *,
    like: Models | None,
    dtype: str | None = None,
) -> PreTrainedModel:
    """The large model that a folder refers to: that of ``like``, the one given, or loaded.

    ``config.large`` then says where it is now. With ``dtype``, that of ``like`` is taken only if it has this one.
    """
    is_asked = isinstance(large, nn.Module) and is_remote(large)  # it may be asked otherwise than the one before
    if like is not None and not is_asked and _is_same(config.large, like.config.large, dtype):
        large_model = like.large
    elif isinstance(large, nn.Module):
        large_model = large
        if is_remote(large_model):  # its vocabulary was compared, and its weights are nobody's business
            pass
        elif dtype_name(large_model) != config.large["dtype"]:
            _log.warning("the large model is not compared with the proxy's: it has another dtype")
        else:
            _check_fingerprint("large", large_model, config.large, folder)
    else:
        if large is not None:
            config.large = {**config.large, "ref": _absolute(str(large))}
        large_model = _load("large", config.large, device, folder, placement, is_given=large is not None)
    placed = placement.to_entry()
    config.large = {name: value for name, value in config.large.items() if name in _OF_LARGE} | placed
    if "ids" in config.large:
        translate(large_model, IdMap.load(folder, config.large["ids"]))
    elif translation_of(large_model) is not None:
        raise ModelError(
            "the large model is translated to another small model's ids",
            place=str(folder),
            remedy="load it once more for this proxy",
        )
    return large_model


def load_small(
    folder: Path, config: ProxyConfig, device: str, *, like: Models | None, dtype: str | None = None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedModel | None]:
    """The tuned small model and the untuned one, which an adapter has below it."""
    if like is not None and like.untuned is not None and _is_same(config.untuned, like.config.untuned, dtype):
        # Not under an adapter, which would be put into the very weights that the other proxy uses.
        untuned = like.untuned
        if config.tuned["form"] == "adapter":
            untuned = copy.deepcopy(untuned)
            packing.restore(untuned)
    else:
        untuned = _load("untuned", config.untuned, device, folder)
    if config.tuned["form"] == "adapter":
        return _load_tuned(folder, config.tuned, device, base=untuned), None
    return _load_tuned(folder, config.tuned, device, base=None), untuned


def _load(
    role: str,
    entry: Mapping[str, str],
    device: str,
    folder: Path,
    placement: Placement | None = None,
    *,
    is_given: bool = False,
) -> PreTrainedModel:
    """Load a model that the proxy refers to, and make sure that it is the one."""
    remote = role == "large" and is_address(entry["ref"])
    try:
        if remote:
            return connect_again(entry, load_tokenizer(str(folder)), named_by_folder=not is_given)
        ref = str(folder / _UNTUNED_FOLDER) if role == "untuned" and entry["ref"] == BUNDLED else entry["ref"]
        model = load_causal_lm(ref, dtype=entry["dtype"], device=device, placement=placement)
    except (ModelError, SafetensorError) as error:
        lies_elsewhere = role == "large" and not remote and not isinstance(error.__cause__, ImportError)
        raise ModelError(
            f"the {role} model of the proxy cannot be loaded: {error}",
            place=str(folder),
            remedy="pass large=PATH, or --large PATH, if it lies elsewhere on this machine" if lies_elsewhere else None,
        ) from error
    _check_fingerprint(role, model, entry, folder)
    return model


def _check_fingerprint(role: str, model: PreTrainedModel, entry: Mapping[str, str], folder: Path) -> None:
    """Refuse a model that is not the one which the entry describes."""
    found = fingerprint(model)
    if found != entry["fingerprint"]:
        elsewhere = (
            "pass large=PATH, or --large PATH, with the original" if role == "large" else "bring the original back"
        )
        raise ModelError(
            f"the {role} model {entry['ref']} is not the one that this proxy was made with "
            f"(fingerprint {entry['fingerprint']})",
            value=found,
            place=str(folder),
            remedy=f"{elsewhere}, or train again with this one",
        )


def _load_tuned(
    folder: Path, entry: Mapping[str, str], device: str, *, base: PreTrainedModel | None
) -> PreTrainedModel | PeftModel:
    """Load the folder's own weights: a full model, or an adapter put on ``base``."""
    tuned = folder / _TUNED_FOLDER
    files = (
        ("config.json", "model*.safetensors") if base is None else ("adapter_config.json", "adapter_model.safetensors")
    )
    for pattern in files:
        if not any(tuned.glob(pattern)):
            raise ModelError(
                "a proxy's folder must hold the tuned small model",
                value=f"no {_TUNED_FOLDER}/{pattern}",
                place=str(folder),
                remedy="copy the whole folder",
            )
    try:
        if base is None:
            model: PreTrainedModel | PeftModel = load_causal_lm(str(tuned), dtype=entry["dtype"], device=device)
        else:
            model = load_adapter(base, tuned)
    except SafetensorError as error:
        raise ModelError(
            f"the weights of the tuned small model are damaged ({error})",
            place=str(tuned),
            remedy="copy the folder again",
        ) from error
    for name, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):  # it would answer all the same, with nonsense
            raise ModelError(
                "a tuned model's weights must be finite", value=name, place=str(tuned), remedy="copy the folder again"
            )
    return model


def _is_same(entry: Mapping[str, str], other: Mapping[str, str], dtype: str | None) -> bool:
    """Whether two entries of proxy configs mean one model, wherever it lies; the first converted to ``dtype``."""
    wanted = {**entry, "dtype": dtype or entry["dtype"]}
    return all(wanted.get(key) == other.get(key) for key in ("fingerprint", "dtype", "ids", "quantization"))


def dtype_name(model: nn.Module) -> str:
    """``float32`` and the like, of a model's weights below any adapter."""
    return str(base_model(model).dtype).removeprefix("torch.")


def known_dtype(dtype: str | torch.dtype, *, place: str | None = None) -> str:
    """The name of a dtype that a proxy's models may have; others are refused."""
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ModelError(f"a model's dtype must be one of {', '.join(_DTYPES)}", value=name, place=place)
    return name


def is_adapted(model: nn.Module) -> bool:
    """Whether a model carries an adapter of peft."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def base_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model below an adapter, or itself."""
    return model.get_base_model() if is_adapted(model) else model


def is_adapter(part: nn.Module) -> bool:
    """Whether a module is a layer that peft put around another one."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper)


class _Unadapted(nn.Module):
    """The weights below an adapter, under the names that they have without it: what ``fingerprint`` needs to see."""

    def __init__(self, adapted: PeftModel) -> None:
        super().__init__()
        self.base = base_model(adapted)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter that is not the adapter's."""
        wrappers = {name for name, part in self.base.named_modules() if is_adapter(part)}
        for name, weight in self.base.named_parameters(*args, **kwargs):
            path = name.split(".")
            depth = next((i for i in range(len(path), 0, -1) if ".".join(path[:i]) in wrappers), None)
            if depth is None:
                yield name, weight
            elif path[depth] in ("base_layer", "original_module"):
                yield ".".join(path[:depth] + path[depth + 1 :]), weight
