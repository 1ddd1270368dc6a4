"""The sections of a run."""

from __future__ import annotations

import datetime
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpt_flwr.config import flat_values, parse_run_config
from fedpt_flwr.errors import RunError
from fedpt_flwr.heterogeneity import measure_shards
from fedpt_flwr.report.attack import attack_inside
from fedpt_flwr.report.page import (
    LONG_TABLE,
    Answer,
    Block,
    Cell,
    Example,
    Examples,
    Page,
    Plots,
    Prose,
    Section,
    Table,
    Terms,
    Token,
    Verdicts,
    absent,
    estimate,
)
from fedpt_flwr.report.plots import (
    LOSS_UNIT,
    MEASURES,
    MOST_GROUPS,
    Bar,
    Curve,
    Plot,
    Point,
    plot_bars,
    plot_curves,
    plot_points,
    scaled,
)
from fedpt_flwr.report.privacy import KEPT, privacy_section, spent
from fedpt_flwr.report.reading import Reader, as_interval, as_mapping, as_mappings, as_number, as_text, as_whole
from fedpt_flwr.report.wording import GIGA, MEGA, count_of, duration, in_unit, nats, percent, short
from fedpt_flwr.runs import RunFolder
from fedpt_flwr.verdict import results_table, verdict

ROWS = {
    "large": "the large model as it is",
    "untuned": "the small model before tuning",
    "tuned": "the small model that the devices tuned",
    "proxy": "the large model, shifted by what tuning changed in the small one",
    "large_few_shot": "the large model with public texts in its prompt",
    "device": "the small model for the devices, which learnt from the proxy at the end",
    "device_covered": "the same, on the items that the public prompts are about",
    "device_not_covered": "the same, on the other items",
}
"""What the rows of a run are."""

_MOST_BARS = 40  # devices in a plot
_MOST_EXAMPLES = 12
_EXAMPLES_WITHOUT_MARKS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run's folder holds; what is not there is empty."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    shards: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    costs: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)

    def phase(self, name: str) -> dict[int, dict[str, Any]]:
        """The lines of ``metrics.jsonl`` of a phase by round, in order; of several for one round the last."""
        lines = {
            round_: row for row in self.metrics if row.get("phase") == name and (round_ := as_whole(row.get("round")))
        }
        return dict(sorted(lines.items()))

    @property
    def settings(self) -> dict[str, Any]:
        """Its run config."""
        return as_mapping(self.config.get("run_config"))


def run_page(folder: Path) -> Page:
    """The page of a run.

    Raises:
        RunError: The folder holds no run, or its run has no complete round.
    """
    if not (folder / "config.json").is_file():
        raise RunError(
            "must be the folder of a run, with config.json, or of a comparison, with summary.json",
            place=str(folder),
            remedy="name the run's own folder",
        )
    reader = Reader(folder)
    run = Run(
        name=folder.name,
        config=reader.mapping("config.json"),
        shards=reader.items("shards.json"),
        metrics=reader.lines("metrics.jsonl"),
        costs=reader.lines("costs.jsonl"),
        results=_clean_results(reader.mapping("results.json")),
        examples=reader.lines("examples.jsonl"),
        answers=reader.lines("answers.jsonl"),
    )
    rounds = max([*run.phase("train"), *RunFolder(folder).rounds()], default=0)
    if not rounds and not run.results["rows"]:
        raise RunError(
            "a report needs a run with at least one complete round, and this one ended, or is, before that",
            value=folder.name,
            place=str(folder),
            remedy="its log says why; make another with `flwr run . --stream`, or name another run",
        )
    builders = (_verdict, _results, _rounds, privacy_section, _shift, _device, _costs, shards_section)
    sections = [section for build in (*builders, _examples, _config) if (section := build(run)) is not None]
    return Page(
        kicker="Federated proxy-tuning · run",
        title=folder.name,
        facts=_run_facts(run, rounds),
        notes=[*_unfinished(run, rounds), *reader.notes],
        sections=[*sections, *attack_inside(folder, reader)],
    )


