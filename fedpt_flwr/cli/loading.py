"""A run's folder and its models, for the commands that answer or score with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpt_flwr.cli.console import note
from fedpt_flwr.errors import ConfigError, RunError, naming

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fedpt_flwr.config import RunConfig
    from fedpt_flwr.proxy import ProxyModel
    from fedpt_flwr.remote import RemoteModel


def open_run(name: str) -> tuple[Path, RunConfig]:
    """The folder and the config of a run that has a model."""
    from fedpt_flwr.runs import find_run, recorded_config

    folder = find_run(name)
    if not (folder / "config.json").is_file():
        raise RunError("must be the folder of a run, with a config.json", value=str(folder))
    config = recorded_config(folder)
    if not (folder / "proxy").is_dir():
        usable = sorted(
            path.name for path in folder.parent.glob("*") if (path / "proxy").is_dir() and not path.is_symlink()
        )
        raise RunError(
            f"the run {folder.name} ended before its first round was complete, so it has no model",
            remedy=f"the newest that has one is {usable[-1]}" if usable else "make another with `flwr run . --stream`",
        )
    return folder, config


def find_large(
    folder: Path, config: RunConfig, large: str | None, url: str | None, name: str | None
) -> str | RemoteModel | None:
    """Where the large model is: here, at a service, or (None) where the run had it."""
    if large is not None and (url is not None or name is not None):
        raise ConfigError("the large model is either here or at a service", place="--large and --large-url")
    address = url or ("" if large is not None else config.model.large_url)
    if not address:
        if name is not None:
            raise ConfigError("names a model of a service", value=name, place="--large-name", remedy="add --large-url")
        return large
    from dataclasses import replace

    import fedpt_flwr.proxy  # noqa: F401 (tells transformers about the folder's config)
    from fedpt_flwr.models import load_tokenizer
    from fedpt_flwr.remote import connect

    is_other = address != config.model.large_url
    settings = replace(config.remote, model=name or ("" if is_other else config.remote.model))
    tokenizer = load_tokenizer(str((folder / "proxy").resolve()))
    model = connect(address, tokenizer, settings, named_by_folder=not url)
    asked = model.endpoint
    said = f"Large model {asked.model} at {asked.url}; log-probabilities: {asked.shows}"
    note(said, style="dim")
    return model


def remote_spending(large: RemoteModel) -> dict[str, Any]:
    """Say what a remote large model has cost; the same for a file."""
    from fedpt_flwr.endpoint import Usage

    spent = large.usage_since(Usage())
    price = f", price {spent['remote_price']:.6f}" if "remote_price" in spent else ""
    said = (
        f"Remote large model: {spent['remote_requests']} requests, {spent['remote_retries']} repeated; "
        f"{spent['remote_tokens_sent']} tokens sent, {spent['remote_tokens_received']} received{price}; "
        f"{spent['remote_recalled']} answers were known"
    )
    note(said, style="dim")
    return spent


def load_proxy(
    folder: Path,
    large: str | RemoteModel | None,
    device: str,
    alpha: float | None,
    plausibility: float | None,
    *,
    prepare: bool = False,
    large_device_map: str | None = None,
) -> tuple[ProxyModel, PreTrainedTokenizerBase]:
    """A run's proxy and its tokenizer; what is None is as the run has it."""
    from transformers import logging as transformers_logging

    from fedpt_flwr.models import load_tokenizer, pick_device
    from fedpt_flwr.proxy import ProxyModel

    transformers_logging.disable_progress_bar()
    proxy = ProxyModel.from_pretrained(
        folder,
        large=large,
        large_device_map=large_device_map,
        device=str(pick_device(device)),
        prepare=prepare,
    )
    if alpha is not None:
        proxy.alpha = alpha
    if plausibility is not None:
        proxy.plausibility = plausibility
    return proxy, load_tokenizer(str((folder / "proxy").resolve()))


def untouched(folder: Path, config: RunConfig, device: str) -> PreTrainedModel | None:
    """The small model of round 0 where the proxy's untuned model is another one, as the mode `paired` makes it."""
    from fedpt_flwr.models import fingerprint, load_causal_lm
    from fedpt_flwr.runs import read_json

    if config.distillation.mode != "paired":
        return None
    with naming("model.small"):
        model = load_causal_lm(config.model.small, dtype=config.model.small_dtype, device=device)
    recorded = read_json(folder / "config.json").get("fingerprints", {}).get("small")
    if fingerprint(model) != recorded:
        raise RunError(
            f"{config.model.small} is not the small model that this run began with (fingerprint {recorded})",
            value=fingerprint(model),
            place=str(folder),
            remedy="bring the original back",
        )
    return model
