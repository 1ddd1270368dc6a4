"""``fedpt``: what one does with runs once they are there, and before one starts.

Heavy imports are inside the commands, so that ``fedpt --help`` answers at once.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fedpt_flwr.errors import ConfigError, FedPTError, RunError, naming

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fedpt_flwr.config import DataConfig, RunConfig
    from fedpt_flwr.evaluation import Evaluator
    from fedpt_flwr.proxy import ProxyModel
    from fedpt_flwr.remote import RemoteModel

app = typer.Typer(
    name="fedpt",
    help="Federated proxy-tuning: devices tune a small LM, and it steers a frozen large one.\n\n"
    'Make a run with `flwr run . --stream --federation-config "num-supernodes=8 client-resources-num-cpus=1"`, '
    "then look at it with the commands below.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
_out, _err = Console(), Console(stderr=True)
_MODELS = ("proxy", "large", "tuned", "untuned")
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_COMPARED = ("large", "tuned", "proxy")
_SUMMARY_EVERY_S = 60.0  # while a comparison runs
_LINE_EVERY_S = 30.0  # of a training, where there is no terminal
_Number = TypeVar("_Number", int, float)

Run = Annotated[
    str, typer.Argument(metavar="[RUN]", help="A run id, a unique beginning of one, a folder, or `latest`.")
]
RunOption = Annotated[str, typer.Option("--run", help="A run id, a unique beginning of one, a folder, or `latest`.")]
Alpha = Annotated[float | None, typer.Option(help="Strength of the shift; by default the run's. 0: the large model.")]
Plausibility = Annotated[
    float | None, typer.Option(help="Mask of tokens that the tuned model finds implausible; by default the run's.")
]
Large = Annotated[str | None, typer.Option(help="Where the large model lies now, if not where the run found it.")]
LargeUrl = Annotated[
    str | None,
    typer.Option(
        help="Address of an OpenAI-compatible service to ask for the large model's log-probabilities, instead of "
        "loading it; its key is read from FEDPT_LARGE_API_KEY."
    ),
]
LargeName = Annotated[str | None, typer.Option(help="The large model's name there, if there are several.")]
LargeDeviceMap = Annotated[
    str | None,
    typer.Option(
        help="How the large model is divided among this machine's devices, such as `auto`, if not as the run says."
    ),
]
Device = Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda`, `cuda:1`, `mps`.")]
Prepare = Annotated[
    bool, typer.Option(" /--no-prepare", help="Leave the weights as they are loaded, not laid out for decoding.")
]


def main() -> None:
    """Entry point of the console script: an error that a user can mend is one sentence, and exit status 1."""
    try:
        app()
    except FedPTError as error:
        _err.print(f"fedpt: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(1)


@app.command()
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(help="The prompt; `\\n` is a line break, `-` reads standard input. Or use --example."),
    ] = None,
    run: RunOption = "latest",
    example: Annotated[int | None, typer.Option(min=1, help="Take the prompt of this test item, from 1.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show large, tuned and proxy side by side.")] = False,
    model: Annotated[str, typer.Option(help="Who answers: `proxy`, `large`, `tuned`, `untuned`.")] = "proxy",
    alpha: Alpha = None,
    plausibility: Plausibility = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, by default the run's.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling, where the temperature is above 0.")] = 0,
    large: Large = None,
    large_url: LargeUrl = None,
    large_name: LargeName = None,
    large_device_map: LargeDeviceMap = None,
    device: Device = "auto",
    prepare: Prepare = True,
    url: Annotated[str | None, typer.Option(help="Ask the service at this address instead; see `fedpt serve`.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="FEDPT_API_KEY", help="The service's key.")] = None,
) -> None:
    """Write one answer with a run's proxy-tuned model.

    In the demo world: `fedpt generate --example 1 --compare`, or write a prompt of your own the way the devices do.
    """
    if (prompt is None) == (example is None):
        raise ConfigError("give either a prompt or --example", remedy="see fedpt generate --help")
    if model not in _MODELS:
        raise ConfigError(f"must be one of {', '.join(_MODELS)}", value=model, place="--model")
    if url is not None:
        if large is not None or large_url is not None or run != "latest":
            raise ConfigError(
                "a service has its own run and models", place="--url", remedy="leave --run, --large and --large-url out"
            )
        settings = {"alpha": alpha, "plausibility": plausibility, "temperature": temperature, "seed": seed}
        _ask_service(url, api_key, prompt, example, _COMPARED if compare else (model,), max_new_tokens, settings)
        return
    folder, config = _open_run(run)
    import torch

    from fedpt_flwr.models import cpu_threads

    found = _find_large(folder, config, large, large_url, large_name)
    proxy, tokenizer = _load_proxy(
        folder, found, device, alpha, plausibility, prepare=prepare, large_device_map=large_device_map
    )
    answer = None
    if example is not None:
        prompt, answer = _test_item(config, example)
    text = _prompt_text(str(prompt))
    models = {"large": proxy.large, "tuned": proxy.tuned, "untuned": proxy.untuned, "proxy": proxy}
    if model == "untuned":
        models["untuned"] = _untouched(folder, config, device) or proxy.untuned
    limit = max_new_tokens or config.scoring.max_new_tokens
    ids = _prompt_ids(text, tokenizer, proxy, limit)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    # As the run's own scoring decodes, whatever a model's generation config would like.
    sampling |= {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}

    def write(name: str, streamer: Any = None) -> str:
        untuned = proxy.without_adapter() if _is_shared(proxy, name) else nullcontext()
        with torch.inference_mode(), cpu_threads(config.threads.server), untuned:
            speaker = models[name] if models[name] is not None else proxy.tuned
            torch.manual_seed(seed)  # for the three that know no seeds
            seeded = {"seed": seed} if speaker is proxy else {}
            output = speaker.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=limit,
                eos_token_id=proxy.generation_config.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                streamer=streamer,
                **sampling,
                **seeded,
            )
        return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))

    if proxy.hides_tokens:
        done = "share the rest as untuned would" if proxy.large.fills(samples=temperature > 0) else "are ruled out"
        said = f"Tokens that the service does not show {done}"
        _err.print(said, style="dim", markup=False, highlight=False, soft_wrap=True)
    if compare:
        _print_answers(text, {name: write(name) for name in _COMPARED}, answer)
    else:
        from transformers import TextStreamer

        write(model, TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
        if answer is not None:
            _err.print(f"right answer: {answer}", markup=False, highlight=False, style="dim")
    if not isinstance(found, str | None):
        _remote_spending(found)


@app.command()
def score(
    run: Run = "latest",
    items: Annotated[int | None, typer.Option(min=0, help="Items to score, by default the run's; 0: all.")] = None,
    alpha: Alpha = None,
    plausibility: Plausibility = None,
    validation: Annotated[bool, typer.Option("--validation", help="Score the validation items instead.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
    large: Large = None,
    large_url: LargeUrl = None,
    large_name: LargeName = None,
    large_device_map: LargeDeviceMap = None,
    device: Device = "auto",
) -> None:
    """Score large, untuned, tuned and proxy of a run on its test items, as the run did at its end."""
    folder, config = _open_run(run)
    from fedpt_flwr.evaluation import Evaluator
    from fedpt_flwr.runs import write_json
    from fedpt_flwr.scoring import render_table, results_table, verdict
    from fedpt_flwr.sources import held_out_items, public_texts

    found = _find_large(folder, config, large, large_url, large_name)
    proxy, tokenizer = _load_proxy(folder, found, device, alpha, plausibility, large_device_map=large_device_map)
    which = "validation" if validation else "test"
    number = config.scoring.num_items if items is None else items
    chosen = held_out_items(config.data, which, seed=config.seed, tokenizer=tokenizer).first(number)
    public = public_texts(config.data, tokenizer=tokenizer) if config.scoring.few_shot else []
    evaluator = Evaluator(chosen, tokenizer, config, proxy, place=f"data.{which}")
    untouched = _untouched(folder, config, device)
    if untouched is not None:
        evaluator.remember_untuned(untouched)
    with _progress() as progress:
        scores = evaluator.score(proxy, public_texts=public, on_progress=progress)
    results = scores.to_json()
    if (folder / "device").is_dir():
        results["rows"] |= _device_rows(folder, config, evaluator, device, tokenizer)
    _out.print(render_table(results_table(results)), markup=False, highlight=False, soft_wrap=True)
    _out.print(verdict(results), markup=False, highlight=False, soft_wrap=True)
    if not isinstance(found, str | None):
        results["costs"] = _remote_spending(found)
    if json_file is not None:
        write_json(json_file.absolute(), results)


@app.command()
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
    folder, config = _open_run(run)
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
    hosts = frozenset() if api_key or not is_loopback else _LOOPBACK
    hosts |= {name.lower() for name in allow_host or ()}
    if not api_key and not is_loopback:
        said = f"fedpt: anybody who reaches {host} may use the service; --api-key asks for a key"
        _err.print(said, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if prepare and (advice := packing.advice()):
        _err.print(f"fedpt: {advice}", markup=False, highlight=False, soft_wrap=True)
    transformers_logging.disable_progress_bar()
    _err.print(f"Loading {folder}", markup=False, highlight=False, soft_wrap=True)
    # A run's own service is connected to with each run that is followed; only what is said here holds for all of them.
    is_said = large is not None or large_url is not None or large_name is not None
    found = _find_large(folder, config, large, large_url, large_name) if is_said else None

    def on_ready(version: Any, address: str) -> None:
        said = f"Serving {version.name} at {address} (the page) and {address}/v1 (for OpenAI clients); Ctrl-C ends it"
        _err.print(said, markup=False, highlight=False, soft_wrap=True)

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


@app.command()
def report(
    run: Run = "latest",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the page and the plots; by default the run's own.")
    ] = None,
) -> None:
    """Write report.html, one page with everything that a run left, and its plots as PNG files.

    RUN may also be the folder of a comparison or of an attack. The page needs no network and nothing beside it; open
    it in a browser.
    """
    from fedpt_flwr.report import find_folder, make_report

    page = make_report(find_folder(run), out.absolute() if out else None)
    _out.print(f"The report is {page}", markup=False, highlight=False, soft_wrap=True)


@app.command("check-config")
def check_config(
    overrides: Annotated[
        list[str] | None,
        typer.Option("-c", "--run-config", help='As for `flwr run`: "key=value key2=value2", or a TOML file.'),
    ] = None,
    app_dir: Annotated[Path, typer.Option("--app", help="Folder of the app, with its pyproject.toml.")] = Path(),
    num_devices: Annotated[
        int | None,
        typer.Option(min=1, help="Number of devices that the training data is dealt out to; by default min-devices."),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table of all keys instead, for docs/run-config.md.")
    ] = False,
) -> None:
    """Say everything that is wrong with a run config, without a run.

    Reads the app's defaults and the overrides as `flwr run` would, then looks at the strategy, the models' folders and
    vocabularies, and the data. Weights are not loaded.
    """
    from fedpt_flwr.accounting import privacy_outlook
    from fedpt_flwr.config import parse_run_config, settings_markdown

    if markdown:
        sys.stdout.write(settings_markdown())
        return
    flat = _flat_config(app_dir, overrides)
    problems = _config_problems(flat, num_devices)
    if problems:
        raise ConfigError.of(problems)
    _out.print(f"The run config is fine: {len(flat)} keys.", highlight=False)
    config = parse_run_config(flat)
    if config.privacy.is_on:
        for line in privacy_outlook(config.privacy, config.num_server_rounds):
            _out.print(line, highlight=False, soft_wrap=True)


@app.command()
def compare(
    world: Annotated[
        list[str] | None,
        typer.Option(help="A world's run-config.toml, or `demo`; once for each. By default what the config says."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("-c", "--run-config", help='For all worlds, as for `flwr run`: "key=value key2=value2".'),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the federation; learning rates are chosen with the first.")] = (
        "0,1,2"
    ),
    kinds: Annotated[
        str, typer.Option(help="Kinds of cells, by default all: see docs/comparison.md.", show_default=False)
    ] = "",
    modes: Annotated[
        str,
        typer.Option(
            help="Distillation modes of `fedpt`; ablations are of the first. By default the config's if it says one, "
            "else final,carry.",
            show_default=False,
        ),
    ] = "",
    ablate: Annotated[
        list[str] | None,
        typer.Option(
            help='A key with the values to vary it over, "proxy.alpha=0.5,1,2"; what follows goes with it. Repeat it.'
        ),
    ] = None,
    ablate_kinds: Annotated[str, typer.Option(help="Kinds that are run with each of those values.")] = "fedpt",
    ablation_seeds: Annotated[str, typer.Option(help="Seeds of the ablations, by default all.")] = "",
    tune: Annotated[
        bool, typer.Option("--tune", help="Only choose the learning rates, with the first seed; writes tuning.json.")
    ] = False,
    tuning: Annotated[
        Path | None,
        typer.Option(help="A tuning.json to take learning rates from; by default the demo world's for `demo`."),
    ] = None,
    learning_rates: Annotated[
        list[str] | None,
        typer.Option(help="Learning rates of a kind to choose from: `central=1e-3,3e-3`. Repeat it."),
    ] = None,
    large_learning_rates: Annotated[str, typer.Option(help="The same for `large_federated`.")] = "",
    large_lora_learning_rates: Annotated[str, typer.Option(help="The same for `large_federated_lora`.")] = "",
    num_devices: Annotated[int, typer.Option("--devices", min=1, help="Devices of every federation.")] = 8,
    jobs: Annotated[int, typer.Option(min=0, help="Federations at once; 0: as many as the CPUs allow.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the comparison; one that exists goes on. Else $FEDPT_HOME/comparisons/TIME."),
    ] = None,
    keep_runs: Annotated[bool, typer.Option("--keep-runs", help="Keep the run folders, under OUT/runs.")] = False,
    app_dir: Annotated[Path, typer.Option("--app", help="Folder of the app, with its pyproject.toml.")] = Path(),
) -> None:
    """Compare proxy-tuning with whatever else one could do, over seeds and worlds, with costs and intervals.

    Every federation runs in one process, without a network, and leaves one file when it has ended; ended in whatever
    way, the same command with the same --out goes on. Lists are separated by commas. alpha and mask are chosen on
    validation items, unless the config says otherwise.
    """
    app_dir = app_dir.resolve()
    defaults, given = _app_config(app_dir), _given_config(overrides)
    from fedpt_flwr import compare as comparing
    from fedpt_flwr.config import AUTO
    from fedpt_flwr.runs import write_json

    by_validation = {} if "proxy.plausibility" in given else {"proxy.alpha": AUTO}
    own = {label: by_validation | flat | given for label, flat in _worlds(world or ["demo"]).items()}
    worlds = {label: defaults | flat for label, flat in own.items()}
    chosen_kinds = tuple(_listed(kinds) or comparing.KINDS)
    rates = _rates_of_kinds(learning_rates or [])
    for kind, text in ((comparing.LARGE, large_learning_rates), (comparing.LARGE_LORA, large_lora_learning_rates)):
        if text:
            rates[kind] = tuple(_numbers(text, float, comparing.RATES_OPTIONS[kind]))
    is_given = any("train.learning-rate" in flat for flat in own.values())
    rated = {*rates, *(name for name, kind in comparing.KINDS.items() if is_given and not kind.needs_rate)}
    tuned, notes = _tuned_before(tuning, worlds, num_devices, rated) if not tune else ({}, [])
    for note in notes:
        _err.print(f"fedpt: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    listed_seeds = tuple(_numbers(seeds, int, "--seeds"))
    own_modes = dict.fromkeys(str(flat["distillation.mode"]) for flat in own.values() if "distillation.mode" in flat)
    listed_modes = tuple(_listed(modes) or own_modes or comparing.MODES)
    tried = {name: kind.rates for name, kind in comparing.KINDS.items() if kind.rates and (tune or kind.needs_rate)}
    plan = comparing.Plan(
        worlds=worlds,
        kinds=tuple(kind for kind in chosen_kinds if not tune or kind in tried or kind not in comparing.KINDS),
        modes=listed_modes[:1] if tune else listed_modes,
        seeds=listed_seeds[:1] if tune else listed_seeds,
        num_devices=num_devices,
        learning_rates={kind: part for kind, part in (tried | rates).items() if part},
        tuned=tuned,
        ablations=() if tune else tuple(comparing.Ablation.parse(text) for text in ablate or ()),
        ablated_kinds=tuple(_listed(ablate_kinds)),
        ablation_seeds=tuple(_numbers(ablation_seeds, int, "--ablation-seeds")),
    )
    folder = (out or comparing.new_folder()).absolute()
    comparison = comparing.Comparison(plan, folder, app=app_dir)
    _err.print(f"Comparison: {folder}", markup=False, highlight=False, soft_wrap=True)
    _err.print(f"{plan.num_cells} federations, {comparison.num_found} of them done before", highlight=False)
    if comparison.num_outdated:
        _err.print(f"{comparison.num_outdated} were made by other code and are run again", highlight=False)
    command = shlex.join(["fedpt", *sys.argv[1:]])
    damaged = iter(comparison.damaged)  # more may turn up when learning rates have been chosen
    title = f"Proxy-tuning beside what else one could do: {', '.join(worlds)}"

    def summarise() -> dict[str, Any]:
        """Write summary.json, so that there is a report to be made at any time; say which cells were damaged."""
        for path in damaged:
            _err.print(f"{path} is damaged, so the cell is run again", markup=False, highlight=False, soft_wrap=True)
        summary = comparison.summary(title=title, command=command) | {"notes": notes}
        write_json(folder / "summary.json", summary)
        if tune:
            write_json(folder / "tuning.json", comparison.tuning(command=command))
        return summary

    summary, written = summarise(), time.monotonic()
    try:
        with _cell_progress(comparison.num_found, plan.num_cells) as show:

            def on_cell(cell: comparing.Progress) -> None:
                nonlocal written
                show(cell)
                if time.monotonic() - written > _SUMMARY_EVERY_S:  # it resamples all items, which takes a while
                    summarise()
                    written = time.monotonic()

            comparison.run(
                jobs=jobs or comparing.default_jobs(worlds.values()),
                keep_runs=keep_runs,
                apart=not tune,
                on_cell=on_cell,
            )
    except KeyboardInterrupt:
        said = f"Ended; the same command with --out {folder} goes on"
        _err.print(said, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    summary = summarise()
    _out.print(comparing.summary_text(summary), markup=False, highlight=False, soft_wrap=True)
    _err.print(f"Summary: {folder / 'summary.json'}", markup=False, highlight=False, soft_wrap=True)
    if tune:
        _err.print(f"Tuning: {folder / 'tuning.json'}", markup=False, highlight=False, soft_wrap=True)
    if summary["errors"]:
        problems = [f"{name}: {error}" for name, error in summary["errors"].items()]
        raise RunError(
            f"{len(problems)} parts of the comparison failed",
            place=str(folder),
            remedy="the same command with the same --out tries them again; logs/ says more",
            problems=problems,
        )


@app.command()
def attack(
    overrides: Annotated[
        list[str] | None,
        typer.Option("-c", "--run-config", help='As for `flwr run`: "key=value key2=value2", or a TOML file.'),
    ] = None,
    targets: Annotated[
        str, typer.Option(help="What is attacked, by default everything: see docs/privacy.md.", show_default=False)
    ] = "",
    seeds: Annotated[str, typer.Option(help="Seeds of the federations that are attacked.")] = "0,1,2",
    shadows: Annotated[
        int, typer.Option(min=0, help="Federations that the attacker makes to learn from; 0: no likelihood ratio.")
    ] = 4,
    ablate: Annotated[
        list[str] | None,
        typer.Option(help="A key with the values to attack it at, as for `fedpt compare`. Repeat it."),
    ] = None,
    ablate_large: Annotated[
        bool, typer.Option("--ablate-large", help="Run large_federated at each of those values, too.")
    ] = False,
    large_learning_rate: Annotated[float, typer.Option(help="Of large_federated, in its first round.")] = 4e-4,
    canaries: Annotated[int, typer.Option(min=0, help="Secrets for each number of copies.")] = 8,
    copies: Annotated[str, typer.Option(help="How often a secret stands in its device's data.")] = "1,4,16",
    digits: Annotated[int, typer.Option(min=1, max=6, help="Digits of a secret.")] = 3,
    num_devices: Annotated[int, typer.Option("--devices", min=1, help="Devices of every federation.")] = 8,
    jobs: Annotated[int, typer.Option(min=0, help="Federations at once; 0: as many as the CPUs allow.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the attack; one that exists goes on. Else $FEDPT_HOME/attacks/TIME."),
    ] = None,
    app_dir: Annotated[Path, typer.Option("--app", help="Folder of the app, with its pyproject.toml.")] = Path(),
) -> None:
    """Measure what an attacker learns of devices' records and secrets from models and updates.

    Devices train on a random half of the records and on hidden secrets; membership inference and exposure then say
    what is left of them in each target, with intervals. Ended in whatever way, the same command with the same --out
    goes on. alpha and mask are chosen on validation items, unless the config says otherwise.
    """
    app_dir = app_dir.resolve()
    defaults, given = _app_config(app_dir), _given_config(overrides)
    from fedpt_flwr import attack as attacking
    from fedpt_flwr import compare as comparing
    from fedpt_flwr.config import AUTO

    by_validation = {} if "proxy.plausibility" in given else {"proxy.alpha": AUTO}
    plan = attacking.Plan(
        run_config={key: value for key, value in defaults.items() if key not in attacking.OWN_KEYS}
        | by_validation
        | given,
        targets=tuple(_listed(targets) or attacking.TARGETS),
        seeds=tuple(_numbers(seeds, int, "--seeds")),
        shadows=shadows,
        num_devices=num_devices,
        settings=tuple(comparing.Ablation.parse(text) for text in ablate or ()),
        varies_large=ablate_large,
        large_learning_rate=large_learning_rate,
        canaries=canaries,
        copies=tuple(_numbers(copies, int, "--copies")),
        digits=digits,
    )
    folder = (out or comparing.new_folder("attacks")).absolute()
    bench = attacking.Bench(plan, folder, app=app_dir)
    _err.print(f"Attack: {folder}", markup=False, highlight=False, soft_wrap=True)
    _err.print(f"{len(bench.federations)} federations, {bench.num_found} of them done before", highlight=False)
    if bench.num_outdated:
        _err.print(f"{bench.num_outdated} are damaged or of other code and are run again", highlight=False)
    command = shlex.join(["fedpt", *sys.argv[1:]])
    try:
        with _cell_progress(bench.num_found, len(bench.federations)) as show:

            def on_cell(cell: comparing.Progress) -> None:
                show(cell)
                bench.write_summary(command=command)  # so that there is a report to be made at any time

            bench.run(jobs=jobs or comparing.default_jobs([plan.run_config]), on_cell=on_cell)
    except KeyboardInterrupt:
        said = f"Ended; the same command with --out {folder} goes on"
        _err.print(said, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    summary = bench.write_summary(command=command)
    _out.print(attacking.summary_text(summary), markup=False, highlight=False, soft_wrap=True)
    _err.print(f"Tables: {folder / attacking.ATTACK}", markup=False, highlight=False, soft_wrap=True)
    if bench.failed:
        raise RunError(
            f"{len(bench.failed)} federations of the attack failed",
            place=str(folder),
            remedy="the same command with the same --out tries them again; logs/ says more",
            problems=[f"{name}: {error}" for name, error in bench.failed.items()],
        )


@app.command()
def plan(
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "-c",
            "--run-config",
            help='As for `flwr run`: "key=value key2=value2", or a TOML file. Here a model may also be a name or the '
            "absolute path of a config.json.",
        ),
    ] = None,
    app_dir: Annotated[Path, typer.Option("--app", help="Folder of the app, with its pyproject.toml.")] = Path(),
    num_devices: Annotated[int | None, typer.Option("--devices", min=1, help="Devices that there are, else 8.")] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="Training examples of every device.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of every prompt.")] = None,
    answer_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of every answer, its end included.")] = None,
    validation_items: Annotated[int | None, typer.Option(min=1, help="The server's validation items.")] = None,
    test_items: Annotated[int | None, typer.Option(min=1, help="The server's test items.")] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Public prompts or texts to distil on.")] = None,
    device_flops: Annotated[
        float | None, typer.Option(help="Operations a second of a device that trains, else 1e11: some CPU cores.")
    ] = None,
    server_flops: Annotated[
        float | None, typer.Option(help="Operations a second of the server, else 1e14: a third of a data-centre GPU.")
    ] = None,
    price: Annotated[float | None, typer.Option(help="Of a million tokens through the large model.")] = None,
    run: Annotated[
        str | None, typer.Option(help="Plan this run instead, and show what it measured: an id, a folder, or `latest`.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the plan to this file.")] = None,
) -> None:
    """Say what a run would cost each device and the server, before anything is bought or downloaded.

    Bytes, memory, operations, time, tokens through the large model and their price; beside it the same for devices
    that tune the large model itself. Models are looked at without their weights, so one of 70 billion takes seconds:

    `fedpt plan -c "model.small='Qwen2.5-0.5B' model.large='Qwen2.5-7B' tuning.mode='lora'" --devices 100 --price 0.3`

    By name there are SmolLM2-135M, SmolLM2-1.7B, Qwen2.5-0.5B, Qwen2.5-7B, Llama-3.2-1B and Llama-3.1-70B.

    Texts are counted where they lie here, with the small model's tokenizer (`demo:`, absolute paths). Else say how many
    there are and how long; what nobody says is assumed, and listed below the table.
    """
    if run is not None and (overrides or num_devices is not None):
        raise ConfigError("a run has its own config and devices", place="--run", remedy="leave -c and --devices out")
    costs: dict[str, float] = {}
    if run is not None:
        folder, config = _open_run(run)
        costs, num_devices = _measured_costs(folder)
    else:
        from fedpt_flwr.config import parse_run_config

        config = parse_run_config(_flat_config(app_dir, overrides))
    from fedpt_flwr import plan as planning
    from fedpt_flwr.runs import write_json

    told = planning.Told(
        examples=examples,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        validation_items=validation_items,
        test_items=test_items,
        prompts=prompts,
    )
    rates = planning.Rates(
        device_flops=planning.DEVICE_FLOPS if device_flops is None else device_flops,
        server_flops=planning.SERVER_FLOPS if server_flops is None else server_flops,
        price=price,
    )
    made = planning.make_plan(config, num_devices or 8, told=told, rates=rates)
    _out.print(_table(planning.plan_table(made)))
    for note in planning.plan_notes(made):
        _out.print(note, markup=False, highlight=False)
    if costs:
        _out.print(_table(planning.beside_run(made, costs)))
    if json_file is not None:
        write_json(json_file.absolute(), made.to_json() | ({"measured": costs} if costs else {}))


@app.command("demo-world")
def demo_world(
    seed: Annotated[int, typer.Option(min=0, help="Another seed is another world.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder to make; by default demo-world-SEED in this folder.")] = None,
) -> None:
    """Make a demo world: texts, tokenizer, and a pair of small LMs pre-trained on them.

    Takes some minutes on one CPU core. The folder gets a run-config.toml; tune on it with
    `flwr run . --run-config FOLDER/run-config.toml`.
    """
    from fedpt_flwr.demo_world import make_demo_world

    folder = (out or Path(f"demo-world-{seed}")).absolute()
    with _progress() as progress:
        make_demo_world(folder, seed, progress=progress)
    _out.print(f"The world of seed {seed} is in {folder}", highlight=False, soft_wrap=True)
    _out.print(f"Tune on it with: flwr run . --stream --run-config {folder / 'run-config.toml'}", soft_wrap=True)


@app.command()
def split(
    train: Annotated[str, typer.Option(help="File, folder or hub id of the records that are divided.")],
    out: Annotated[Path, typer.Option(help="Folder to make, with a file for each part.")],
    config: Annotated[
        Path | None,
        typer.Option(help="Run config of the task, such as examples/medquad/run-config.toml; it is written along."),
    ] = None,
    test: Annotated[str | None, typer.Option(help="Test data that is there already.")] = None,
    validation: Annotated[str | None, typer.Option(help="Validation data that is there already.")] = None,
    public: Annotated[str | None, typer.Option(help="Public data that is there already.")] = None,
    test_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Else this share of the keys is for test.")] = 0.0,
    validation_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="The same for validation.")] = 0.05,
    public_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="The same for what is public.")] = 0.0,
    public_group: Annotated[
        list[str] | None, typer.Option(help="A group that is public as a whole; repeat it for more.")
    ] = None,
    key: Annotated[
        str,
        typer.Option(help="Fields whose text decides where a record goes; by default those of the config's prompts."),
    ] = "",
    group_field: Annotated[str, typer.Option(help="Field of the groups; by default the config's.")] = "",
    pair: Annotated[
        Path | None, typer.Option(help="Folder with `small` and `large`, as of `fedpt pretrain`; it may come later.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed is another division.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older division in OUT.")] = False,
) -> None:
    """Divide a data set into public, train, validation and test, the same way every time.

    Where a record goes is decided by the text of its prompt and the seed, so records with one prompt stay together and
    none of them is in two parts. OUT gets `train.jsonl` (for the devices), `validation.jsonl`, `test.jsonl`,
    `public.jsonl`, `split.json` with counts and hashes, and a complete `run-config.toml` for
    `flwr run . --run-config`.

    Nine web sites, one of them public: `fedpt split --config examples/medquad/run-config.toml
    --train /data/medquad/train.jsonl --test /data/medquad/test.jsonl --public-group GARD --pair /tmp/pair
    --out /tmp/medquad`
    """
    from fedpt_flwr import split as splitting
    from fedpt_flwr.config import parse_run_config

    given = _given_config([str(config)], place="--config") if config else {}
    data = parse_run_config(given).data
    fields = _listed(key) or (_prompt_fields(data) if config else [])
    if not fields:
        raise ConfigError("say which fields decide where a record goes", place="--key", remedy="or give --config")
    files = {"test": test, "validation": validation, "public": public}
    shares = {"test": test_share, "validation": 0.0 if validation else validation_share, "public": public_share}
    plan = splitting.SplitPlan(
        train=_absolute(train),
        given={part: _absolute(source) for part, source in files.items() if source},
        shares={part: share for part, share in shares.items() if share},
        key_fields=fields,
        group_field=group_field or (data.group_field if config else ""),
        public_groups=public_group or (),
        seed=seed,
    )
    if pair is not None:
        given |= {f"model.{name}": str(pair.absolute() / name) for name in ("small", "large")}
    made = splitting.write_division(out, plan, splitting.divide(plan), run_config=given, overwrite=overwrite)
    for part, row in made["parts"].items():
        groups = ", ".join(f"{name} {count}" for name, count in list(row.get("groups", {}).items())[:12])
        left_out = f", {row['dropped']} left out" if row["dropped"] else ""
        line = f"{part:<10} {row['records']:>7} records{left_out}{': ' if groups else ''}{groups}"
        _out.print(line, markup=False, highlight=False, soft_wrap=True)
    said = f"Run with: flwr run . --stream --run-config {out.absolute() / 'run-config.toml'}"
    _out.print(said, markup=False, highlight=False, soft_wrap=True)


@app.command()
def pretrain(
    text: Annotated[
        list[str],
        typer.Option(
            help="Text to learn: a text file, a folder of text files (.txt .md .rst .py .html .tex), or a data file "
            "with a template, `PATH::{question}\\n{answer}` (by default the field `text`). Repeat it for more."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to make; a pair that was begun there goes on.")],
    recipe: Annotated[
        str,
        typer.Option(help="`quick`, `standard` or `gpu`: sizes and number of tokens; the options below change them."),
    ] = "standard",
    small: Annotated[str, typer.Option(help="Small model as WIDTHxLAYERSxHEADS, such as 64x3x2.")] = "",
    large: Annotated[str, typer.Option(help="Large model, the same way.")] = "",
    tokens: Annotated[float | None, typer.Option(min=0.0, help="Million tokens that each model learns from.")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=258, help="Tokens of the tokenizer.")] = None,
    window: Annotated[int | None, typer.Option(min=2, max=512, help="Tokens that are read at once.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Windows per step.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(min=0.0, help="Peak for width 192; wider models get less, by the square root.")
    ] = None,
    balance: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="How often a text is read: 1 in proportion to its size, 0 all alike; by default 0.5."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Files and folders to leave out by name, such as `test*`; repeatable.")
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: as many as there are cores.")] = 0,
    device: Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda`, `cuda:1`, `mps`.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of the weights and of the order of the text.")] = 0,
) -> None:
    r"""Pre-train a small and a large LM with one tokenizer on your own text.

    For trying the method where no pre-trained pair is at hand. OUT gets `small` and `large` as any transformers model,
    `pretrain.json` (loss curves, losses on held-out text) and a run-config.toml that points to both. Ended in whatever
    way, the same command goes on.

    `fedpt pretrain --text /usr/lib/python3.11 --exclude 'test*'
    --text '/tmp/medquad/public.jsonl::{question}\n{answer}' --out /tmp/pair`
    """
    from dataclasses import replace

    from transformers import logging as transformers_logging

    from fedpt_flwr.corpus import Source
    from fedpt_flwr.models import cpu_threads, pick_device
    from fedpt_flwr.pair import RECIPES, make_pair

    if recipe not in RECIPES:
        raise ConfigError(f"must be one of {', '.join(RECIPES)}", value=recipe, place="--recipe")
    changes: dict[str, Any] = {
        "small": _shape(small, "--small"),
        "large": _shape(large, "--large"),
        "num_tokens": None if tokens is None else round(tokens * 1e6),
        "vocab_size": vocab_size,
        "window": window,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "balance": balance,
        "seed": seed,
    }
    chosen = replace(RECIPES[recipe], **{name: value for name, value in changes.items() if value is not None})
    sources = [Source.parse(each) for each in text]
    transformers_logging.disable_progress_bar()
    try:
        with _training_progress() as progress, cpu_threads(threads or os.cpu_count() or 1):
            made = make_pair(
                out, sources, chosen, exclude=exclude or (), device=str(pick_device(device)), progress=progress
            )
    except KeyboardInterrupt:
        _err.print("Ended; the same command goes on", markup=False, highlight=False)
        raise typer.Exit(130) from None
    for line in _pair_lines(made):
        _out.print(line, markup=False, highlight=False, soft_wrap=True)
    _out.print(f"The pair is in {out.absolute()}", markup=False, highlight=False, soft_wrap=True)


# --- what the commands share --------------------------------------------------------------------------------------


@app.command()
def certs(
    folder: Annotated[Path, typer.Argument(help="Where keys and certificates lie; made if it is not there.")],
    name: Annotated[
        list[str] | None,
        typer.Option(
            help="Host name or address under which devices reach the SuperLink; repeat it for more. localhost and "
            "127.0.0.1 are always in the certificate."
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(min=0, help="Devices that there are to be in all; existing keys stay.")] = 0,
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long the server's certificate is valid.")] = 365,
) -> None:
    """Make keys and certificates for a federation on real machines, where they are missing.

    A CA, the SuperLink's certificate, and a key for each device: `fedpt certs certs --name superlink.example.org
    --nodes 3`. Nothing that is there is overwritten, so the same command with `--nodes 5` adds two devices. To renew
    the server's certificate, or to give it other names, remove `server.pem` and call this again with all `--name`s.
    """
    from fedpt_flwr.certs import make_certs

    made = make_certs(folder.absolute(), names=name or (), num_nodes=nodes, days=days)
    where = shlex.quote(str(made.folder))

    def say(line: str) -> None:
        _out.print(line, markup=False, highlight=False, soft_wrap=True)

    for path in made.created:
        say(f"made  {path}")
    for path in made.kept:
        say(f"kept  {path}")
    say(f"The server's certificate is valid until {made.server_until:%Y-%m-%d}.")
    address = f"[{name[0]}]" if name and ":" in name[0] else (name or ["127.0.0.1"])[0]
    say("\nOn the server:")
    say(
        f"  flower-superlink --host 0.0.0.0 --port 8000 --ssl-ca-certfile {where}/ca.crt "
        f"--ssl-certfile {where}/server.pem --ssl-keyfile {where}/server.key "
        "--enable-supernode-auth --database superlink.db --isolation process "
        f"--superexec-auth-secret-file {where}/executor.secret"
    )
    say(
        f"  flower-superexec --root-certificates {where}/ca.crt --runtime-api-address 127.0.0.1:8000 "
        f"--superexec-auth-secret-file {where}/executor.secret"
    )
    say("In $FLWR_HOME/config.toml (by default ~/.flwr/config.toml) of who starts runs:")
    say(f'  [superlink.prod]\n  address = "{address}:8000"\n  root-certificates = "{made.folder}/ca.crt"')
    if not nodes:
        say("Add keys for devices with --nodes.")
        return
    say("Then, for each device, before it starts:")
    say(f"  flwr supernode register {where}/nodes/node-1.pub prod --name node-1")
    say("On device 1, which needs copies of ca.crt and nodes/node-1 and nothing else:")
    say(
        f"  flower-supernode --superlink {address}:8000 --root-certificates ca.crt "
        "--auth-supernode-private-key node-1 --node-config 'device-id=1 data-path=\"/absolute/path.jsonl\"'"
    )


def _open_run(name: str) -> tuple[Path, RunConfig]:
    from fedpt_flwr.config import parse_run_config
    from fedpt_flwr.runs import find_run, read_json

    folder = find_run(name)
    if not (folder / "proxy").is_dir():
        usable = sorted(
            path.name for path in folder.parent.glob("*") if (path / "proxy").is_dir() and not path.is_symlink()
        )
        raise RunError(
            f"the run {folder.name} ended before its first round was complete, so it has no model",
            remedy=f"the newest that has one is {usable[-1]}" if usable else "make another with `flwr run . --stream`",
        )
    recorded = read_json(folder / "config.json")
    if not isinstance(recorded, dict) or not isinstance(recorded.get("run_config"), dict):
        raise RunError(
            "must hold a run's config", place=str(folder / "config.json"), remedy="name the run's own folder"
        )
    return folder, parse_run_config(recorded["run_config"])


def _measured_costs(folder: Path) -> tuple[dict[str, float], int]:
    """What a run says that it spent, and how many devices it had."""
    from fedpt_flwr.runs import read_json

    if not (folder / "results.json").is_file():
        raise RunError(
            f"the run {folder.name} has not ended, so it has not summed up what it spent",
            place=str(folder),
            remedy="wait for it, or resume it",
        )
    return read_json(folder / "results.json")["costs"], len(read_json(folder / "shards.json"))


def _find_large(
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
    model = connect(address, load_tokenizer(str((folder / "proxy").resolve())), settings)
    asked = model.endpoint
    said = f"Large model {asked.model} at {asked.url}; log-probabilities: {asked.shows}"
    _err.print(said, style="dim", markup=False, highlight=False, soft_wrap=True)
    return model


def _remote_spending(large: RemoteModel) -> dict[str, Any]:
    """Say what a remote large model has cost; the same for a file."""
    from fedpt_flwr.endpoint import Usage

    spent = large.usage_since(Usage())
    price = f", price {spent['remote_price']:.6f}" if "remote_price" in spent else ""
    said = (
        f"Remote large model: {spent['remote_requests']} requests, {spent['remote_retries']} repeated; "
        f"{spent['remote_tokens_sent']} tokens sent, {spent['remote_tokens_received']} received{price}; "
        f"{spent['remote_recalled']} answers were known"
    )
    _err.print(said, style="dim", markup=False, highlight=False, soft_wrap=True)
    return spent


def _load_proxy(
    folder: Path,
    large: str | RemoteModel | None,
    device: str,
    alpha: float | None,
    plausibility: float | None,
    *,
    prepare: bool = False,
    large_device_map: str | None = None,
) -> tuple[ProxyModel, PreTrainedTokenizerBase]:
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


def _untouched(folder: Path, config: RunConfig, device: str) -> PreTrainedModel | None:
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


def _device_rows(
    folder: Path, config: RunConfig, evaluator: Evaluator, device: str, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The rows of the devices' copy of the small model."""
    from fedpt_flwr.models import load_adapter, load_causal_lm
    from fedpt_flwr.sources import public_prompts

    copy, dtype = folder / "device", config.model.small_dtype
    is_adapter = (copy / "adapter_config.json").is_file()
    model = load_causal_lm(config.model.small if is_adapter else str(copy.resolve()), dtype=dtype, device=device)
    if is_adapter:
        model = load_adapter(model, copy)
    prompts = public_prompts(config.data, tokenizer=tokenizer)
    topics = frozenset[str]() if prompts is None else prompts.topics
    rows = evaluator.rows_by_topic("device", evaluator.measure(model), topics)
    return {name: row.to_json() for name, row in rows.items()}


def _ask_service(
    url: str,
    api_key: str | None,
    prompt: str | None,
    example: int | None,
    names: Sequence[str],
    max_new_tokens: int | None,
    settings: dict[str, Any],
) -> None:
    """Let a running service write what ``generate`` writes."""
    from contextlib import closing

    from fedpt_flwr.service.client import ServiceClient

    with closing(ServiceClient(url, api_key)) as client:
        info = client.info()
        answer = None
        if example is not None:
            if example > len(info["examples"]):
                raise ConfigError(f"the service shows {len(info['examples'])} items", value=example, place="--example")
            prompt, answer = info["examples"][example - 1]["prompt"], info["examples"][example - 1]["answer"]
        text = _prompt_text(str(prompt))
        body = settings | {"prompt": text, "max_tokens": max_new_tokens or info["max_tokens"]}
        if len(names) > 1:
            answers = {name: "".join(client.stream(body | {"model": name})) for name in names}
            _print_answers(text, answers, answer)
            return
        for piece in client.stream(body | {"model": names[0]}):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        if answer is not None:
            _err.print(f"right answer: {answer}", markup=False, highlight=False, style="dim")


def _print_answers(prompt: str, answers: Mapping[str, str], right_answer: str | None) -> None:
    table = Table(show_lines=True)
    table.add_column("model")
    table.add_column("answer", overflow="fold")
    table.add_row("prompt", _plain(prompt.rstrip("\n")))
    for name, answer in answers.items():
        table.add_row(name, _plain(answer))
    if right_answer is not None:
        table.add_row("right answer", _plain(right_answer))
    _out.print(table)


def _table(cells: Sequence[Sequence[str]]) -> Table:
    """Cells of text, the head first; all columns but the first are numbers."""
    head, *rows = cells
    table = Table()
    for index, title in enumerate(head):
        table.add_column(_plain(title), justify="right" if index else "left", no_wrap=not index)
    for row in rows:
        table.add_row(*map(_plain, row))
    return table


def _prompt_fields(data: DataConfig) -> list[str]:
    """The fields of a record's prompt; none where its shape does not say them."""
    from fedpt_flwr.prompts import Template
    from fedpt_flwr.shapes import AutoShape, ChatShape, make_shape

    if data.format == "chat":
        return []
    shape = make_shape(data.format, template=Template(data.template), answer_field=data.answer_field, tokenizer=None)
    if isinstance(shape, AutoShape | ChatShape):
        return []
    return ["text"] if shape.name == "text" else list(shape.request.fields)


def _prompt_text(prompt: str) -> str:
    return _standard_input() if prompt == "-" else prompt.replace("\\n", "\n")


def _test_item(config: RunConfig, number: int) -> tuple[str, str]:
    from fedpt_flwr.models import load_tokenizer
    from fedpt_flwr.sources import held_out_items, needs_tokenizer

    tokenizer = load_tokenizer(config.model.small) if needs_tokenizer(config.data) else None
    items = held_out_items(config.data, "test", seed=config.seed, tokenizer=tokenizer).examples
    if number > len(items):
        raise ConfigError(f"the run has {len(items)} test items", value=number, place="--example")
    return items[number - 1].prompt, items[number - 1].answer


def _prompt_ids(text: str, tokenizer: PreTrainedTokenizerBase, proxy: ProxyModel, limit: int) -> Any:
    import torch

    from fedpt_flwr.data import tokenize_prompts

    if not text:
        raise ConfigError("the prompt must not be empty")
    room = (proxy.config.max_position_embeddings or 1 << 30) - limit
    return torch.tensor(tokenize_prompts([text], tokenizer, max_length=room), device=proxy.device)


def _is_shared(proxy: ProxyModel, name: str) -> bool:
    """Whether this is the untuned model, and it is the tuned one with its adapter switched off."""
    return name == "untuned" and proxy.untuned is None


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input must be UTF-8 ({error})") from error


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)


def _flat_config(app_dir: Path, overrides: list[str] | None) -> dict[str, Any]:
    return _app_config(app_dir) | _given_config(overrides)


def _app_config(app_dir: Path) -> dict[str, Any]:
    """The app's defaults."""
    import tomllib

    from flwr.common.config import flatten_dict

    path = app_dir / "pyproject.toml"
    try:
        project = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot be read ({error.strerror})", place=str(path.absolute()), remedy="name the app's folder with --app"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"is not valid TOML ({error})", place=str(path.absolute())) from error
    defaults = project.get("tool", {}).get("flwr", {}).get("app", {}).get("config", {})
    if "num-server-rounds" not in defaults:
        raise ConfigError(
            "must be the one of this app, with [tool.flwr.app.config]",
            place=str(path.absolute()),
            remedy="name the app's folder with --app",
        )
    return dict(flatten_dict(defaults))


def _given_config(overrides: list[str] | None, *, place: str = "--run-config") -> dict[str, Any]:
    """What a user gives with the option ``place``, read as `flwr run` would."""
    import tomllib

    from click import ClickException
    from flwr.common.config import parse_config_args

    try:
        given = parse_config_args(overrides)
    except (ClickException, ValueError, OSError, tomllib.TOMLDecodeError) as error:
        message = error.message if isinstance(error, ClickException) else str(error)
        raise ConfigError(f"cannot be read ({message})", value=overrides, place=place) from error
    if overrides and not given:  # Flower passes over what is no pair
        raise ConfigError("must be key=value pairs or one TOML file", value=" ".join(overrides), place=place)
    return dict(given)


def _worlds(names: list[str]) -> dict[str, dict[str, Any]]:
    """What each world's file says, by its label: the name of the folder that it lies in."""
    files: dict[str, str | None] = {}
    for name in names:
        is_file = name.endswith(".toml")
        if not is_file and name != "demo":
            raise ConfigError("must be a TOML file of a run config, or demo", value=name, place="--world")
        label = Path(name).absolute().parent.name if is_file else name
        if label in files:
            raise ConfigError("two worlds must lie in folders of different names", value=label, place="--world")
        files[label] = name if is_file else None
    return {label: _given_config([file], place="--world") if file else {} for label, file in files.items()}


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str, kind: type[_Number], place: str) -> list[_Number]:
    try:
        return [kind(part) for part in _listed(text)]
    except ValueError as error:
        raise ConfigError("must be numbers separated by commas", value=text, place=place) from error


def _rates_of_kinds(options: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """What ``--learning-rates`` says, by kind."""
    from fedpt_flwr.compare import KINDS

    found = {}
    for option in options:
        kind, _, text = option.partition("=")
        if kind not in KINDS or not KINDS[kind].rates:
            known = ", ".join(name for name, part in KINDS.items() if part.rates)
            raise ConfigError(f"must begin with one of {known} and =", value=option, place="--learning-rates")
        found[kind] = tuple(_numbers(text, float, "--learning-rates"))
    return found


def _tuned_before(
    tuning: Path | None, worlds: Mapping[str, Mapping[str, Any]], num_devices: int, rated: set[str]
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Learning rates by world and kind that were chosen before, but for ``rated`` kinds; and what to say of them."""
    from fedpt_flwr.compare import packaged_tuning, read_tuning

    path = tuning or packaged_tuning()
    if path is None:
        return {}, []
    asked = tuning is not None
    about = worlds if asked else {label: flat for label, flat in worlds.items() if label == "demo"}
    tuned, notes = read_tuning(path, about, num_devices=num_devices, is_asked_for=asked)
    return {
        label: {kind: rate for kind, rate in part.items() if kind not in rated} for label, part in tuned.items()
    }, notes


def _config_problems(flat: dict[str, Any], num_devices: int | None) -> list[FedPTError]:
    """Everything that would stop a run of this config before its first round, as far as it shows without weights."""
    from fedpt_flwr.accounting import privacy_outlook
    from fedpt_flwr.config import examine_run_config
    from fedpt_flwr.distiller import check_translated
    from fedpt_flwr.models import large_placement, load_tokenizer
    from fedpt_flwr.sources import (
        answer_choices,
        device_shard,
        held_out_items,
        needs_tokenizer,
        public_prompts,
        public_texts,
    )
    from fedpt_flwr.strategy import make_inner_strategy
    from fedpt_flwr.vocabulary import match_vocabularies

    config, problems = examine_run_config(flat)

    @contextmanager
    def collecting() -> Iterator[None]:
        try:
            yield
        except FedPTError as error:
            if str(error) not in map(str, problems):
                problems.append(error)

    tokenizers: dict[str, PreTrainedTokenizerBase] = {}
    refs = {"model.large": config.model.large, "model.small": config.model.small}
    if config.model.large_url:  # the service is asked when a run begins
        del refs["model.large"]
    for key, ref in refs.items():
        with collecting(), naming(key):
            tokenizers[key] = load_tokenizer(ref)
    if len(tokenizers) == 2:
        with collecting():
            vocabulary = match_vocabularies(tokenizers["model.large"], tokenizers["model.small"])
            if vocabulary.id_map is not None:
                check_translated(config, vocabulary.id_map)
    with collecting(), naming("model.large"):
        large_placement(config.model).arguments()
    with collecting():
        make_inner_strategy(config.strategy)
    if config.privacy.is_on:
        with collecting():
            privacy_outlook(config.privacy, config.num_server_rounds)
    num_devices = config.min_devices if num_devices is None else num_devices
    if config.min_devices > num_devices:
        remedy = "start more devices (--num-devices), or lower min-devices"
        rule = f"a run would wait in vain for more than the {num_devices} devices that there are"
        problems.append(ConfigError(rule, value=config.min_devices, place="min-devices", remedy=remedy))
    tokenizer = tokenizers.get("model.small")
    if tokenizer is None and needs_tokenizer(config.data):
        return problems  # without it no record can be written
    if config.data.partitioner != "node-local":
        with collecting():
            device_shard(config.data, device=0, num_devices=num_devices, seed=config.seed, tokenizer=tokenizer)
    for which in ("validation", "test"):
        with collecting():
            held_out_items(config.data, which, seed=config.seed, tokenizer=tokenizer)
    with collecting():
        public_texts(config.data, tokenizer=tokenizer)
    with collecting():
        answer_choices(config.data)
    if config.distillation.mode != "off":
        with collecting():
            public_prompts(config.data, tokenizer=tokenizer)
    return problems


@contextmanager
def _progress() -> Iterator[Any]:
    """A callback ``(what, done, total)``: a bar on a terminal, a line when something begins elsewhere."""
    if _err.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=_err, transient=True) as bars:
            tasks: dict[str, Any] = {}

            def show(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bars.add_task(what, total=total)
                bars.update(tasks[what], completed=done, total=total)

            yield show
        return
    begun: set[str] = set()

    def say(what: str, done: int, total: int) -> None:  # noqa: ARG001
        if what not in begun:
            begun.add(what)
            _err.print(f"{what} ({total})", markup=False, highlight=False)

    yield say


def _absolute(source: str) -> str:
    """A data source as a run config wants it: a path that is there becomes absolute, a hub id stays."""
    return str(Path(source).expanduser().absolute()) if Path(source).expanduser().exists() else source


def _shape(text: str, place: str) -> Any:
    """WIDTHxLAYERSxHEADS as the size of a model; None for an empty text."""
    from fedpt_flwr.pretrain import LlamaShape

    if not text:
        return None
    numbers = text.lower().split("x")
    if len(numbers) != 3 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise ConfigError("must be WIDTHxLAYERSxHEADS", value=text, place=place, remedy="such as 64x3x2")
    width, layers, heads = map(int, numbers)
    with naming(place):
        return LlamaShape(hidden_size=width, num_layers=layers, num_heads=heads)


def _pair_lines(made: Mapping[str, Any]) -> list[str]:
    """What was made, for people: text, models, losses."""
    lines = [
        f"{row['path']}: {row['documents']:,} documents, {row['characters'] / 1e6:.1f} million characters, "
        f"{100 * row['share_of_tokens']:.0f} % of what was read"
        for row in made["sources"]
    ]
    for name, model in made["models"].items():
        curve = model["loss_curve"]
        lines.append(
            f"{name}: {model['parameters']:,} parameters, {model['tokens_seen'] / 1e6:.1f} million tokens, loss "
            f"{curve[0]['loss']:.2f} to {curve[-1]['loss']:.2f} nats per token"
        )
        for row, held_out in zip(made["sources"], model["held_out"], strict=True):
            if held_out:
                lines.append(f"  {held_out['bits_per_byte']:.3f} bits per byte of held-out text of {row['path']}")
    return lines


@contextmanager
def _training_progress() -> Iterator[Any]:
    """A callback ``(what, done, total, loss)``: a bar on a terminal, a line every so often elsewhere."""
    if _err.is_terminal:
        counts = TextColumn("{task.completed:,.0f}/{task.total:,.0f}{task.fields[loss]}")
        columns = (TextColumn("{task.description}"), BarColumn(), counts, TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=_err) as bars:
            tasks: dict[str, Any] = {}

            def draw(what: str, done: int, total: int, loss: float | None) -> None:
                said = "" if loss is None else f", loss {loss:.3f}"
                if what not in tasks:
                    tasks[what] = bars.add_task(what, total=total, loss=said)
                bars.update(tasks[what], completed=done, loss=said)

            yield draw
        return
    begun: dict[str, tuple[float, int]] = {}
    said: dict[str, float] = {}

    def say(what: str, done: int, total: int, loss: float | None) -> None:
        now = time.monotonic()
        start, before = begun.setdefault(what, (now, done))
        if done < total and now - said.get(what, -_LINE_EVERY_S) < _LINE_EVERY_S:
            return
        said[what] = now
        rest = f", loss {loss:.3f}" if loss is not None else ""
        if before < done < total:
            rest += f", {(now - start) / (done - before) * (total - done) / 60:.0f} min left"
        _err.print(f"{what}: {done:,}/{total:,}{rest}", markup=False, highlight=False)

    yield say


@contextmanager
def _cell_progress(done: int, total: int) -> Iterator[Any]:
    """A callback for cells of a comparison that have ended: a bar on a terminal, a line for each elsewhere."""
    if not _err.is_terminal:

        def say(cell: Any) -> None:
            outcome = f"failed: {cell.error.splitlines()[0]}" if cell.error else f"{cell.seconds:.0f} s"
            line = f"[{cell.done}/{cell.total}] {cell.name}: {outcome}"
            _err.print(line, markup=False, highlight=False, soft_wrap=True)

        yield say
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=_err) as bars:
        task = bars.add_task("federations", completed=done, total=total)
        yield lambda cell: bars.update(task, completed=cell.done)


if __name__ == "__main__":
    main()