def _clean_results(results: dict[str, Any]) -> dict[str, Any]:
    """``results.json`` as scoring writes it, without what is malformed."""
    rows: dict[str, dict[str, Any]] = {}
    for name, row in as_mapping(results.get("rows")).items():
        numbers = {key: number for key, value in as_mapping(row).items() if (number := as_number(value)) is not None}
        intervals = {
            key: ends for key, value in as_mapping(as_mapping(row).get("ci95")).items() if (ends := as_interval(value))
        }
        if numbers:
            rows[name] = {"n": "?"} | numbers | {"ci95": intervals}
    differences = {}
    measures = {"": "exact_match", "_rouge_l": "rouge_l", "_loss": "loss"}
    for other, (suffix, measure) in itertools.product(("tuned", "large"), measures.items()):
        difference = as_mapping(results.get(f"proxy_minus_{other}{suffix}"))
        value, ends = as_number(difference.get("value")), as_interval(difference.get("ci95"))
        counted = rows.get("proxy", {}).get("n", "?") != "?"  # of unknown number, items may be too few for a verdict
        if counted and value is not None and ends and all(measure in rows.get(row, {}) for row in ("proxy", other)):
            differences[f"proxy_minus_{other}{suffix}"] = {"value": value, "ci95": ends}
    return (
        results
        | dict.fromkeys((key for key in results if key.startswith("proxy_minus_")), None)
        | differences
        | {"rows": rows}
    )


def _run_facts(run: Run, rounds: int) -> list[str]:
    facts = []
    with suppress(ValueError):
        begun = datetime.datetime.strptime(run.name.partition("-")[0], "%Y%m%dT%H%M%SZ").replace(tzinfo=datetime.UTC)
        facts.append(f"{begun:%-d %B %Y, %H:%M} UTC")
    devices = as_whole(run.results.get("devices")) or len(run.shards)
    if devices:
        facts.append(count_of(devices, "device"))
    facts.append(count_of(rounds, "round"))
    for key, name in (("strategy.name", ""), ("tuning.mode", "tuning "), ("distillation.mode", "distillation ")):
        if run.settings.get(key):
            facts.append(name + as_text(run.settings[key]))
    if "seed" in run.settings:
        facts.append(f"seed {as_text(run.settings['seed'])}")
    costs = as_mapping(run.results.get("costs"))
    seconds, after = as_number(costs.get("seconds")), as_whole(costs.get("seconds_after_round"))
    if seconds is not None:
        facts.append(f"took {duration(seconds)}" + (f" after round {after}, where it was resumed" if after else ""))
    return facts


def _unfinished(run: Run, rounds: int) -> list[str]:
    if run.results["rows"]:
        return []
    planned = as_whole(run.settings.get("num-server-rounds"))
    of_all = f" of {planned}" if planned else ""
    return [
        "This run has no results: it failed, was stopped, or is still running. "
        f"What follows is what it left after round {rounds}{of_all}."
    ]


def _verdict(run: Run) -> Section:
    blocks: list[Block] = [absent("No verdict: the run has not scored its test items.")]
    if run.results["rows"]:
        # One sentence a line: "The proxy BEATS the large model: exact match …, paired)."
        sentences = re.split(r"(?<=\)\.)\s+", verdict(run.results))
        parts = [sentence.partition(": ") for sentence in sentences]
        blocks = [Verdicts(sentences=[(said, numbers) for said, _, numbers in parts])]
    return Section(id="verdict", title="Verdict", blocks=blocks)


def _results(run: Run) -> Section:
    title = "Results on the test items"
    if not run.results["rows"]:
        return Section(id="results", title=title, blocks=[absent("No results: the run has not scored its test items.")])
    head, *rows = results_table(run.results)
    table = Table(
        caption="Shares in per cent, losses in nats per answer token; 95 % intervals over the test items in brackets",
        head=head,
        rows=[[model, items, *map(_cell, cells)] for model, items, *cells in rows],
    )
    plots = []
    for measure, name, unit, scale, write in MEASURES:
        points = [
            Point(row, row, scale * value, scaled(numbers["ci95"].get(measure), scale))
            for row, numbers in run.results["rows"].items()
            if (value := numbers.get(measure)) is not None
        ]
        if points:
            plots.append(plot_points(f"plot-results-{measure.replace('_', '-')}", name, points, unit=unit, write=write))
    blocks: list[Block] = [Plots(plots=plots)] if plots else []
    known = {row: ROWS[row] for row in run.results["rows"] if row in ROWS}
    return Section(id="results", title=title, blocks=[*blocks, table, *([Terms(terms=known)] if known else [])])


