"""What scores come to, for people: a table, and sentences on who is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedpt_flwr.scoring import ROUGE_L, SHARES

_LOSES = "LOSES TO"

FEWEST_ITEMS = 6
"""Paired items that a difference is told from: five all point one way by chance in 2 * 0.5^5 = 6 % of cases, and a
bootstrap over one item finds an interval without any width."""

_COLUMNS = {
    "exact_match": "exact match %",
    "contains_value": "contains value %",
    "right_field": "right field %",
    "rouge_l": "ROUGE-L %",
    "invalid_rate": "invalid %",
    "num_invalid": "invalid",
    "loss": "loss",
    "loss_upper_bound": "loss at most",
    "perplexity": "perplexity",
    "shots": "shots",
}


def results_table(results: Mapping[str, Any]) -> list[list[str]]:
    """The results as cells of text, the head first.

    Args:
        results: What ``results.json`` holds: :meth:`Scores.to_json`, or with more rows.

    Returns:
        A list of cells for the head and each row. Shares are in per cent, losses in nats per answer token, both with
        their 95 % intervals in brackets. A column that no row has is left out, a cell without a value is ``-``.
    """
    rows: Mapping[str, Mapping[str, Any]] = results["rows"]
    columns = [name for name in _COLUMNS if any(name in row for row in rows.values())]
    table = [["model", "items", *(_COLUMNS[name] for name in columns)]]
    for model, row in rows.items():
        interval = row.get("ci95", {})
        cells = [_cell(name, row.get(name), interval.get(name)) for name in columns]
        table.append([model, str(row["n"]), *cells])
    return table


def _cell(name: str, value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "-"
    plain = {"shots": "{:.1f}".format, "num_invalid": "{:.0f}".format}.get(name, "{:.4g}".format)
    write = _percent if name in (*SHARES, ROUGE_L) else plain
    return write(value) + (f" [{write(interval[0])}, {write(interval[1])}]" if interval is not None else "")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def render_table(table: Sequence[Sequence[str]]) -> str:
    """Cells as lines of plain ASCII text, in columns; for logs and terminals."""
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def verdict(results: Mapping[str, Any]) -> str:
    """Says plainly whether the proxy beats, ties with or loses to the tuned small model and the large one.

    By the paired 95 % intervals of the difference in exact match, ROUGE-L and loss: it beats or loses where the
    interval leaves out 0, and nothing is said of fewer than :data:`FEWEST_ITEMS` items. Where no model gets anything
    right, exact match is a tie that says nothing and loss tells them apart.

    Args:
        results: What ``results.json`` holds.
    """
    sentences = []
    for other, name in (("tuned", "tuned small"), ("large", "large")):
        for place, (measure, outcome, numbers) in enumerate(_compared(results, other)):
            said = f"By {measure} it {outcome} it" if place else f"The proxy {outcome} the {name} model"
            sentences.append(f"{said}: {numbers}.")
    return " ".join(sentences) or "No verdict: the proxy was not compared."


def worse_by(results: Mapping[str, Any]) -> list[str]:
    """The measures by which the proxy loses to the tuned model."""
    return [measure for measure, outcome, _ in _compared(results, "tuned") if outcome == _LOSES]


def _compared(results: Mapping[str, Any], other: str) -> list[tuple[str, str, str]]:
    """What there is of measures of the proxy against another model: their names, outcomes and numbers."""
    measures = [
        ("exact match", _by_share(results, other, "", "exact_match", "exact match", " %")),
        ("ROUGE-L", _by_share(results, other, f"_{ROUGE_L}", ROUGE_L, "ROUGE-L", "")),
        ("loss", _by_loss(results, other)),
    ]
    return [(measure, *found) for measure, found in measures if found is not None]


def _by_share(
    results: Mapping[str, Any], other: str, suffix: str, column: str, name: str, unit: str
) -> tuple[str, str] | None:
    """Of a measure from 0 to 1 of which more is better; it is shown in hundredths."""
    difference = results.get(f"proxy_minus_{other}{suffix}")
    if difference is None:
        return None
    low, high = difference["ci95"]
    rows = results["rows"]
    ours, theirs = (_percent(rows[row][column]) for row in ("proxy", other))
    return _outcome(low, high, rows["proxy"]["n"]), (
        f"{name} {ours}{unit} against {theirs}{unit}, difference {100 * difference['value']:+.1f} points "
        f"(95 % interval {100 * low:+.1f} to {100 * high:+.1f}, {_items(rows['proxy']['n'])}, paired)"
    )


def _by_loss(results: Mapping[str, Any], other: str) -> tuple[str, str] | None:
    difference = results.get(f"proxy_minus_{other}_loss")
    if difference is None:
        return None
    low, high = difference["ci95"]
    rows = results["rows"]
    ours, theirs = (f"{rows[row]['loss']:.4g}" for row in ("proxy", other))
    return _outcome(-high, -low, rows["proxy"]["n"]), (
        f"loss {ours} against {theirs} nats per answer token, difference {difference['value']:+.4g} "
        f"(95 % interval {low:+.4g} to {high:+.4g}, {_items(rows['proxy']['n'])}, paired)"
    )


def _outcome(low: float, high: float, num_items: int) -> str:
    """What an interval of an advantage says."""
    if num_items < FEWEST_ITEMS:
        return "CANNOT BE TOLD FROM"
    return "BEATS" if low > 0 else _LOSES if high < 0 else "TIES WITH"


def _items(number: int) -> str:
    few = f", too few: {FEWEST_ITEMS} are the fewest" if number < FEWEST_ITEMS else ""
    return f"{number} item{'' if number == 1 else 's'}{few}"
