"""Points, curves and bars, drawn with matplotlib: as PNG files, and as SVG that takes a page's colours and font."""

from __future__ import annotations

import html
import io
import itertools
import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from fedpt_flwr.report.wording import short

_INK = {
    "ink": ("#1d1c1a", "#ece7de"),
    "muted": ("#6a655e", "#a8a196"),
    "rule": ("#d8d3ca", "#3b3833"),
    "paper": ("#fdfcf9", "#171614"),
}
_MODELS = {
    "large": ("#48443e", "#c9c2b6"),
    "untuned": ("#766e63", "#958e82"),
    "tuned": ("#b4501b", "#f0a06a"),
    "proxy": ("#0b5c94", "#6fb9ee"),
    "device": ("#2f7350", "#79c79f"),
    "small": ("#7c5c1e", "#d6b464"),
}
_SERIES = {
    "series-0": ("#0b5c94", "#6fb9ee"),
    "series-1": ("#b4501b", "#f0a06a"),
    "series-2": ("#2f7350", "#79c79f"),
    "series-3": ("#7a4590", "#caa0dd"),
    "series-4": ("#8a6a00", "#d9b949"),
    "series-5": ("#a63a62", "#ee93b4"),
    "series-6": ("#3d6b75", "#86c0cb"),
    "series-7": ("#5d5850", "#b3aba0"),
}
LIGHT = {name: light for name, (light, _) in (_INK | _MODELS | _SERIES).items()}
"""Colours by name; plots are drawn in these. Each stands out from the paper by 4.5 to 1 at least, all but the rules."""

DARK = {name: dark for name, (_, dark) in (_INK | _MODELS | _SERIES).items()}
"""The same on dark paper."""

_MARKERS = {"large": "^", "untuned": "D", "tuned": "s", "proxy": "o", "device": "v", "small": "o"}
_SERIES_MARKERS = "osD^vPX*"

LOSS_UNIT = "nats per answer token"
MEASURES: tuple[tuple[str, str, str, float, Callable[[float], str]], ...] = (
    ("exact_match", "Exact match", "% of the items", 100.0, "{:.1f}".format),
    ("rouge_l", "ROUGE-L", "%", 100.0, "{:.1f}".format),
    ("loss", "Loss", LOSS_UNIT, 1.0, short),
)
"""What plots show of a model: key, name, unit, factor from the key's value to the unit, and how a value is written."""

MOST_GROUPS = len(_SERIES)
"""Parts of bars that can be told apart."""

_WIDTH = 360.0  # points; as wide as a phone's page, so that letters there have the size they are drawn in
_LOGARITHMIC_FROM = 20.0  # largest value over smallest
_LEGEND_COLUMNS, _LEGEND_ROW = 3, 14.0  # the height is in points
_LONGEST_OF_THREE = 22  # characters of a label that has two others beside it
_LONGEST_LABEL = 26  # characters
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.parse_math": False,  # a group may be called "$x$"
    "axes.formatter.useoffset": False,
    "figure.max_open_warning": 0,
}


@dataclass(frozen=True, slots=True)
class Point:
    """A line of a point plot.

    Attributes:
        label: Its name.
        row: The model that decides colour and mark.
        value: Where the mark is.
        interval: Ends of the whisker, or None.
        dots: Single values.
        group: Heading over neighbouring lines of the same group; empty: none.
    """

    label: str
    row: str
    value: float
    interval: tuple[float, float] | None = None
    dots: tuple[float, ...] = ()
    group: str = ""