def _cell(text: str) -> str | Cell:
    value, bracket, interval = text.partition(" [")
    return Cell(value, bracket.strip() + interval) if interval else text


def _rounds(run: Run) -> Section:
    train, validation, distillation = (run.phase(name) for name in ("train", "validation", "distillation"))
    blocks: list[Block] = []
    plots = []
    losses = _curve("training", "small", train, "train_loss")
    if losses.x:
        plots.append(plot_curves("plot-rounds-train-loss", "Training loss on the devices", [losses], unit=LOSS_UNIT))
    for measure, name, unit, scale, write in MEASURES:
        found = [_validation_curve(row, validation, measure, scale) for row in ("tuned", "proxy", "device")]
        shown = [curve for curve in found if curve.x]
        if shown:
            label = f"{name} on validation items"
            plots.append(
                plot_curves(
                    f"plot-rounds-{measure.replace('_', '-')}", label, shown, unit=unit, write=write, share=scale > 1
                )
            )
    drift = [
        curve
        for label, row, key in (("in the round", "muted", "drift"), ("in all", "proxy", "drift_total"))
        if (curve := _curve(label, row, distillation, key)).x
    ]
    if drift:
        caption = "How far distillation moved the small model along large - untuned; 1 would be all the way."
        plots.append(plot_curves("plot-rounds-drift", "Drift by distillation", drift, unit="share", caption=caption))
    if plots:
        blocks.append(Plots(plots=plots))
    if not train:
        blocks.append(absent("No training losses: metrics.jsonl has no line of a round."))
    if not validation:
        blocks.append(absent("No validation scores: the run has scored none after a round (scoring.round-items)."))
    if distillation and not drift:
        blocks.append(absent("The run distilled, but did not write how far the small model drifted."))
    if train or validation or distillation:
        blocks.append(_rounds_table(run, train, validation, distillation))
    return Section(id="rounds", title="Round by round", blocks=blocks)


def _curve(label: str, row: str, lines: Mapping[int, Mapping[str, Any]], key: str) -> Curve:
    found = {round_: value for round_, line in lines.items() if (value := as_number(line.get(key))) is not None}
    return Curve(label, row, tuple(found), tuple(found.values()))


def _validation_curve(row: str, lines: Mapping[int, Mapping[str, Any]], measure: str, scale: float) -> Curve:
    """A model's measure over the rounds, with its intervals where every round has one."""
    rows = {round_: as_mapping(as_mapping(line.get("rows")).get(row)) for round_, line in lines.items()}
    found = {round_: value for round_, cells in rows.items() if (value := as_number(cells.get(measure))) is not None}
    ends = [scaled(as_interval(as_mapping(rows[round_].get("ci95")).get(measure)), scale) for round_ in found]
    band = [pair for pair in ends if pair is not None]
    values = tuple(scale * value for value in found.values())
    return Curve(row, row, tuple(found), values, tuple(band) if len(band) == len(found) else ())


