"""The section of a private run: what each device's privacy has cost, round by round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedpt_flwr.report.page import Plots, Prose, Section, Table
from fedpt_flwr.report.plots import Curve, plot_curves
from fedpt_flwr.report.reading import as_mapping, as_number, as_text
from fedpt_flwr.report.wording import short

if TYPE_CHECKING:
    from fedpt_flwr.report.run import Run

KEPT = "Not told: in a private run the devices keep to themselves how much of what they hold."
_COLUMNS = {
    "epsilon": "epsilon",
    "releases": "noisy means",
    "noise_stddev": "noise on each weight",
    "clipping_norm": "next clipping norm",
}


def spent(run: Run) -> Mapping[str, Any]:
    """What a run says that it has spent in all; empty where it is not private."""
    last = list(run.phase("privacy").values())[-1:]
    return as_mapping(run.results.get("privacy")) or (last[0] if last else {})


def privacy_section(run: Run) -> Section | None:
    """What each device's privacy has cost; None where the run is not private."""
    said = spent(run)
    epsilon, delta = as_number(said.get("epsilon")), as_number(said.get("delta"))
    if epsilon is None or delta is None:
        return None
    budget = as_number(said.get("max_epsilon"))
    text = (
        f"Epsilon {short(epsilon)} at delta {delta:g}, for each device with all that it holds: what left the server is "
        f"nearly as likely without it. {as_text(said.get('releases'))} noisy means of {as_text(said.get('dp'))}, noise "
        f"multiplier {as_text(said.get('noise_multiplier'))}, {as_text(said.get('devices_per_round'))} of "
        f"{as_text(said.get('devices'))} devices a round. "
        + ("There was no budget." if budget is None else f"The budget was {short(budget)}.")
        + f" Neighbours: {as_text(said.get('neighbours'))}. Accountant: {as_text(said.get('accountant'))}. The server "
        "itself sees each device's change before there is noise on it."
    )
    rounds = run.phase("privacy")
    found = {number: value for number, row in rounds.items() if (value := as_number(row.get("epsilon"))) is not None}
    blocks: list[Any] = [Prose(text=text)]
    if found:
        curve = Curve("epsilon", "proxy", tuple(found), tuple(found.values()))
        blocks.append(Plots(plots=[plot_curves("plot-privacy-epsilon", "Privacy spent", [curve], unit="epsilon")]))
        rows = [
            [str(number), *(_cell(row.get(key)) for key in _COLUMNS)]
            for number, row in rounds.items()
            if number in found
        ]
        head = ["round", *_COLUMNS.values()]
        blocks.append(Table(caption="Privacy round by round", head=head, rows=rows, folded=True))
    return Section(id="privacy", title="Privacy", blocks=blocks)


def _cell(value: Any) -> str:
    number = as_number(value)
    return "-" if number is None else f"{number:.4g}"