@dataclass(frozen=True, slots=True)
class Curve:
    """A line over rounds or alphas.

    Attributes:
        label: Its name.
        row: The model, or the name of a colour.
        x: Places.
        y: Values.
        band: Ends of an interval at each place, or nothing.
    """

    label: str
    row: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    band: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Spot:
    """A place in a plot of quality against cost; ``row`` is the model, or the name of a colour."""

    label: str
    row: str
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar made of parts by name; a part without a name is the whole bar."""

    label: str
    parts: Mapping[str, float]


def scaled(interval: tuple[float, float] | None, scale: float) -> tuple[float, float] | None:
    """An interval in another unit."""
    return None if interval is None else (scale * interval[0], scale * interval[1])


@contextmanager
def _drawing() -> Iterator[None]:
    """What matplotlib is as delivered, whatever the user's settings are, with our style; all is put back afterwards."""
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        # A letter that the font lacks is a box in the PNG; the page has the browser's fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def plot_points(
    name: str, title: str, points: Sequence[Point], *, unit: str, write: Callable[[float], str], caption: str = ""
) -> Plot:
    """See :func:`draw_points`."""
    said = [
        f"{' '.join(filter(None, (point.group, point.label)))} {write(point.value)}"
        + (f" ({write(point.interval[0])} to {write(point.interval[1])})" if point.interval else "")
        for point in points
    ]
    alt = f"{title}, {unit}: {'; '.join(said)}."
    return Plot(name=name, figure=draw_points(title, points, unit=unit, write=write), alt=alt, caption=caption)


@_drawing()
def draw_points(title: str, points: Sequence[Point], *, unit: str, write: Callable[[float], str]) -> Figure:
    """A line for each point: its name, whisker, mark and dots, and its value in figures.

    Args:
        title: What is shown.
        points: At least one, from the top.
        unit: Of the values; ``%`` at its beginning fixes the axis to 0 to 100.
        write: Writes a value.
    """
    lines: list[Point | str] = []
    for group, members in itertools.groupby(points, key=lambda point: point.group):
        lines += [group] if group else []
        lines += members
    figure, axes = _new_figure(title, height=74 + 21 * len(lines))
    values = [value for point in points for value in (point.value, *(point.interval or ()), *point.dots)]
    if unit.startswith("%"):
        axes.set_xlim(-3, 103)
    elif _is_logarithmic(values):
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 1.5, max(values) * 1.5)
        _logarithmic_ticks(axes.xaxis)
        unit += ", logarithmic"
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
        low, high = min(0.0, *values), max(0.0, *values)
        room = 0.05 * (high - low or 1.0)
        axes.set_xlim(low - (room if low else 0.3 * room), high + room)
    for place, point in enumerate(lines):
        if isinstance(point, str):
            continue
        colour, marker, filled = _look(point.row)
        if point.interval:
            axes.plot(
                point.interval, (place, place), color=colour, linewidth=1.6, solid_capstyle="butt", label="interval"
            )
        if point.dots:
            axes.plot(
                point.dots,
                [place] * len(point.dots),
                linestyle="none",
                marker="o",
                markersize=3.6,
                markerfacecolor="none",
                markeredgecolor=colour,
                markeredgewidth=0.9,
                label="dots",
            )
        axes.plot(
            point.value,
            place,
            marker="|" if point.dots else marker,
            markersize=13 if point.dots else 7,
            color=colour,
            markerfacecolor=colour if filled else LIGHT["paper"],
            markeredgewidth=2.2 if point.dots else 1.4,
            label="value",
        )
        axes.text(
            1.03,
            place,
            write(point.value),
            transform=axes.get_yaxis_transform(),
            verticalalignment="center",
            color=LIGHT["ink"],
            fontweight="bold" if point.row == "proxy" else "normal",
        )
    names = axes.set_yticks(
        range(len(lines)), [_label(line if isinstance(line, str) else line.label) for line in lines]
    )
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelcolor=LIGHT["ink"])
    for name, line in zip(names, lines, strict=True):
        if isinstance(line, str):
            name.label1.set(color=LIGHT["muted"], style="italic")
    axes.grid(axis="x", color=LIGHT["rule"], linewidth=0.7)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(unit, color=LIGHT["muted"])
    return figure


def plot_curves(
    name: str,
    title: str,
    curves: Sequence[Curve],
    *,
    unit: str,
    x_label: str = "round",
    write: Callable[[float], str] = "{:.3g}".format,
    chosen: Sequence[tuple[float, float]] = (),
    chosen_label: str = "chosen",
    share: bool = False,
    caption: str = "",
) -> Plot:
    """See :func:`draw_curves`."""
    said = [
        f"{curve.label} from {write(curve.y[0])} at {x_label} {curve.x[0]:g} to {write(curve.y[-1])} at {curve.x[-1]:g}"
        for curve in curves
    ]
    said += [f"{chosen_label}: {x_label} {x:g}, {write(y)}" for x, y in chosen]
    figure = draw_curves(
        title, curves, unit=unit, x_label=x_label, chosen=chosen, chosen_label=chosen_label, share=share
    )
    return Plot(name=name, figure=figure, alt=f"{title}, {unit}: {'; '.join(said)}.", caption=caption)