def _rounds_table(
    run: Run,
    train: Mapping[int, Mapping[str, Any]],
    validation: Mapping[int, Mapping[str, Any]],
    distillation: Mapping[int, Mapping[str, Any]],
) -> Table:
    """All numbers of the rounds; columns that no round has are left out."""
    shift = run.phase("shift")
    columns: list[tuple[str, Callable[[int], float | None], Callable[[float], str]]] = []

    def add(head: str, lines: Mapping[int, Mapping[str, Any]], key: str, write: Callable[[float], str]) -> None:
        columns.append((head, lambda round_: as_number(lines.get(round_, {}).get(key)), write))

    def add_row(row: str, measure: str, head: str, write: Callable[[float], str]) -> None:
        def value(round_: int) -> float | None:
            rows = as_mapping(validation.get(round_, {}).get("rows"))
            return as_number(as_mapping(rows.get(row)).get(measure))

        columns.append((head, value, write))

    add("devices", train, "devices", short)
    add("replies used", train, "replies", short)
    add("training loss", train, "train_loss", nats)
    for row, (measure, write, unit) in itertools.product(
        ("tuned", "proxy", "device"), (("exact_match", percent, "%"), ("loss", nats, "loss"))
    ):
        add_row(row, measure, f"{row} {unit}", write)
    shifts = {round_: {**validation.get(round_, {}), **shift.get(round_, {})} for round_ in {*validation, *shift}}
    add("alpha", shifts, "alpha", nats)
    add("mask", shifts, "plausibility", nats)
    add("KL first", distillation, "kl_first", nats)
    add("KL last", distillation, "kl_last", nats)
    add("drift", distillation, "drift", nats)
    add("training s", train, "seconds", short)
    rounds = sorted({*train, *validation, *distillation, *shift})
    values = [(head, write, {round_: value(round_) for round_ in rounds}) for head, value, write in columns]
    shown = [column for column in values if any(value is not None for value in column[2].values())]
    return Table(
        caption="All numbers of the rounds: exact match in per cent of the validation items, losses in nats",
        head=["round", *(head for head, _, _ in shown)],
        rows=[
            [str(round_), *("-" if (value := of[round_]) is None else write(value) for _, write, of in shown)]
            for round_ in rounds
        ],
        folded=True,
    )


def _shift(run: Run) -> Section:
    title = "Strength of the shift"
    last = list(run.phase("shift").values())[-1:]
    shift = as_mapping(run.results.get("shift")) or (last[0] if last else {})
    if not shift:
        sentence = "No curve: the run did not write how it came to its alpha and mask."
        return Section(id="shift", title=title, blocks=[absent(sentence)])
    alpha, mask = as_number(shift.get("alpha")), as_number(shift.get("plausibility"))
    chosen = "an unknown alpha" if alpha is None else f"alpha {alpha:g}"
    chosen += "" if mask is None else f" and {_mask(mask)}"
    by = shift.get("chosen_by")
    curve = [
        (at, threshold, point)
        for point in as_mappings(shift.get("curve"))
        if (at := as_number(point.get("alpha"))) is not None
        and (threshold := as_number(point.get("plausibility"))) is not None
    ]
    items = as_whole(shift.get("items"))
    on_items = f"on {count_of(items, 'validation item')}" if items else "on validation items"
    said = {
        "config": f"The run config set {chosen}." + (f" The curve is {on_items}." if curve else ""),
        "exact_match": f"Chosen by exact match {on_items}: {chosen}.",
        "loss": f"Chosen by loss {on_items}, because nothing got any of them right: {chosen}.",
    }
    blocks: list[Block] = [Prose(text=said.get(str(by), f"The run used {chosen}."))]
    plots = []
    for measure, name, unit, scale, write in MEASURES:
        curves = _shift_curves(curve, measure, scale)
        if not curves:
            continue
        marked = [
            (at, scale * value)
            for at, threshold, point in curve
            if at == alpha and threshold == mask and (value := as_number(point.get(measure))) is not None
        ]
        plots.append(
            plot_curves(
                f"plot-shift-{measure.replace('_', '-')}",
                f"{name} by alpha",
                curves,
                unit=unit,
                x_label="alpha",
                write=write,
                chosen=marked[:1],
                chosen_label="from the config" if by == "config" else "chosen",
                share=scale > 1,
                caption="" if len(curves) > 1 or measure != "loss" else "The loss is without the mask, whatever it is.",
            )
        )
    if plots:
        rows = [[f"{at:g}", f"{threshold:g}", *_measured(point)] for at, threshold, point in curve]
        caption = "All alphas and masks that were tried"
        head = ["alpha", "mask", "exact match %", "loss"]
        blocks += [Plots(plots=plots), Table(caption=caption, head=head, rows=rows, texts=0, folded=True)]
    else:
        blocks.append(absent("No curve: no other alpha or mask was tried."))
    return Section(id="shift", title=title, blocks=blocks)


def _measured(point: Mapping[str, Any]) -> list[str | Cell]:
    """Exact match and loss as cells."""
    return [
        estimate(as_number(point.get(key)), None, write) for key, write in (("exact_match", percent), ("loss", nats))
    ]


