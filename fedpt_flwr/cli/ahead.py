"""``fedpt check-config`` and ``fedpt plan``: what can be known before a run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedpt_flwr.cli.configs import flat_config
from fedpt_flwr.cli.console import OUT, say, text_table
from fedpt_flwr.cli.loading import open_run
from fedpt_flwr.cli.options import App, Overrides, check_json_file
from fedpt_flwr.errors import ConfigError, FedPTError, RunError, naming

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fedpt_flwr.config import RunConfig
    from fedpt_flwr.sources import Items


def check_config(
    overrides: Overrides = None,
    app_dir: App = Path(),
    num_devices: Annotated[
        int | None,
        typer.Option(
            "--devices", min=1, help="Number of devices that the training data is dealt out to; by default min-devices."
        ),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table of all keys instead, for docs/run-config.md.")
    ] = False,
) -> None:
    """Say everything that is wrong with a run config, without a run.

    Reads the app's defaults and the overrides as `flwr run` would, then looks at the strategy, the models' folders,
    shapes and vocabularies, and the data. Weights are not loaded.
    """
    from fedpt_flwr.accounting import privacy_outlook
    from fedpt_flwr.config import parse_run_config, settings_markdown

    if markdown:
        sys.stdout.write(settings_markdown())
        return
    flat = flat_config(app_dir, overrides)
    problems = config_problems(flat, num_devices)
    if problems:
        raise ConfigError.of(problems)
    say(f"The run config is fine: {len(flat)} keys.")
    config = parse_run_config(flat)
    if config.privacy.is_on:
        for line in privacy_outlook(config.privacy, config.num_server_rounds):
            say(line)


def config_problems(flat: dict[str, Any], num_devices: int | None) -> list[FedPTError]:
    """Everything that would stop a run of this config before its first round, as far as it shows without weights."""
    from fedpt_flwr.accounting import privacy_outlook
    from fedpt_flwr.config import examine_run_config
    from fedpt_flwr.distiller import check_translated
    from fedpt_flwr.inner import make_inner_strategy
    from fedpt_flwr.models import (
        check_context,
        large_placement,
        load_tokenizer,
        make_tunable,
        model_without_weights,
        output_size,
    )
    from fedpt_flwr.sources import (
        answer_choices,
        check_choices,
        device_shard,
        held_out_items,
        needs_tokenizer,
        public_prompts,
        public_texts,
    )
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
    models: dict[str, PreTrainedModel] = {}
    for key, ref in refs.items():
        with collecting(), naming(key):
            tokenizers[key] = load_tokenizer(ref)
        with collecting(), naming(key):
            models[key] = model_without_weights(ref)
    tokenizer = tokenizers.get("model.small")
    large_tokenizer = tokenizer if config.model.large_url else tokenizers.get("model.large")
    if tokenizer is not None and large_tokenizer is not None:
        sizes = {key.removeprefix("model."): output_size(model) for key, model in models.items()}
        with collecting():
            vocabulary = match_vocabularies(large_tokenizer, tokenizer, sizes)
            if vocabulary.id_map is not None:
                check_translated(config, vocabulary.id_map)
    if (small := models.get("model.small")) is not None:
        with collecting():
            check_context(small.config, config.train.max_length)
        with collecting():
            make_tunable(small, config.tuning, seed=config.seed)
    with collecting(), naming("model.large"):
        placement = large_placement(config.model)
        placement.arguments()
        placement.check_package()
    with collecting():
        make_inner_strategy(config.strategy)
    if config.privacy.is_on:
        with collecting():
            privacy_outlook(config.privacy, config.num_server_rounds)
    num_devices = config.min_devices if num_devices is None else num_devices
    if config.min_devices > num_devices:
        remedy = "start more devices (--devices), or lower min-devices"
        rule = f"a run would wait in vain for more than the {num_devices} devices that there are"
        problems.append(ConfigError(rule, value=config.min_devices, place="min-devices", remedy=remedy))
    with collecting():
        _check_round(config, num_devices)
    if tokenizer is None and needs_tokenizer(config.data):
        return problems  # without it no record can be written
    if config.data.partitioner != "node-local":
        with collecting():
            device_shard(config.data, device=0, num_devices=num_devices, seed=config.seed, tokenizer=tokenizer)
    items: dict[str, Items] = {}
    for which in ("validation", "test"):
        with collecting():
            items[which] = held_out_items(config.data, which, seed=config.seed, tokenizer=tokenizer)
    with collecting():
        public_texts(config.data, tokenizer=tokenizer)
    choices: list[str] = []
    with collecting():
        choices = answer_choices(config.data)
    if choices:
        for which, found in items.items():
            with collecting():
                scored = found.first(config.scoring.num_items) if which == "test" else found
                check_choices(scored, choices, place=f"data.{which}")
    if config.distillation.mode != "off":
        with collecting():
            public_prompts(config.data, tokenizer=tokenizer)
    return problems


def _check_round(config: RunConfig, num_devices: int) -> None:
    """Make sure that so many devices can make a round in private.

    Raises:
        ConfigError: They are too few for differential privacy, or too many for a secure sum.
    """
    from flwr.serverapp.strategy import FedAvg

    from fedpt_flwr.inner import make_inner_strategy
    from fedpt_flwr.privacy import PrivateAverage
    from fedpt_flwr.secure_sum.session import MAX_DEVICES
    from fedpt_flwr.strategy import num_sampled

    sampled = num_sampled(num_devices, config.fraction_train, config.min_replies)
    if config.privacy.secure_sum and sampled > MAX_DEVICES:
        raise ConfigError(
            f"a secure sum has at most {MAX_DEVICES} devices, because each talks to each",
            value=sampled,
            place="privacy.secure-sum",
            remedy="lower fraction-train",
        )
    inner = make_inner_strategy(config.strategy)
    if config.privacy.is_on and isinstance(inner, FedAvg):
        PrivateAverage(inner, config.privacy).begin(range(num_devices), sampled)


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
    app_dir: App = Path(),
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
    check_json_file(json_file)
    costs: dict[str, float] = {}
    if run is not None:
        folder, config = open_run(run)
        costs, num_devices = _measured_costs(folder)
    else:
        from fedpt_flwr.config import parse_run_config

        config = parse_run_config(flat_config(app_dir, overrides))
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
    OUT.print(text_table(planning.plan_table(made)))
    for sentence in planning.plan_notes(made):
        OUT.print(sentence, markup=False, highlight=False)
    if costs:
        OUT.print(text_table(planning.beside_run(made, costs)))
    if json_file is not None:
        write_json(json_file.absolute(), made.to_json() | ({"measured": costs} if costs else {}))


def _measured_costs(folder: Path) -> tuple[dict[str, float], int]:
    """What a run says that it spent, and how many devices it had."""
    from fedpt_flwr.runs import read_json

    if not (folder / "results.json").is_file():
        raise RunError(
            f"the run {folder.name} has not ended, so it has not summed up what it spent",
            place=str(folder),
            remedy="wait for it, or resume it",
        )
    results, shards = (read_json(folder / name) for name in ("results.json", "shards.json"))
    if not isinstance(results, dict) or not isinstance(results.get("costs"), dict):
        raise RunError("must hold a run's results", place=str(folder / "results.json"), remedy="copy the run again")
    if not isinstance(shards, list):
        raise RunError("must hold a run's shards", place=str(folder / "shards.json"), remedy="copy the run again")
    return results["costs"], len(shards)