@_drawing()
def draw_curves(
    title: str,
    curves: Sequence[Curve],
    *,
    unit: str,
    x_label: str = "round",
    chosen: Sequence[tuple[float, float]] = (),
    chosen_label: str = "chosen",
    share: bool = False,
) -> Figure:
    """Lines over rounds or alphas.

    Args:
        title: What is shown.
        curves: At least one, each with at least one place.
        unit: Of the values.
        x_label: What the places are.
        chosen: Places to mark with a ring.
        chosen_label: What these are.
        share: Whether the axis is 0 to 100.
    """
    labels = [_label(curve.label) for curve in curves] + [chosen_label] * bool(chosen)
    rows = _legend_rows(len(labels), _legend_columns(labels)) if len(labels) > 1 else 0
    figure, axes = _new_figure(title, height=214 + _LEGEND_ROW * rows)
    values = [value for curve in curves for value in (*curve.y, *itertools.chain.from_iterable(curve.band))]
    if share:
        axes.set_ylim(-4, 104)
    elif unit == LOSS_UNIT and _is_logarithmic(values):
        axes.set_yscale("log")
        _logarithmic_ticks(axes.yaxis)
        unit += ", logarithmic"
    elif min(values) >= 0:
        axes.set_ylim(0, 1.08 * (max(values) or 1.0))
    lines = []
    for curve in curves:
        colour, marker, filled = _look(curve.row)
        if curve.band:
            lows, highs = zip(*curve.band, strict=True)
            axes.fill_between(curve.x, lows, highs, color=colour, alpha=0.16, linewidth=0)
        lines += axes.plot(
            curve.x,
            curve.y,
            color=colour,
            marker=marker if len(curve.x) <= 40 else None,
            markersize=4.6,
            markerfacecolor=colour if filled else LIGHT["paper"],
            linewidth=1.6,
            label=_label(curve.label),
        )
    for x, y in chosen:
        lines += axes.plot(
            x,
            y,
            marker="o",
            markersize=12,
            markerfacecolor="none",
            color=LIGHT["ink"],
            linestyle="none",
            label=chosen_label,
            clip_on=False,
        )
    # By name: matplotlib passes over labels that begin with an underscore.
    legend_rows = _legend(axes, lines, [str(line.get_label()) for line in lines]) if len(lines) > 1 else 0
    if x_label == "round":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        rounds = [place for curve in curves for place in curve.x]
        if min(rounds) == max(rounds):  # else the axis is a fraction of a round wide
            axes.set_xlim(rounds[0] - 1, rounds[0] + 1)
    axes.grid(axis="y", color=LIGHT["rule"], linewidth=0.7)
    axes.set_xlabel(x_label, color=LIGHT["muted"])
    axes.set_title(unit, loc="left", fontsize=9, color=LIGHT["muted"], pad=6 + _LEGEND_ROW * legend_rows)
    return figure


def plot_spots(name: str, title: str, spots: Sequence[Spot], *, unit: str, x_label: str, caption: str = "") -> Plot:
    """See :func:`draw_spots`."""
    said = "; ".join(f"{spot.label} {short(spot.y)} at {short(spot.x)}" for spot in spots)
    figure = draw_spots(title, spots, unit=unit, x_label=x_label)
    return Plot(name=name, figure=figure, alt=f"{title}, {unit} by {x_label}: {said}.", caption=caption)