def _shift_curves(points: Sequence[tuple[float, float, Mapping[str, Any]]], measure: str, scale: float) -> list[Curve]:
    """A curve for each mask; one for all masks where they do not differ."""
    by_mask: dict[float, dict[float, float]] = {}
    for alpha, mask, point in sorted(points, key=lambda found: found[:2]):
        value = as_number(point.get(measure))
        if value is not None:
            by_mask.setdefault(mask, {})[alpha] = scale * value
    if len(by_mask) > 1 and len({tuple(values.items()) for values in by_mask.values()}) == 1:
        values = next(iter(by_mask.values()))
        return [Curve("any mask", "proxy", tuple(values), tuple(values.values()))]
    names = [_mask(mask) for mask in sorted(by_mask)]
    return [
        Curve(name, f"series-{number % MOST_GROUPS}", tuple(by_mask[mask]), tuple(by_mask[mask].values()))
        for number, (name, mask) in enumerate(zip(names, sorted(by_mask), strict=True))
    ]


def _mask(threshold: float) -> str:
    return f"mask {threshold:g}" if threshold else "no mask"


def _device(run: Run) -> Section:
    """The model that the devices get: how it learnt from the proxy, and how far it was moved."""
    title = "The devices' model"
    lessons = list(run.phase("device").values())
    if not lessons:
        sentence = "None: the run has not distilled a model for its devices (distillation.mode)."
        return Section(id="device", title=title, blocks=[absent(sentence)])
    lesson = lessons[-1]
    first, last, share = (as_number(lesson.get(key)) for key in ("kl_first", "kl_last", "share"))
    said = ["It learnt from the proxy on public text."]
    if first is not None and last is not None:
        said.append(f"Its KL divergence from the proxy went from {nats(first)} to {nats(last)} nats per token.")
    if share is not None:
        said.append(
            f"Of the way from its tuned weights (0) to those at the end of that (1), {share:g} was best on the "
            "validation items; that is what the devices get."
        )
    points = [
        (at, point) for point in as_mappings(lesson.get("curve")) if (at := as_number(point.get("share"))) is not None
    ]
    plots = []
    for measure, name, unit, scale, write in MEASURES:
        found = {at: scale * value for at, point in points if (value := as_number(point.get(measure))) is not None}
        if found:
            plots.append(
                plot_curves(
                    f"plot-device-{measure.replace('_', '-')}",
                    f"{name} of the devices' model",
                    [Curve("device", "device", tuple(found), tuple(found.values()))],
                    unit=unit,
                    x_label="share of the way",
                    write=write,
                    chosen=[(share, found[share])] if share is not None and share in found else [],
                    share=scale > 1,
                )
            )
    blocks: list[Block] = [Prose(text=" ".join(said))]
    if plots:
        rows = [[f"{at:g}", *_measured(point)] for at, point in points]
        head = ["share of the way", "exact match %", "loss"]
        caption = "All shares of the way that were tried"
        blocks += [Plots(plots=plots), Table(caption=caption, head=head, rows=rows, texts=0, folded=True)]
    return Section(id="device", title=title, blocks=blocks)


_DEVICE_COSTS: tuple[tuple[str, str, float, Callable[[Iterable[float]], float]], ...] = (
    ("bytes_down", "MB down", MEGA, sum),
    ("bytes_up", "MB up", MEGA, sum),
    ("seconds", "training s", 1, sum),
    ("flops", "GFLOP", GIGA, sum),
    ("num_tokens", "tokens", 1, sum),
    ("state_bytes", "state MB", MEGA, max),
    ("peak_memory_bytes", "process MB", MEGA, max),
    ("memory_growth_bytes", "growth MB", MEGA, max),
)
"""What devices report: key, name of the column, unit, and how rounds are put together."""

_DEVICE_COST_TERMS = {
    "MB down, MB up": "messages as serialised, summed over the rounds",
    "GFLOP, tokens": "of training, summed over the rounds; a GFLOP is a thousand million floating-point operations",
    "state MB": "weights, gradients and optimizer state, the largest of the rounds",
    "process MB": "peak memory of the device's whole process, with Python and its libraries",
    "growth MB": "by how much memory grew while it trained",
}


