"""``fedpt serve``: options and their checks; the service itself is in ``fedpt_flwr.service``."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from fedpt_flwr.cli.console import note
from fedpt_flwr.cli.loading import find_large, open_run
from fedpt_flwr.cli.options import Alpha, Device, Large, LargeDeviceMap, LargeName, LargeUrl, Plausibility, Prepare, Run
from fedpt_flwr.errors import ConfigError, naming

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


def serve(
    run: Run = "latest",
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8080,
    follow: Annotated[bool, typer.Option("--follow", help="Go over to whatever run is the newest.")] = False,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="FEDPT_API_KEY", help="Ask for this key; several may be given, in the variable with spaces between."
        ),
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Texts that are written at once.")] = 32,
    queue: Annotated[int, typer.Option(min=1, help="Texts that may wait; whoever comes then gets a 429.")] = 128,
    prefill_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of prompts that are read between two steps of the others' texts.")
    ] = 512,
    draft_tokens: Annotated[
        str,
        typer.Option(
            help="Tokens that the tuned model drafts for the proxy at a time: `auto`, as many as pay, or a number."
        ),
    ] = "auto",
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer that may be asked for, if the models' context allows it.")
    ] = 4096,
    full_logprobs: Annotated[
        int,
        typer.Option(
            min=0, help="Log-probabilities that a request may ask for at once, where it wants all; 0: no such requests."
        ),
    ] = 1 << 22,
    request_timeout_s: Annotated[float, typer.Option(min=0.001, help="Until a request must be done.")] = 600.0,
    grace_s: Annotated[float, typer.Option(min=0.0, help="Time for running requests after SIGTERM.")] = 30.0,
    poll_s: Annotated[float, typer.Option(min=0.01, help="Seconds between two looks for a new round.")] = 1.0,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Another name by which the service may be called; without a key it goes by those of this machine only."
        ),
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts into the log.")] = False,
    ssl_certfile: Annotated[Path | None, typer.Option(help="TLS certificate (chain) in PEM form.")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="Its private key.")] = None,
    ssl_keyfile_password: Annotated[
        str | None, typer.Option(envvar="FEDPT_SSL_KEYFILE_PASSWORD", help="Password of the private key.")
    ] = None,
    alpha: Alpha = None,
    plausibility: Plausibility = None,
    large: Large = None,
    large_url: LargeUrl = None,
    large_name: LargeName = None,
    large_device_map: LargeDeviceMap = None,
    device: Device = "auto",
    prepare: Prepare = True,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default the run's.")] = None,
) -> None:
    """Serve a run's proxy-tuned model to everything that speaks the OpenAI API, with a page to try it at /.

    New rounds of the run are picked up while it serves. Models: `proxy`, `large`, `tuned`, `untuned`.
    """
    folder, config = open_run(run)
    from transformers import logging as transformers_logging

    from fedpt_flwr import packing
    from fedpt_flwr.generation import Drafts
    from fedpt_flwr.logits import check_alpha, check_plausibility
    from fedpt_flwr.service import server
    from fedpt_flwr.service.guard import ServiceConfig
    from fedpt_flwr.service.scheduler import Limits
    from fedpt_flwr.service.versions import Loader

    with naming("--alpha"):
        check_alpha(1.0 if alpha is None else alpha)
    with naming("--plausibility"):
        check_plausibility(0.0 if plausibility is None else plausibility)
    with naming("--draft-tokens"):
        drafts = Drafts(int(draft_tokens) if draft_tokens.isdecimal() else draft_tokens).draft_tokens
    limits = Limits(num_slots=slots, queue_size=queue, prefill_tokens=prefill_tokens, draft_tokens=drafts)
    given = os.environ.get("FEDPT_API_KEY")
    if any(not key.strip() or not key.isascii() for key in api_key or ()) or (given is not None and not given.strip()):
        raise ConfigError(
            "an API key must be ASCII text and not empty",
            place="--api-key or FEDPT_API_KEY",
            remedy="for a service without a key leave both out",
        )
    for option, value in (("request-timeout-s", request_timeout_s), ("grace-s", grace_s), ("poll-s", poll_s)):
        if not math.isfinite(value):
            raise ConfigError("must be a finite number of seconds", value=value, place=f"--{option}")
    is_loopback = host in _LOOPBACK
    # With a key, or where others reach it, it goes by any name: one that is allowed must not be the only one.
    hosts = frozenset() if api_key or not is_loopback else _LOOPBACK | {name.lower() for name in allow_host or ()}
    if not api_key and not is_loopback:
        said = f"fedpt: anybody who reaches {host} may use the service; --api-key asks for a key"
        note(said, style="yellow")
    if prepare and (advice := packing.advice()):
        note(f"fedpt: {advice}")
    transformers_logging.disable_progress_bar()
    note(f"Loading {folder}")
    # A run's own service is connected to with each run that is followed; only what is said here holds for all of them.
    is_said = large is not None or large_url is not None or large_name is not None
    found = find_large(folder, config, large, large_url, large_name) if is_said else None

    def on_ready(version: Any, address: str) -> None:
        said = f"Serving {version.name} at {address} (the page) and {address}/v1 (for OpenAI clients); Ctrl-C ends it"
        note(said)

    server.serve(
        folder,
        Loader(
            large=found,
            device=device,
            alpha=alpha,
            plausibility=plausibility,
            prepare=prepare,
            large_device_map=large_device_map,
        ),
        server.ServerConfig(
            host=host,
            port=port,
            grace_s=grace_s,
            ssl_certfile=ssl_certfile,
            ssl_keyfile=ssl_keyfile,
            ssl_keyfile_password=ssl_keyfile_password,
            follow=follow,
            poll_s=poll_s,
            num_threads=threads or config.threads.server,
        ),
        ServiceConfig(
            api_keys=tuple(key.strip() for key in api_key or ()),
            max_new_tokens=max_tokens,
            max_full_logprobs=full_logprobs,
            request_timeout_s=request_timeout_s,
            log_prompts=log_prompts,
            hosts=hosts,
        ),
        limits,
        on_ready=on_ready,
    )