@_drawing()
def draw_spots(title: str, spots: Sequence[Spot], *, unit: str, x_label: str) -> Figure:
    """Quality against cost, which is on a logarithmic axis where it varies much.

    Args:
        title: What is shown.
        spots: At least one.
        unit: Of the quality; ``%`` at its beginning fixes the axis to 0 to 100.
        x_label: The cost and its unit.
    """
    columns = _legend_columns([_label(spot.label) for spot in spots])
    figure, axes = _new_figure(title, height=214 + _LEGEND_ROW * _legend_rows(len(spots), columns))
    if unit.startswith("%"):
        axes.set_ylim(-4, 104)
    costs = [spot.x for spot in spots]
    if _is_logarithmic(costs):
        axes.set_xscale("log")
        axes.set_xlim(min(costs) / 1.6, max(costs) * 1.6)
        _logarithmic_ticks(axes.xaxis)
        x_label += ", logarithmic"
    else:
        axes.set_xlim(0, 1.08 * (max(costs) or 1.0))
    marks = []
    for spot in spots:
        colour, marker, filled = _look(spot.row)
        marks += axes.plot(
            spot.x,
            spot.y,
            marker=marker,
            markersize=7.5,
            linestyle="none",
            color=colour,
            markerfacecolor=colour if filled else LIGHT["paper"],
            markeredgewidth=1.6,
            label=_label(spot.label),
        )
    rows = _legend(axes, marks, [str(mark.get_label()) for mark in marks])
    axes.grid(color=LIGHT["rule"], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel(x_label, color=LIGHT["muted"])
    axes.set_title(unit, loc="left", fontsize=9, color=LIGHT["muted"], pad=6 + _LEGEND_ROW * rows)
    return figure


def plot_bars(name: str, title: str, bars: Sequence[Bar], *, unit: str, caption: str = "") -> Plot:
    """See :func:`draw_bars`."""
    said = []
    for bar in bars:
        parts = ", ".join(f"{part} {short(value)}" for part, value in bar.parts.items() if part)
        said.append(f"{bar.label} {short(sum(bar.parts.values()))}" + (f" ({parts})" if parts else ""))
    alt = f"{title}, {unit}: {'; '.join(said)}."
    return Plot(name=name, figure=draw_bars(title, bars, unit=unit), alt=alt, caption=caption)


@_drawing()
def draw_bars(title: str, bars: Sequence[Bar], *, unit: str) -> Figure:
    """Horizontal bars, stacked where they have several parts, with their sum in figures.

    Args:
        title: What is shown.
        bars: At least one, from the top.
        unit: Of the values.
    """
    names = list(dict.fromkeys(part for bar in bars for part in bar.parts))
    legend_rows = _legend_rows(len(names)) if len(names) > 1 else 0
    figure, axes = _new_figure(title, height=66 + 21 * len(bars) + _LEGEND_ROW * legend_rows)
    colours = {name: LIGHT[f"series-{place % MOST_GROUPS}"] for place, name in enumerate(names)}
    longest = max(sum(bar.parts.values()) for bar in bars) or 1.0
    drawn: dict[str, Any] = {}
    for place, bar in enumerate(bars):
        left = 0.0
        for name, value in bar.parts.items():
            colour = colours[name] if name else LIGHT["proxy"]
            part = axes.barh(
                place, value, left=left, height=0.62, color=colour, edgecolor=LIGHT["paper"], linewidth=0.8
            )
            drawn.setdefault(name, part)
            text = _label(name)
            if name and 170 * value / longest > 7 * len(text):  # as much as there is room for, in points
                middle = left + value / 2
                axes.text(middle, place, text, ha="center", va="center", color=LIGHT["paper"], fontsize=8.5)
            left += value
        axes.text(
            1.03,
            place,
            short(left),
            transform=axes.get_yaxis_transform(),
            va="center",
            color=LIGHT["ink"],
            label="sum",
        )
    if len(names) > 1:
        _legend(axes, list(drawn.values()), [_label(name) for name in drawn])
    axes.set_xlim(0, 1.02 * longest)
    axes.set_yticks(range(len(bars)), [_label(bar.label) for bar in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelcolor=LIGHT["ink"])
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="x", color=LIGHT["rule"], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(unit, color=LIGHT["muted"])
    return figure


def _new_figure(title: str, *, height: float) -> tuple[Figure, Axes]:
    """A figure with one pair of axes; ``height`` is in points."""
    figure = Figure(figsize=(_WIDTH / 72, height / 72), layout="constrained")
    figure.suptitle(title, x=0.012, ha="left", fontsize=10.5, fontweight="bold", color=LIGHT["ink"])
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(LIGHT["rule"])
    axes.tick_params(color=LIGHT["rule"], labelcolor=LIGHT["muted"], labelsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    return figure, axes


def _legend_rows(labels: int, columns: int = _LEGEND_COLUMNS) -> int:
    return math.ceil(labels / columns)


def _legend_columns(labels: Sequence[str]) -> int:
    """As many as there is room for beside each other."""
    return _LEGEND_COLUMNS if all(len(label) <= _LONGEST_OF_THREE for label in labels) else _LEGEND_COLUMNS - 1


def _legend(axes: Axes, handles: Sequence[Any], labels: Sequence[str]) -> int:
    """Put a legend on top of the axes; the number of its rows."""
    columns = _legend_columns(labels)
    axes.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.3,
        borderpad=0.1,
        labelspacing=0.3,
        columnspacing=1.4,
        ncols=min(len(labels), columns),
        frameon=False,
        fontsize=9,
        labelcolor=LIGHT["ink"],
        handlelength=1.6,
    )
    return _legend_rows(len(labels), columns)


def _tick(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.6g}"


def _is_logarithmic(values: Sequence[float]) -> bool:
    """Whether equal steps would leave small values on top of each other."""
    return min(values) > 0 and max(values) / min(values) > _LOGARITHMIC_FROM


def _logarithmic_ticks(axis: Any) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 3), numticks=6))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def _look(row: str) -> tuple[str, str, bool]:
    """Colour, mark and whether it is filled. Rows that are made of a model, such as ``large_few_shot``, are hollow."""
    family = row.partition("_")[0]
    if row.startswith("series-"):
        turn, number = divmod(int(row.removeprefix("series-")), MOST_GROUPS)
        return LIGHT[f"series-{number}"], _SERIES_MARKERS[number], not turn  # the same again, but hollow
    if family in _MARKERS:
        return LIGHT[family], _MARKERS[family], row == family
    return LIGHT["muted"], "o", True