def _costs(run: Run) -> Section:
    devices = [row for row in run.costs if as_whole(row.get("device")) is not None]
    server = [row for row in run.costs if row.get("device") == "server"]
    blocks: list[Block] = []
    plots = [*_server_plots(run, server), *_device_seconds(devices)]
    if plots:
        blocks.append(Plots(plots=plots))
    if devices:
        table = _device_table(devices)
        shown = ", ".join(table.head)
        terms = {
            names: meaning
            for names, meaning in _DEVICE_COST_TERMS.items()
            if any(name in shown for name in names.split(", "))
        }
        blocks += [table, Terms(terms=terms)] if terms else [table]
    else:
        blocks.append(absent("No costs of devices: costs.jsonl has no line of one."))
    phases = _phases(run, server)
    if phases:
        blocks.append(
            Table(
                caption="The server, by phase: tokens that went through the large model, and seconds",
                head=["phase", "times", "large-model tokens", "seconds"],
                rows=[
                    [name, str(times), f"{tokens:,.0f}", short(took)] for name, (times, tokens, took) in phases.items()
                ],
                foot=[
                    "all",
                    "",
                    f"{sum(tokens for _, tokens, _ in phases.values()):,.0f}",
                    short(sum(took for _, _, took in phases.values())),
                ],
            )
        )
    if not server:
        blocks.append(absent("No costs of the server: costs.jsonl has no line of it."))
    return Section(id="costs", title="Costs", blocks=blocks)


def _device_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    by_device: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_device.setdefault(as_whole(row["device"]) or 0, []).append(row)
    columns = [cost for cost in _DEVICE_COSTS if any(as_number(row.get(cost[0])) is not None for row in rows)]
    refused = any("refused" in row for row in rows)

    def cells(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        texts = [name, str(sum("refused" not in row for row in rows))]
        if refused:
            texts.append(str(sum("refused" in row for row in rows)))
        for key, _, unit, together in columns:
            values = [value for row in rows if (value := as_number(row.get(key))) is not None]
            texts.append(short(in_unit(unit, together(values))) if values else "-")
        return texts

    return Table(
        caption="Each device, over all rounds",
        head=["device", "replies used", *(["refused"] if refused else []), *(head for _, head, _, _ in columns)],
        rows=[cells(str(device), by_device[device]) for device in sorted(by_device)],
        foot=cells("all", rows),
        folded=len(by_device) > LONG_TABLE,
    )


def _device_seconds(rows: Sequence[Mapping[str, Any]]) -> list[Plot]:
    by_device: dict[int, list[float]] = {}
    for row in rows:
        seconds = as_number(row.get("seconds"))
        if seconds is not None:
            by_device.setdefault(as_whole(row["device"]) or 0, []).append(seconds)
    shown = sorted(by_device)[:_MOST_BARS]
    points = [
        Point(f"device {device}", "small", sum(seconds) / len(seconds), None, tuple(seconds))
        for device in shown
        for seconds in [by_device[device]]
    ]
    if not points:
        return []
    caption = "A dot for each round, the mark is the mean."
    if len(by_device) > len(shown):
        caption += f" The first {len(shown)} of {len(by_device)} devices."
    title = "Training time of a device and round"
    return [plot_points("plot-costs-devices", title, points, unit="seconds", write=short, caption=caption)]


def _phases(run: Run, server: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, float, float]]:
    """For each phase: how often, tokens through the large model, seconds; training is waiting for the devices."""
    rows: list[tuple[str, Mapping[str, Any]]]
    rows = [("train", row) for row in run.phase("train").values() if as_number(row.get("seconds")) is not None]
    rows += [(as_text(row.get("phase")) or "?", row) for row in server]
    phases: dict[str, tuple[int, float, float]] = {}
    for name, row in rows:
        times, tokens, seconds = phases.get(name, (0, 0.0, 0.0))
        phases[name] = (
            times + 1,
            tokens + (as_number(row.get("large_tokens")) or 0),
            seconds + (as_number(row.get("seconds")) or 0),
        )
    return phases


