"""``fedpt score`` and ``fedpt report``: what a run came to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedpt_flwr.cli.console import say
from fedpt_flwr.cli.loading import find_large, load_proxy, open_run, remote_spending, untouched
from fedpt_flwr.cli.options import (
    Alpha,
    Device,
    Large,
    LargeDeviceMap,
    LargeName,
    LargeUrl,
    Plausibility,
    Run,
    check_json_file,
)
from fedpt_flwr.cli.progress import stage_progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedpt_flwr.config import RunConfig
    from fedpt_flwr.evaluation import Evaluator


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
    check_json_file(json_file)
    folder, config = open_run(run)
    from fedpt_flwr.evaluation import Evaluator
    from fedpt_flwr.runs import write_json
    from fedpt_flwr.sources import held_out_items, public_texts
    from fedpt_flwr.verdict import render_table, results_table, verdict

    found = find_large(folder, config, large, large_url, large_name)
    proxy, tokenizer = load_proxy(folder, found, device, alpha, plausibility, large_device_map=large_device_map)
    which = "validation" if validation else "test"
    number = config.scoring.num_items if items is None else items
    chosen = held_out_items(config.data, which, seed=config.seed, tokenizer=tokenizer).first(number)
    public = public_texts(config.data, tokenizer=tokenizer) if config.scoring.few_shot else []
    evaluator = Evaluator(chosen, tokenizer, config, proxy, place=f"data.{which}")
    if (original := untouched(folder, config, device)) is not None:
        evaluator.remember_untuned(original)
    with stage_progress() as progress:
        scores = evaluator.score(proxy, public_texts=public, on_progress=progress)
    results = scores.to_json()
    if (folder / "device").is_dir():
        results["rows"] |= _device_rows(folder, config, evaluator, device, tokenizer)
    say(render_table(results_table(results)))
    say(verdict(results))
    if not isinstance(found, str | None):
        results["costs"] = remote_spending(found)
    if json_file is not None:
        write_json(json_file.absolute(), results)


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
    say(f"The report is {page}")
