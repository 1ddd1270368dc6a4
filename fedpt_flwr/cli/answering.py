"""``fedpt generate``: one answer of a run's models, here or by a service."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fedpt_flwr.cli.console import OUT, note, plain
from fedpt_flwr.cli.loading import find_large, load_proxy, open_run, remote_spending, untouched
from fedpt_flwr.cli.options import (
    Alpha,
    Device,
    Large,
    LargeDeviceMap,
    LargeName,
    LargeUrl,
    Plausibility,
    Prepare,
    RunOption,
)
from fedpt_flwr.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedpt_flwr.config import RunConfig
    from fedpt_flwr.proxy import ProxyModel

_MODELS = ("proxy", "large", "tuned", "untuned")
_COMPARED = ("large", "tuned", "proxy")


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
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token; 2 at most.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of sampling, where the temperature is above 0.")] = 0,
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
    if not 0 <= temperature <= 2:  # NaN, too
        raise ConfigError("must be a number from 0 to 2", value=temperature, place="--temperature")
    if url is not None:
        if large is not None or large_url is not None or run != "latest":
            raise ConfigError(
                "a service has its own run and models", place="--url", remedy="leave --run, --large and --large-url out"
            )
        settings = {"alpha": alpha, "plausibility": plausibility, "temperature": temperature, "seed": seed}
        _ask_service(url, api_key, prompt, example, _COMPARED if compare else (model,), max_new_tokens, settings)
        return
    folder, config = open_run(run)
    import torch

    from fedpt_flwr.models import cpu_threads

    found = find_large(folder, config, large, large_url, large_name)
    proxy, tokenizer = load_proxy(
        folder, found, device, alpha, plausibility, prepare=prepare, large_device_map=large_device_map
    )
    text, answer = (_typed(str(prompt)), None) if example is None else _test_item(config, example)
    models = {"large": proxy.large, "tuned": proxy.tuned, "untuned": proxy.untuned, "proxy": proxy}
    if model == "untuned":
        models["untuned"] = untouched(folder, config, device) or proxy.untuned
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
        note(said, style="dim")
    if compare:
        _print_answers(text, {name: write(name) for name in _COMPARED}, answer)
    else:
        from transformers import TextStreamer

        write(model, TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
        if answer is not None:
            note(f"right answer: {answer}", style="dim")
    if not isinstance(found, str | None):
        remote_spending(found)


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
        if example is None:
            text, answer = _typed(str(prompt)), None
        elif example > len(info["examples"]):
            raise ConfigError(f"the service shows {len(info['examples'])} items", value=example, place="--example")
        else:
            text, answer = info["examples"][example - 1]["prompt"], info["examples"][example - 1]["answer"]
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
            note(f"right answer: {answer}", style="dim")


def _print_answers(prompt: str, answers: Mapping[str, str], right_answer: str | None) -> None:
    table = Table(show_lines=True)
    table.add_column("model")
    table.add_column("answer", overflow="fold")
    table.add_row("prompt", plain(prompt.rstrip("\n")))
    for name, answer in answers.items():
        table.add_row(name, plain(answer))
    if right_answer is not None:
        table.add_row("right answer", plain(right_answer))
    OUT.print(table)


def _typed(prompt: str) -> str:
    """The prompt that somebody means who types this; what comes from data is taken as it is."""
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
    context = proxy.config.max_position_embeddings or 1 << 30
    room = context - limit
    if room < 2:
        raise ConfigError(
            f"must leave room for a prompt in the models' context of {context} tokens",
            value=limit,
            place="--max-new-tokens",
        )
    (ids,), (whole,) = (tokenize_prompts([text], tokenizer, max_length=length) for length in (room, None))
    if lost := len(whole) - len(ids):
        said = f"The prompt's first {lost} tokens are left out: with {limit} of the answer, {room} have room"
        note(said, style="yellow")
    return torch.tensor([ids], device=proxy.device)


def _is_shared(proxy: ProxyModel, name: str) -> bool:
    """Whether this is the untuned model, and it is the tuned one with its adapter switched off."""
    return name == "untuned" and proxy.untuned is None


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input must be UTF-8 ({error})") from error