def _server_plots(run: Run, server: Sequence[Mapping[str, Any]]) -> list[Plot]:
    phases = _phases(run, server)
    tokens = [Bar(name, {"": tokens}) for name, (_, tokens, _) in phases.items() if tokens]
    seconds = [Bar(name, {"": took}) for name, (_, _, took) in phases.items() if took]
    plots = []
    if tokens:
        plots.append(plot_bars("plot-costs-tokens", "Tokens through the large model", tokens, unit="tokens"))
    if seconds:
        caption = "train: waiting for the devices; the others: the server's own work."
        plots.append(plot_bars("plot-costs-seconds", "Seconds by phase", seconds, unit="seconds", caption=caption))
    return plots


def shards_section(run: Run) -> Section:
    """Who holds how many examples of what."""
    title = "Who holds what"
    shards: list[tuple[str, int, dict[str, float]]] = []
    for shard in run.shards:
        groups = {
            name or "without a group": number
            for name, value in as_mapping(shard.get("groups")).items()
            if (number := as_number(value)) is not None and number > 0
        }
        total = as_whole(shard.get("num_examples"))
        shards.append((as_text(shard.get("device")), int(sum(groups.values())) if total is None else total, groups))
    if spent(run):
        return Section(id="shards", title=title, blocks=[absent(KEPT)])
    if not shards:
        sentence = "Not known: the run did not write how its examples are spread over the devices (shards.json)."
        return Section(id="shards", title=title, blocks=[absent(sentence)])
    totals = Counter[str]()
    for _, _, groups in shards:
        totals.update({name: int(number) for name, number in groups.items()})
    order = [name for name, _ in totals.most_common()]
    blocks: list[Block] = []
    examples = sum(total for _, total, _ in shards)
    groups_said = f" of {count_of(len(order), 'group')}" if order else ""
    blocks.append(
        Prose(text=f"{count_of(examples, 'training example')}{groups_said} on {count_of(len(shards), 'device')}.")
    )
    found = measure_shards(
        [max(total, 0) for _, total, _ in shards],
        [{name: int(number) for name, number in groups.items()} for _, _, groups in shards],
    )
    blocks.extend(Prose(text=f"{sentence[0].upper()}{sentence[1:]}.") for sentence in found.sentences())
    shown = shards[:_MOST_BARS]
    bars = [Bar(f"device {device}", _few_groups(groups, order, total)) for device, total, groups in shown]
    if any(sum(bar.parts.values()) for bar in bars):
        caption = "" if len(shown) == len(shards) else f"The first {len(shown)} of {len(shards)} devices."
        blocks.append(
            Plots(plots=[plot_bars("plot-shards", "Training examples", bars, unit="examples", caption=caption)])
        )
    if not order:
        blocks.append(absent("The examples belong to no groups (data.group-field)."))
    blocks.append(
        Table(
            name="devices",
            caption="Training examples of each device by group",
            head=["device", "groups", "differs by", "examples"],
            rows=[
                [
                    device,
                    ", ".join(f"{name} {groups[name]:,}" for name in order if name in groups) or "-",
                    estimate(distance, None, "{:.2f}".format),
                    estimate(total, None, "{:,}".format),
                ]
                for (device, total, groups), distance in zip(shards, found.distances, strict=True)
            ],
            foot=["all", "", "", f"{examples:,}"],
            texts=2,
            folded=len(shards) > LONG_TABLE,
        )
    )
    return Section(id="shards", title=title, blocks=blocks)


def _few_groups(groups: Mapping[str, float], order: Sequence[str], total: int) -> dict[str, float]:
    """The examples of a device by group, all but the largest groups of the run put together."""
    if not groups:
        return {"": max(total, 0)}
    if len(order) <= MOST_GROUPS:
        return {name: groups[name] for name in order if name in groups}
    named = order[: MOST_GROUPS - 1]
    rest = sum(number for name, number in groups.items() if name not in named)
    few = {name: groups[name] for name in named if name in groups}
    return few | ({f"{len(order) - len(named)} others": rest} if rest else {})