def _label(text: str) -> str:
    """A name as it can stand in a plot: one line, no control characters, not too long."""
    clean = "".join(" " if unicodedata.category(letter).startswith(("C", "Z")) else letter for letter in text)
    words = " ".join(clean.split()) or "-"
    return words if len(words) <= _LONGEST_LABEL else words[: _LONGEST_LABEL - 1] + "…"


_COLOUR_NAMES = {light: name for name, light in reversed(LIGHT.items())}


def _embedded_svg(svg: str, name: str, alt: str) -> str:
    """A file of matplotlib's as a part of a page.

    Every text in it is escaped, by matplotlib or here. Colours become the page's own, so that they follow its dark
    mode; fonts too. Names inside get ``name`` in front, because they must be unique on a page.
    """

    def colour(found: re.Match[str]) -> str:
        known = _COLOUR_NAMES.get(found[2])
        return f"{found[1]}var(--{known})" if known else found[0]

    def tag(found: re.Match[str]) -> str:
        text = re.sub(r"((?:fill|stroke): )(#[0-9a-f]{6})\b", colour, found[0])
        text = re.sub(r"(\bid=\"|url\(#|href=\"#)", rf"\g<1>{name}-", text)
        return re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", text)

    body = svg[svg.index("<svg") :]
    head, body = body[: body.index(">") + 1], body[body.index(">") + 1 :]
    box = re.search(r'viewBox="[^"]*"', head)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # would hold for the whole page
    shapes = re.sub(r"<[^>]*>", tag, body)  # matplotlib escapes ">" in attributes and text
    return f'<svg {box[0] if box else ""} role="img" aria-label="{html.escape(alt)}">{shapes}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A plot.

    Attributes:
        name: Of its PNG file, without the ending.
        figure: The drawing.
        alt: What one would see, for those who do not.
        caption: A sentence below it, or empty.
    """

    name: str
    figure: Figure
    alt: str
    caption: str = ""

    def png(self) -> bytes:
        """The plot as a file, in light colours."""
        buffer = io.BytesIO()
        with _drawing():
            # Without the version of matplotlib, the same run gives the same bytes.
            self.figure.savefig(buffer, format="png", dpi=200, facecolor=LIGHT["paper"], metadata={"Software": None})
        return buffer.getvalue()

    def svg(self) -> str:
        """The plot as HTML, in the page's font and colours, light or dark; its texts are escaped."""
        buffer = io.StringIO()
        with _drawing(), mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            self.figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
        return _embedded_svg(buffer.getvalue(), self.name, self.alt)