def _examples(run: Run) -> Section:
    title = "Example answers"
    marks = {
        (as_text(record.get("prompt")), as_text(record.get("reference"))): as_mapping(record.get("models"))
        for record in run.answers
    }
    if run.examples:
        records = run.examples[:_MOST_EXAMPLES]
        said = (
            "Underlined tokens are those that the proxy changed: above each stands what the large model alone would "
            "have written there, after the same tokens."
        )
        if len(run.examples) > len(records):
            said += f" The first {len(records)} of {len(run.examples)} examples."
        blocks: list[Block] = [Prose(text=said)]
    elif run.answers:
        records = run.answers[:_EXAMPLES_WITHOUT_MARKS]
        said = (
            "Which tokens the proxy changed is not known, because the run wrote no examples.jsonl. These are the first "
            f"{len(records)} of {count_of(len(run.answers), 'test item')}."
        )
        blocks = [absent(said)]
    else:
        sentence = "None: the run has not written any (examples.jsonl, answers.jsonl)."
        return Section(id="examples", title=title, blocks=[absent(sentence)])
    return Section(
        id="examples", title=title, blocks=[*blocks, Examples(examples=[_example(row, marks) for row in records])]
    )


def _example(record: Mapping[str, Any], marks: Mapping[tuple[str, str], Mapping[str, Any]]) -> Example:
    prompt, reference = as_text(record.get("prompt")), as_text(record.get("reference"))
    judged = marks.get((prompt, reference), {})
    answers = []
    for model, seen in as_mapping(record.get("models")).items():
        text = as_text(seen.get("answer") if isinstance(seen, dict) else seen)
        right = as_whole(as_mapping(judged.get(model)).get("exact_match"))
        tokens = [_token(token) for token in as_mappings(record.get("tokens"))] if model == "proxy" else []
        answers.append(Answer(model=model, text=text, right=None if right is None else bool(right), tokens=tokens))
    return Example(prompt=prompt, reference=reference, answers=answers)


def _token(token: Mapping[str, Any]) -> Token:
    text = as_text(token.get("text"))
    if token.get("changed") is not True:
        return Token(before="", text=text)
    rest = text.lstrip(" ")
    return Token(
        before=text[: len(text) - len(rest)], text=_visible(rest), instead=_visible(as_text(token.get("large")))
    )


def _visible(text: str) -> str:
    """A token without the white space around it; signs in the place of one that is nothing else."""
    seen = text.strip(" ").replace("\n", "↵").replace("\t", "⇥")
    return seen or ("␣" if text else "∅")


def _config(run: Run) -> Section:
    blocks: list[Block] = []
    settings = run.settings
    if settings:
        defaults = flat_values(parse_run_config({}))
        other = {key: value for key, value in settings.items() if key not in defaults or defaults[key] != value}
        blocks.append(
            Table(
                caption="What the run config sets differently from the defaults",
                head=["key", "value", "default"],
                rows=[[key, as_text(value), as_text(defaults.get(key, "-"))] for key, value in other.items()],
                texts=3,
            )
            if other
            else Prose(text="Every key of the run config has its default.")
        )
        blocks.append(
            Table(
                caption=f"The whole run config, {count_of(len(settings), 'key')}",
                head=["key", "value"],
                rows=[[key, as_text(value)] for key, value in settings.items()],
                texts=2,
                folded=True,
            )
        )
    else:
        blocks.append(absent("No run config: config.json does not hold one."))
    prints = {
        **{f"model, {name}": value for name, value in as_mapping(run.config.get("fingerprints")).items()},
        **{f"{name} items": value for name, value in as_mapping(run.config.get("data_hashes")).items()},
        "code": run.config.get("code_hash"),
        "Flower runs": ", ".join(map(as_text, ids))
        if isinstance(ids := run.config.get("flower_run_ids"), list)
        else None,
    }
    for caption, values, head in (
        ("Versions", as_mapping(run.config.get("versions")), ["package", "version"]),
        ("Fingerprints", {name: value for name, value in prints.items() if value}, ["of", "hash"]),
    ):
        if values:
            rows = [[name, as_text(value)] for name, value in values.items()]
            blocks.append(Table(caption=caption, head=head, rows=rows, texts=2, folded=True))
        else:
            blocks.append(absent(f"{caption}: none written."))
    return Section(id="config", title="Config and versions", blocks=blocks)
