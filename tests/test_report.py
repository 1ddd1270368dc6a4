"""The page of a run and of a comparison: what is on it, what is left out, and that nothing gets out of it."""

import copy
import csv
import itertools
import json
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import pytest
from typer.testing import CliRunner

from fedpt_flwr import cli, report
from fedpt_flwr.compare.summary import COLUMNS
from fedpt_flwr.errors import RunError
from fedpt_flwr.report import PAGE, find_folder, make_report
from fedpt_flwr.report.attack import attack_sections
from fedpt_flwr.report.comparison import COSTS, comparison_page
from fedpt_flwr.report.page import Cell, Examples, Page, Plots, Prose, Section, Table, Verdicts, render
from fedpt_flwr.report.plots import (
    DARK,
    LIGHT,
    Bar,
    Curve,
    Point,
    draw_bars,
    draw_curves,
    draw_points,
    plot_bars,
    plot_points,
)
from fedpt_flwr.report.run import run_page
from fedpt_flwr.report.tables import as_csv, as_latex
from fedpt_flwr.report.wording import duration, short
from fedpt_flwr.verdict import results_table, verdict

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)> --> </style>'


def row(exact_match, loss, n=50):
    """A row of results; its intervals are 0.05 wide to either side."""
    ci95 = {"exact_match": [max(0, exact_match - 0.05), min(1, exact_match + 0.05)], "loss": [loss - 0.05, loss + 0.05]}
    return {"exact_match": exact_match, "loss": loss, "n": n, "ci95": ci95}


def device_costs(server_round, device):
    return {
        "round": server_round,
        "device": device,
        "bytes_down": 1_000_000,
        "bytes_up": 2_000_000,
        "seconds": 1.0 + device + server_round / 10,
        "flops": 5e9,
        "num_tokens": 1000,
        "state_bytes": 3_000_000 + server_round,
        "peak_memory_bytes": 500_000_000,
        "memory_growth_bytes": 7_000_000,
    }


def whole_run():
    """The files of a run that has everything, by name."""
    rounds = (1, 2, 3)
    metrics = []
    for server_round in rounds:
        tuned, proxy = row(0.1 * server_round, 1 / server_round), row(0.3 * server_round, 0.1 / server_round)
        metrics += [
            {"round": server_round, "phase": "train", "train_loss": 2.0 / server_round, "devices": 3, "replies": 2}
            | {"seconds": 4.0},
            {"round": server_round, "phase": "validation", "rows": {"tuned": tuned, "proxy": proxy}, "alpha": 1.0}
            | {"plausibility": 0.01, "seconds": 1.0},
            {"round": server_round, "phase": "distillation", "mode": "carry", "num_steps": 20, "kl_first": 1.0}
            | {"kl_last": 0.5, "drift": -0.01, "drift_total": -0.01 * server_round, "seconds": 2.0},
        ]
    curve = [
        {"alpha": alpha, "plausibility": mask, "exact_match": 0.9 - (alpha - 1) ** 2 + mask, "loss": 0.1 + alpha / 10}
        for alpha in (0.5, 1.0, 1.5)
        for mask in (0.0, 0.01)
    ]
    shift = {"chosen_by": "exact_match", "items": 48, "alpha": 1.0, "plausibility": 0.01, "curve": curve}
    points = [{"share": share, "exact_match": share / 2, "loss": 1.0 - share / 2} for share in (0.0, 0.5, 1.0)]
    metrics.append(
        {
            "round": 3,
            "phase": "device",
            "num_steps": 600,
            "kl_first": 0.9,
            "kl_last": 0.2,
            "share": 0.5,
            "curve": points,
        }
    )
    costs = [device_costs(server_round, device) for server_round in rounds for device in (0, 1)]
    costs += [
        {"round": server_round, "device": 2, "bytes_down": 1_000_000, "bytes_up": 9, "refused": "NaN"}
        for server_round in rounds
    ]
    costs += [
        {"round": 3, "device": "server", "phase": phase, "large_tokens": tokens, "seconds": 1.5}
        for phase, tokens in (("validation", 1000), ("validation", 500), ("test", 4000), ("device", 0))
    ]
    answers = {"large": "filter = coal", "tuned": "maker = Foo - good", "proxy": "maker = Bar - good"}
    record = {"prompt": "> who made it?\n[Xyz]\n", "reference": "maker = Bar - good"}
    tokens = [
        {"text": "maker", "changed": True, "large": "filter"},
        {"text": " =", "changed": False},
        {"text": " Bar", "changed": True, "large": " coal"},
        {"text": " -", "changed": True, "large": "\n"},
        {"text": " good", "changed": True, "large": ""},
    ]
    judged = {name: {"answer": text, "exact_match": int(name == "proxy")} for name, text in answers.items()}
    return {
        "config.json": {
            "run_config": {"num-server-rounds": 3, "seed": 7, "strategy.name": "FedAdam", "tuning.mode": "lora"},
            "fingerprints": {"large": "aaaa", "small": "bbbb"},
            "data_hashes": {"test": "cccc"},
            "versions": {"torch": "2.13.0"},
            "flower_run_ids": [77],
            "code_hash": "dddd",
        },
        "shards.json": [
            {"device": 0, "num_examples": 240, "groups": {"boiler": 200, "camera": 40}},
            {"device": 1, "num_examples": 100, "groups": {"camera": 100}},
            {"device": 2, "num_examples": 0, "groups": {}},
        ],
        "metrics.jsonl": metrics,
        "costs.jsonl": costs,
        "results.json": {
            "rows": {"large": row(0.0, 6.9), "tuned": row(0.2, 0.3), "proxy": row(0.9, 0.05), "device": row(0.4, 0.5)},
            "proxy_minus_tuned": {"value": 0.7, "ci95": [0.6, 0.8]},
            "proxy_minus_tuned_loss": {"value": -0.25, "ci95": [-0.3, -0.2]},
            "proxy_minus_large": {"value": 0.9, "ci95": [0.8, 1.0]},
            "shift": shift,
            "distillation": "carry",
            "devices": 3,
            "costs": {"seconds": 83.2},
        },
        "examples.jsonl": [record | {"models": answers, "tokens": tokens}],
        "answers.jsonl": [record | {"group": "boiler", "models": judged}],
    }


def estimated(*values):
    mean = sum(values) / len(values)
    return {"mean": mean, "ci95": [mean - 0.1, mean + 0.1] if len(values) > 1 else None, "values": list(values)}


def whole_comparison():
    """The files of a comparison that has everything, by name."""
    rows = [
        {"world": world, "mode": mode, "row": name, "n_seeds": 2, "kind": "fedpt" if mode else "large_federated_lora"}
        | {"exact_match": estimated(value, value + 0.02), "loss": estimated(1 - value, 1.02 - value)}
        for world in ("demo", "World <b>2</b>")
        for mode in ("carry", None)
        for name, value in (("tuned", 0.2), ("proxy", 0.9), ("large_federated_lora", 0.5))
    ]
    return {
        "summary.json": {
            "title": "Two worlds",
            "command": "fedpt compare --seeds 0 1",
            "rows": rows,
            "gap_closed": [
                {"world": "demo", "mode": "carry", "row": "proxy", "reference": "large_federated"}
                | {"ci95_items": [0.85, 0.95]}
                | estimated(0.9, 0.92)
            ],
            "meanings": {"tuned": "what devices tuned"},
            "differences": [
                {"world": "demo", "mode": "carry", "against": "tuned", "measure": "exact_match", "value": 0.7}
                | {"ci95": [0.6, 0.8], "by_seed": estimated(0.7, 0.72), "p_holm": 0.0004}
            ],
            "cost_ratios": [
                {"world": "demo", "mode": "carry", "against": "large_federated"} | {"device_flops_per_round": 0.05}
            ],
            "curves": [
                {"world": "demo", "mode": "carry", "row": name}
                | {"points": [{"round": at, "exact_match": value * at / 2, "bytes": 5e6 * at} for at in (1, 2)]}
                for name, value in (("tuned", 0.2), ("proxy", 0.9))
            ],
            "quality_under_budget": [
                {"world": "demo", "mode": "carry", "row": "proxy", "cost": cost}
                | {"budgets": [5e6, 2e7], "exact_match": [None, 0.9]}
                for cost in ("bytes", "flops")
            ],
            "cost_to_target": [
                {"world": "demo", "mode": "carry", "row": "proxy", "share": 0.9, "seeds": 2, "seeds_reached": 2}
                | {"round": 1.5, "bytes": 7e6, "flops": 3e9, "seconds": 4.0},
                *(
                    {"world": "World <b>2</b>", "mode": "carry", "row": "proxy", "share": share, "seeds": 2}
                    | {"seeds_reached": 1, "why": "no costs: with seed 1 large_federated gains nothing"}
                    for share in (0.5, 0.9)
                ),
            ],
            "robustness": [
                {"world": "demo", "mode": None, "row": "tuned_local", "worst_seed": 0.1, "worst_device": 0.0}
            ],
            "calibration": [
                {"world": "demo", "mode": "carry", "row": "proxy", "ece": estimated(0.1, 0.12)}
                | {"bins": [[0, 0.0, 0], [4, 0.6, 1], [5, 4.75, 5]]}
            ],
            "ablations": [
                {
                    "world": "demo",
                    "key": "proxy.alpha",
                    "value": 0.5,
                    "with": {"proxy.plausibility": 0},
                    "is_base": False,
                }
                | {
                    "rows": [
                        {"row": "proxy", "n_seeds": 2, "exact_match": estimated(0.8, 0.9), "loss": estimated(0.1, 0.1)}
                    ]
                }
            ],
            "learning_rates": [
                {"world": "demo", "row": "large_federated", "learning_rate": rate, "exact_match": value}
                | {"chosen": value == 0.2}
                for rate, value in ((0.001, 0.1), (0.003, 0.2))
            ],
            "costs": [
                {"world": "demo", "mode": "carry", "row": "proxy", "kind": "fedpt", "cell_seconds": 12.5}
                | {"bytes_up_per_device_and_round": 5e6, "device_flops_per_round": 2e9}
                | {"tokens_per_second_tuned": 70.0, "tokens_per_second_proxy": 7.0}
            ],
        },
        "cells/demo-0.json": {"name": "demo-0", "kind": "fedpt", "world": "demo", "seed": 0, "mode": "carry"}
        | {"rows": {"tuned": {"exact_match": 0.2}}, "seconds": 31.0}
        | {"shards": [{"device": 0, "num_examples": 3, "groups": {"boiler": 3}}]}
        | {
            "examples": [
                {"prompt": "who?", "reference": "maker", "answers": {"proxy": {"answer": "me", "exact_match": 0}}}
            ]
        },
        "grid.json": {"worlds": {"demo": {"seed": 0, "proxy.alpha": "auto"}}},
    }


def write(folder, files):
    """Write the files of a run or of a comparison; lists are JSON Lines where the name says so."""
    for name, value in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(line) + "\n" for line in value) if name.endswith(".jsonl") else json.dumps(value)
        path.write_text(lines)
    return folder


def write_run(root, *, without=(), **changed):
    """A folder of a run like :func:`whole_run`; ``changed`` are other contents by the beginning of a file's name."""
    files = {name: value for name, value in whole_run().items() if name not in without}
    files |= {name: changed[name.partition(".")[0]] for name in files if name.partition(".")[0] in changed}
    return write(root / "20261121T033727Z-77", files)


class Tags(HTMLParser):
    """What a page's tags say; fails where they do not close as they opened.

    Attributes:
        found: Every tag with its attributes.
        texts: What stands between them.
    """

    VOID = ("meta", "wbr")

    def __init__(self, html):
        super().__init__()
        self.found, self.texts, self._open = [], [], []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join("".join(self.texts).split())

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def blocks(page, kind):
    return [block for section in page.sections for block in section.blocks if isinstance(block, kind)]


def plots(page):
    return {plot.name: plot for plot in page.plots()}


def section(page, name):
    return next(section for section in page.sections if section.id == name)


def texts(rows):
    """The cells of a table as they are read, without what stands behind them."""
    return [[cell if isinstance(cell, str) else cell.text for cell in row] for row in rows]


def sentences(page):
    """What the page says is absent, by section."""
    return {
        section.id: [block.text for block in section.blocks if isinstance(block, Prose) and block.absent]
        for section in page.sections
    }


def drawn(figure, label):
    """The data of a figure's lines of this label."""
    lines = [line for line in figure.axes[0].lines if line.get_label() == label]
    return [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in lines]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a run with its report made."""
    folder = write_run(tmp_path_factory.mktemp("runs"))
    assert make_report(folder) == folder / PAGE
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of a comparison with its report made."""
    folder = write(tmp_path_factory.mktemp("compared"), whole_comparison())
    make_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(made):
    """The page of that run."""
    return run_page(made)


@pytest.fixture(scope="module")
def comparison(compared):
    """The page of that comparison."""
    return comparison_page(compared)


@pytest.fixture(params=["made", "compared"])
def html(request):
    return (request.getfixturevalue(request.param) / PAGE).read_text()


# --- the page itself ---


def test_the_page_needs_nothing_but_itself(html):
    tags = Tags(html)
    names = {tag for tag, _ in tags.found}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for _, attributes in tags.found:
        assert "src" not in attributes
        for name in ("href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")
    assert "http:" not in html
    assert "https:" not in html
    assert not re.search(r"@import|url\((?!#)", html)
    policy = next(meta for meta in tags.all("meta") if "http-equiv" in meta)
    assert policy["content"].startswith("default-src 'none';")


def test_names_on_the_page_are_unique_and_lead_somewhere(html):
    tags = Tags(html)
    ids = [attributes["id"] for _, attributes in tags.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [link["href"][1:] for link in tags.all("a")] + [use["xlink:href"][1:] for use in tags.all("use")]
    targets += re.findall(r"url\(#([^)]*)\)", html)
    assert len(targets) > 10
    assert set(targets) <= set(ids)


def test_the_page_can_be_heard(html):
    """Plots say what is on them, tables have captions and heads, headings are in order, and the language is known."""
    tags = Tags(html)
    assert tags.all("html") == [{"lang": "en"}]
    for svg in tags.all("svg"):
        assert svg["role"] == "img"
        assert len(svg["aria-label"]) > 40
    assert len(tags.all("svg")) >= 4
    assert len(tags.all("table")) == len(tags.all("caption")) == len(tags.all("thead"))
    assert {cell["scope"] for cell in tags.all("th")} == {"col", "row"}
    headings = [int(tag[1]) for tag, _ in tags.found if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(headings))


def test_the_page_follows_the_readers_light_or_dark_and_so_do_its_plots(html):
    styles, _, body = html.partition("</style>")
    assert "prefers-color-scheme: dark" in styles
    for name, colour in DARK.items():
        assert f"--{name}: {colour};" in styles
    drawn_in = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", body))
    assert {"var(--ink)", "var(--rule)", "var(--proxy)", "var(--tuned)"} <= drawn_in
    assert not [colour for colour in drawn_in if colour in LIGHT.values()]
    assert "DejaVu" not in body


def test_colours_stand_out_from_the_paper():
    """Contrast as in WCAG 2: 4.5 to 1 for everything that is read."""

    def luminance(colour):
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colours in (LIGHT, DARK):
        paper = luminance(colours["paper"])
        for name, colour in colours.items():
            dark, light = sorted((paper, luminance(colour)))
            assert name in ("paper", "rule") or (light + 0.05) / (dark + 0.05) >= 4.5, name
    for light in set(LIGHT.values()):  # a plot's colour is turned into a name
        assert len({DARK[name] for name in LIGHT if LIGHT[name] == light}) == 1


@pytest.mark.slow
def test_a_report_of_the_same_run_is_the_same_bytes(made, tmp_path):
    make_report(made, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in made.iterdir() if path.name.startswith(("plot-", PAGE)))
    for name in names:
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes(), name


def test_every_plot_is_a_whole_png_file(made, page):
    files = sorted(made.glob("*.png"))
    assert [file.stem for file in files] == sorted(plots(page))
    for file in files:
        data = file.read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        assert data.endswith(b"IEND\xaeB`\x82")
    assert not [path for path in made.iterdir() if path.name.startswith(".")]


def test_a_folder_that_cannot_be_written_is_one_sentence(compared, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="^--out: must be a folder, and is a file, got .*/file'; name a folder"):
        make_report(compared, tmp_path / "file")
    with pytest.raises(RunError, match="cannot be written .*; free some space, or give .* with --out"):
        make_report(compared, tmp_path / "file" / "within")


# --- texts that want out ---


def test_texts_of_a_run_are_escaped_wherever_they_stand(tmp_path):
    files = copy.deepcopy(whole_run())
    files["config.json"]["run_config"] |= {"seed": EVIL, "strategy.name": EVIL, EVIL: EVIL}
    files["config.json"] |= {"versions": {EVIL: EVIL}, "fingerprints": {EVIL: EVIL}, "flower_run_ids": [EVIL]}
    files["shards.json"] = [{"device": EVIL, "num_examples": 2, "groups": {EVIL: 2}}]
    files["results.json"]["rows"][EVIL] = row(0.1, 1.0)
    files["costs.jsonl"].append({"round": 1, "device": "server", "phase": EVIL, "large_tokens": 1, "seconds": 1})
    example = files["examples.jsonl"][0]
    example |= {"prompt": EVIL, "reference": EVIL, "models": {EVIL: EVIL, "proxy": EVIL}}
    example["tokens"] = [{"text": EVIL, "changed": True, "large": EVIL}, {"text": EVIL, "changed": False}]
    files["metrics.jsonl"][0]["round"] = EVIL
    tags = Tags(render(run_page(write(tmp_path / "run", files))))
    assert not tags.all("script") + tags.all("img")
    assert len(tags.all("style")) == 1
    assert not [name for _, attributes in tags.found for name in attributes if name.startswith("on")]
    assert tags.text.count("<script>alert(1)</script>") >= 15


def test_texts_of_a_comparison_are_escaped_wherever_they_stand(tmp_path):
    def poisoned(value):
        if isinstance(value, dict):
            return {key: poisoned(entry) for key, entry in value.items()}
        return (
            [poisoned(entry) for entry in value]
            if isinstance(value, list)
            else EVIL
            if isinstance(value, str)
            else value
        )

    files = poisoned(whole_comparison())
    files["cells/x.json"] = files["cells/demo-0.json"] | {"rows": {EVIL: {"exact_match": 0.1}}}
    tags = Tags(render(comparison_page(write(tmp_path, files))))
    assert not tags.all("script") + tags.all("img")
    assert tags.text.count("<script>alert(1)</script>") >= 15


@pytest.mark.parametrize(
    "name",
    ["$x^", "_hidden", "\\frac{", "a\x00b\x1f\u2028c", "\ud800", "日本語 🙂", "x" * 500, "", " ", "a&b<c>", "var(--x)"],
)
def test_any_name_can_stand_in_a_plot(name):
    points = [Point(name, name, 1.0, (0.5, 2.0), group=name), Point("proxy", "proxy", 3.0)]
    curves = [Curve(name, name, (1.0,), (1.0,)), Curve("b", "tuned", (1.0, 2.0), (1.0, 3.0))]
    bars = [Bar(name, {name: 3.0, "other": 4.0})]
    shown = [plot_points("a", "title", points, unit="s", write=short), plot_bars("b", "title", bars, unit="s")]
    for plot in shown:
        Tags(plot.svg())
        assert plot.png()
    assert len(draw_curves("title", curves, unit="s", chosen=[(1.0, 1.0)]).axes[0].get_legend().texts) == 3


def test_a_page_may_hold_half_a_surrogate_pair(tmp_path):
    folder = write_run(tmp_path, without=[name for name in whole_run() if name != "config.json"])
    write(folder, {"metrics.jsonl": [{"round": 1, "phase": "train"}], "answers.jsonl": [{"prompt": "\ud800"}]})
    assert "?" in make_report(folder).read_text(encoding="utf-8")


# --- what is on the page of a run ---


def test_the_page_of_a_whole_run_leaves_nothing_out(page):
    assert page.title == "20261121T033727Z-77"
    assert page.notes == []
    assert sentences(page) == {section.id: [] for section in page.sections}
    assert page.facts == [
        "21 November 2026, 03:37 UTC",
        "3 devices",
        "3 rounds",
        "FedAdam",
        "tuning lora",
        "seed 7",
        "took 83 s",
    ]


def test_the_verdict_is_the_one_of_the_log(page):
    (said,) = blocks(page, Verdicts)
    results = whole_run()["results.json"]
    assert " ".join(": ".join(part for part in sentence if part) for sentence in said.sentences) == verdict(results)
    assert said.sentences[0][0] == "The proxy BEATS the tuned small model"
    assert len(said.sentences) == 3


def test_the_verdict_by_rouge_l_is_the_one_of_the_log_too(tmp_path):
    results = whole_run()["results.json"]
    for name, value in (("tuned", 0.3), ("proxy", 0.5)):
        results["rows"][name] |= {"rouge_l": value}
    results["proxy_minus_tuned_rouge_l"] = {"value": 0.2, "ci95": [0.1, 0.3]}
    (said,) = blocks(run_page(write_run(tmp_path, results=results)), Verdicts)
    text = " ".join(": ".join(part for part in sentence if part) for sentence in said.sentences)
    assert text == verdict(results)
    assert "ROUGE-L" in text


def test_the_table_is_the_one_of_the_log(page):
    table = next(block for block in section(page, "results").blocks if isinstance(block, Table))
    cells = [[cell if isinstance(cell, str) else f"{cell.text} {cell.extra}" for cell in line] for line in table.rows]
    assert [list(table.head), *cells] == results_table(whole_run()["results.json"])


def test_plots_of_the_results_show_every_row_with_its_interval(page):
    figures = plots(page)
    exact = figures["plot-results-exact-match"].figure
    assert drawn(exact, "value") == [([0.0], [0]), ([20.0], [1]), ([90.0], [2]), ([40.0], [3])]
    assert drawn(exact, "interval")[1] == ([pytest.approx(15.0), 25.0], [1, 1])
    loss = figures["plot-results-loss"]
    assert [x for (x,), _ in drawn(loss.figure, "value")] == [6.9, 0.3, 0.05, 0.5]
    assert loss.figure.axes[0].get_xscale() == "linear"  # one interval begins at 0
    assert "proxy 0.0500 (0 to 0.100)" in loss.alt


def test_plots_of_the_rounds_show_every_round(page):
    figures = plots(page)
    assert drawn(figures["plot-rounds-train-loss"].figure, "training") == [([1, 2, 3], [2.0, 1.0, 2.0 / 3])]
    exact = figures["plot-rounds-exact-match"].figure
    assert drawn(exact, "tuned")[0] == ([1, 2, 3], pytest.approx([10.0, 20.0, 30.0]))
    assert drawn(exact, "proxy")[0][1] == pytest.approx([30.0, 60.0, 90.0])
    assert len(exact.axes[0].collections) == 2  # the intervals
    assert drawn(figures["plot-rounds-drift"].figure, "in all")[0][1] == pytest.approx([-0.01, -0.02, -0.03])


def test_the_curve_of_alpha_has_a_line_for_each_mask_and_marks_the_choice(page):
    assert (
        section(page, "shift").blocks[0].text == "Chosen by exact match on 48 validation items: alpha 1 and mask 0.01."
    )
    figures = plots(page)
    exact = figures["plot-shift-exact-match"].figure
    assert drawn(exact, "no mask")[0] == ([0.5, 1.0, 1.5], pytest.approx([65.0, 90.0, 65.0]))
    assert drawn(exact, "mask 0.01")[0][1] == pytest.approx([66.0, 91.0, 66.0])
    assert drawn(exact, "chosen") == [([1.0], [pytest.approx(91.0)])]
    # The loss does not depend on the mask, so there is one line.
    assert drawn(figures["plot-shift-loss"].figure, "any mask")[0][1] == pytest.approx([0.15, 0.2, 0.25])


def test_the_devices_model_is_shown_with_the_way_that_was_chosen(page):
    assert "to those at the end of that (1), 0.5 was best" in section(page, "device").blocks[0].text
    figure = plots(page)["plot-device-loss"].figure
    assert drawn(figure, "device") == [([0.0, 0.5, 1.0], [1.0, 0.75, 0.5])]
    assert drawn(figure, "chosen") == [([0.5], [0.75])]


def test_costs_of_devices_are_put_together_over_the_rounds(page):
    device, server = (block for block in section(page, "costs").blocks if isinstance(block, Table))
    costs = dict(zip(device.head, device.rows[1], strict=True))
    # Three rounds of 1 and 2 MB, of 2.1, 2.2 and 2.3 s; sizes are the largest of the rounds.
    assert costs == {
        "device": "1",
        "replies used": "3",
        "refused": "0",
        "MB down": "3.00",
        "MB up": "6.00",
        "training s": "6.60",
        "GFLOP": "15.0",
        "tokens": "3,000",
        "state MB": "3.00",
        "process MB": "500",
        "growth MB": "7.00",
    }
    assert device.rows[2][:3] == ["2", "0", "3"]
    assert device.foot[:3] == ["all", "6", "3"]
    assert server.rows == [
        ["train", "3", "0", "12.0"],
        ["validation", "2", "1,500", "3.00"],
        ["test", "1", "4,000", "1.50"],
        ["device", "1", "0", "1.50"],
    ]
    assert server.foot == ["all", "", "5,500", "18.0"]


def test_plots_of_the_costs_show_the_same(page):
    figures = plots(page)
    widths = [bar.get_width() for bar in figures["plot-costs-tokens"].figure.axes[0].patches]
    assert widths == [1500, 4000]  # a phase without tokens has no bar
    seconds = figures["plot-costs-devices"].figure
    assert drawn(seconds, "dots")[1] == ([2.1, 2.2, 2.3], [1, 1, 1])
    assert drawn(seconds, "value")[1][0] == [pytest.approx(2.2)]


def test_shards_are_stacked_bars_and_a_table(page):
    bars = plots(page)["plot-shards"].figure.axes[0].patches
    assert [(bar.get_x(), bar.get_width()) for bar in bars] == [(0, 200), (200, 40), (0, 100), (0, 0)]
    table = next(block for block in section(page, "shards").blocks if isinstance(block, Table))
    # Boilers are 200/340 of all, 200/240 of device 0 (0.245 more) and none of device 1 (0.588 less).
    assert texts(table.rows) == [
        ["0", "boiler 200, camera 40", "0.25", "240"],
        ["1", "camera 100", "0.59", "100"],
        ["2", "-", "-", "0"],
    ]
    assert table.foot == ["all", "", "", "340"]


def test_many_groups_become_the_largest_and_the_others(tmp_path):
    groups = {f"kind {number}": 100 - number for number in range(20)}
    folder = write_run(tmp_path, shards=[{"device": 0, "num_examples": sum(groups.values()), "groups": groups}])
    bars = plots(run_page(folder))["plot-shards"].figure.axes[0].patches
    assert [bar.get_width() for bar in bars] == [100, 99, 98, 97, 96, 95, 94, sum(range(81, 94))]


def test_hundreds_of_devices_still_make_a_page(tmp_path):
    costs = [device_costs(server_round, device) for server_round in (1, 2) for device in range(300)]
    shards = [{"device": device, "num_examples": 1, "groups": {"a": 1}} for device in range(300)]
    page = run_page(write_run(tmp_path, costs=costs, shards=shards))
    assert "The first 40 of 300 devices." in plots(page)["plot-costs-devices"].caption
    tables = [block for name in ("costs", "shards") for block in section(page, name).blocks if isinstance(block, Table)]
    assert [table.folded for table in tables if len(table.rows) == 300] == [True, True]


def test_tokens_that_the_proxy_changed_show_what_the_large_model_wanted(page):
    (examples,) = blocks(page, Examples)
    proxy = next(answer for answer in examples.examples[0].answers if answer.model == "proxy")
    assert [(token.before, token.text, token.instead) for token in proxy.tokens] == [
        ("", "maker", "filter"),
        ("", " =", None),
        (" ", "Bar", "coal"),
        (" ", "-", "↵"),
        (" ", "good", "∅"),
    ]
    assert [answer.right for answer in examples.examples[0].answers] == [False, False, True]


def test_changed_tokens_are_marked_for_eyes_and_ears_not_by_colour_alone(made):
    html = (made / PAGE).read_text()
    tags = Tags(html)
    marked = [ruby for ruby in tags.all("ruby") if ruby["class"] == "changed"]
    assert [ruby["title"] for ruby in marked][:2] == ["the large model alone: filter", "the large model alone: coal"]
    assert "maker (, large alone: filter, ) = Bar (, large alone: coal, )" in tags.text
    assert "text-decoration: underline" in html
    assert "✓ right" in tags.text
    assert "✗ wrong" in tags.text


def test_the_config_shows_first_what_is_not_the_default(page):
    other, every, *_ = (block for block in section(page, "config").blocks if isinstance(block, Table))
    assert ["tuning.mode", "lora", "full"] in other.rows
    assert len(every.rows) == 4
    assert every.folded


# --- what is not there ---


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("results.json", {"verdict", "results", "shift"}),
        ("shards.json", {"shards"}),
        ("metrics.jsonl", {"rounds", "device"}),
        ("costs.jsonl", {"costs"}),
        ("examples.jsonl", {"examples"}),
        ("answers.jsonl", set()),
    ],
)
def test_a_file_that_is_not_there_leaves_a_sentence_where_it_is_missed(name, absent, tmp_path):
    page = run_page(write_run(tmp_path, without=[name]))
    said = sentences(page)
    assert {section for section, found in said.items() if found} == absent
    assert all(sentence.endswith(".") for found in said.values() for sentence in found)


def test_a_run_that_only_trained_makes_a_page(tmp_path):
    """An old run, or one without scoring; everything else is a sentence."""
    folder = write(tmp_path / "run", {"config.json": {}, "metrics.jsonl": [{"round": 1, "phase": "train"}]})
    make_report(folder)
    tags = Tags((folder / PAGE).read_text())
    assert tags.all("svg") == []
    assert "This run has no results: it failed, was stopped, or is still running." in tags.text
    assert "Not known: the run did not write how its examples are spread" in tags.text


def test_a_run_that_goes_on_says_how_far_it_is(tmp_path):
    page = run_page(write_run(tmp_path, without=["results.json", "answers.jsonl", "examples.jsonl"]))
    assert page.notes[0].endswith("What follows is what it left after round 3 of 3.")
    assert "plot-rounds-exact-match" in plots(page)


def test_a_line_cut_short_is_said_and_left_out(tmp_path):
    folder = write_run(tmp_path)
    for name in ("metrics.jsonl", "costs.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"round": 4, "phase": "train", "train_l')
    page = run_page(folder)
    assert [note.split(" is cut")[0] for note in page.notes] == [
        "The last line of metrics.jsonl",
        "The last line of costs.jsonl",
    ]
    assert drawn(plots(page)["plot-rounds-train-loss"].figure, "training")[0][0] == [1, 2, 3]


def test_damage_within_a_file_is_said_and_the_rest_is_shown(tmp_path):
    folder = write_run(tmp_path)
    lines = (folder / "metrics.jsonl").read_text().split("\n")
    (folder / "metrics.jsonl").write_text("\n".join(["[1]", "\x00\x00", *lines]))
    (folder / "results.json").write_bytes(b'{"rows": \xff')
    (folder / "shards.json").write_text("[" * 100_000)
    page = run_page(folder)
    assert "2 damaged lines of metrics.jsonl left out, the first is 1." in page.notes
    assert {note.split(" is damaged")[0] for note in page.notes} >= {"results.json", "shards.json"}
    assert "plot-rounds-loss" in plots(page)


def test_answers_without_marked_tokens_are_shown_as_such(tmp_path):
    page = run_page(write_run(tmp_path, without=["examples.jsonl"]))
    (examples,) = blocks(page, Examples)
    assert examples.examples[0].answers[2].text == "maker = Bar - good"
    assert examples.examples[0].answers[2].tokens == []
    assert "Which tokens the proxy changed is not known" in sentences(page)["examples"][0]


def test_an_alpha_from_the_config_was_not_chosen(tmp_path):
    results = whole_run()["results.json"]
    results["shift"]["chosen_by"] = "config"
    plot = plots(run_page(write_run(tmp_path, results=results)))["plot-shift-exact-match"]
    assert drawn(plot.figure, "from the config") == [([1.0], [pytest.approx(91.0)])]
    assert "from the config: alpha 1, 91.0" in plot.alt
    assert "chosen" not in plot.alt


def test_the_time_of_a_resumed_run_is_said_to_be_of_a_part(tmp_path):
    results = whole_run()["results.json"]
    results["costs"]["seconds_after_round"] = 2
    assert "took 83 s after round 2, where it was resumed" in run_page(write_run(tmp_path, results=results)).facts


def test_an_alpha_from_the_config_is_said_with_and_without_a_curve(tmp_path):
    results = whole_run()["results.json"]
    results["shift"] |= {"chosen_by": "config", "curve": [], "plausibility": 0.0}
    page = run_page(write_run(tmp_path, results=results))
    assert [block.text for block in section(page, "shift").blocks] == [
        "The run config set alpha 1 and no mask.",
        "No curve: no other alpha or mask was tried.",
    ]


def test_a_run_without_a_complete_round_is_an_error_with_a_remedy(tmp_path):
    folder = write_run(tmp_path, without=["metrics.jsonl", "results.json"])
    with pytest.raises(RunError, match=r"at least one complete round.*20261121T033727Z-77.*flwr run"):
        make_report(folder)
    assert not (folder / PAGE).exists()


def test_a_folder_of_something_else_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(RunError, match=r"config\.json.*summary\.json.*name the run's own folder"):
        make_report(tmp_path)


@pytest.mark.parametrize(("name", "match"), [("", "a run is named by its id"), ("x" * 300, "is not a run in")])
def test_a_name_that_nothing_can_have_is_refused(name, match, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPT_HOME", str(tmp_path))
    with pytest.raises(RunError, match=match):
        find_folder(name)


JUNK = (None, True, -1, 0, 1e99, 1e400, float("nan"), 10**30, "x", "", [], {}, [None], {"a": 1}, [[1, 2]], "1")


def mutated(value, generator, rate):
    """A copy in which here and there something else stands."""
    if generator.random() < rate:
        return generator.choice(JUNK)
    if isinstance(value, dict):
        return {key: mutated(entry, generator, rate) for key, entry in value.items() if generator.random() > rate}
    return [mutated(entry, generator, rate) for entry in value] if isinstance(value, list) else value


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 10))])
@pytest.mark.parametrize("whole", [whole_run, whole_comparison])
def test_whatever_the_files_hold_there_is_a_page_or_a_sentence(whole, seed, tmp_path):
    generator = random.Random(seed)
    files = {name: mutated(value, generator, 0.04) for name, value in whole().items()}
    for name in files:
        if name.endswith(".jsonl") and not isinstance(files[name], list):
            files[name] = [files[name]]
    folder = write(tmp_path, files)
    page, said = None, ""
    try:
        page = run_page(folder) if whole is whole_run else comparison_page(folder)
    except RunError as error:
        said = str(error)
    if page is None:
        assert re.fullmatch(".+", said)
        return
    for plot in list(page.plots())[:1]:
        plot.svg()
    bare = [
        Section(id=part.id, title=part.title, blocks=[block for block in part.blocks if not isinstance(block, Plots)])
        for part in page.sections
    ]
    Tags(render(Page(kicker=page.kicker, title=page.title, facts=page.facts, notes=page.notes, sections=bare)))


# --- a comparison ---


def test_a_comparison_has_a_table_and_plots_for_each_world(compared, comparison):
    assert comparison.title == "Two worlds"
    assert [part.title for part in comparison.sections[:2]] == ["World demo", "World <b>2</b>"]
    assert sorted(path.name for path in compared.glob("*.png")) == [
        "plot-1-demo-by-flops.png",
        "plot-1-demo-calibration.png",
        "plot-1-demo-exact-match.png",
        "plot-1-demo-loss.png",
        "plot-1-demo-rounds.png",
        "plot-2-world-b-2-b-exact-match.png",
        "plot-2-world-b-2-b-loss.png",
        "plot-shards.png",
    ]
    means, values = (block for block in comparison.sections[0].blocks if isinstance(block, Table))
    assert means.rows[0][:3] == ["tuned", "carry", "2"]
    assert (means.rows[0][3].text, means.rows[0][3].extra) == ("21.0", "[11.0, 31.0]")
    assert texts(values.rows)[0] == ["tuned", "carry", "20.0, 22.0", "0.8, 0.82"]
    said = [block.text for block in comparison.sections[0].blocks if isinstance(block, Prose)]
    assert len(said) == 1
    assert "may go beyond 0 and 100 %, and of two seeds they say little" in said[0]


def test_every_seed_of_a_comparison_is_a_dot(comparison):
    figure = plots(comparison)["plot-1-demo-exact-match"].figure
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    rows = ["tuned", "proxy", "large_federated_lora"]
    assert names == ["mode carry", *rows, "without a mode", *rows]
    assert drawn(figure, "dots")[0] == ([20.0, 22.0], [1, 1])
    assert drawn(figure, "interval")[0][0] == pytest.approx([11.0, 31.0])
    assert [y for _, (y,) in drawn(figure, "value")] == [1, 2, 3, 5, 6, 7]


def test_a_comparison_shows_gap_costs_learning_rates_and_cells(comparison):
    tables = {
        part.id: block for part in comparison.sections for block in reversed(part.blocks) if isinstance(block, Table)
    }
    assert tables["gap"].rows[0][2:4] == ["proxy", "large_federated"]
    assert tables["gap"].rows[0][4] == "exact match"
    assert texts(tables["gap"].rows)[0][5:7] == ["91.0", "[85.0, 95.0]"]
    assert tables["costs"].head[3:] == ["MB up", "GFLOP", "tokens/s", "cell seconds"]
    assert texts(tables["costs"].rows) == [["demo", "carry", "proxy", "5.00", "2.00", "7.00", "12.5"]]
    assert texts(tables["learning-rates"].rows) == [
        ["demo", "large_federated", "-", "0.001", "10.0", "-"],
        ["demo", "large_federated", "yes", "0.003", "20.0", "-"],
    ]
    assert texts(tables["cells"].rows) == [["demo-0", "fedpt", "demo", "carry", "0", "tuned 20.0", "31.0"]]


def test_costs_have_the_same_names_in_the_report_and_on_the_terminal():
    assert {name: COSTS[name][0] for name in COLUMNS} == {name: title for name, (title, _) in COLUMNS.items()}


def test_a_comparison_shows_differences_views_ablations_and_calibration(comparison):
    tables = {part.id: [block for block in part.blocks if isinstance(block, Table)] for part in comparison.sections}
    (difference,) = tables["differences"][0].rows
    assert difference[:4] == ["demo", "carry", "tuned", "exact match"]
    assert [difference[4].text, difference[4].extra, difference[6].text] == ["70.0", "[60.0, 80.0]", "0.0004"]
    assert tables["costs"][1].head[3:] == ["GFLOP %"]
    assert texts(tables["costs"][1].rows) == [["demo", "carry", "large_federated", "5.0"]]
    by_bytes, by_flops, targets, spread = tables["views"]
    assert (by_bytes.head, texts(by_bytes.rows)) == (["MB", "proxy (carry) %"], [["5.00", "-"], ["20.0", "90.0"]])
    assert "GFLOP" in by_flops.caption
    assert texts(targets.rows) == [
        ["demo", "proxy (carry)", "90", "2", "2", "1.50", "7.00", "3.00", "4.00"],
        *(["World <b>2</b>", "proxy (carry)", share, "2", "1", "-", "-", "-", "-"] for share in ("50", "90")),
    ]
    (why,) = [block.text for block in section(comparison, "views").blocks if isinstance(block, Prose)]
    assert why.startswith("Cost to reach a target, world World <b>2</b>: no costs: with seed 1 large_federated gains")
    assert texts(spread.rows) == [["demo", "tuned_local", "10.0", "-", "0.0", "-"]]
    assert tables["ablations"][0].rows[0][:6] == [
        "demo", "proxy.alpha", "0.5", "proxy.plausibility = 0", "proxy", "2"
    ]  # fmt: skip
    assert tables["calibration"][0].rows[0][2].text == "11.0"
    assert tables["config"][0].rows == [["seed", "0"], ["proxy.alpha", "auto"]]
    (examples,) = section(comparison, "examples").blocks
    assert [(answer.model, answer.text, answer.right) for answer in examples.examples[0].answers] == [
        ("proxy (carry)", "me", False)
    ]


def test_calibration_and_cost_plots_show_the_hand_computed_places(comparison):
    found = plots(comparison)
    # Four answers with 0.6 in all, one right; five with 4.75, all right.
    assert drawn(found["plot-1-demo-calibration"].figure, "proxy (carry)") == [
        (pytest.approx([15.0, 95.0]), pytest.approx([25.0, 100.0]))
    ]
    assert drawn(found["plot-1-demo-by-flops"].figure, "proxy (carry)") == [([2.0], pytest.approx([91.0]))]
    assert drawn(found["plot-1-demo-rounds"].figure, "proxy (carry)") == [([1.0, 2.0], pytest.approx([45.0, 90.0]))]


def test_the_tables_of_a_comparison_are_files_for_programs_and_papers(compared):
    folder = compared / "tables"
    assert sorted(path.stem for path in folder.glob("*.csv")) == [
        *("ablations", "calibration", "cells", "config", "cost-ratios", "cost-to-target", "costs", "devices"),
        *("differences", "gap-closed", "learning-rates", "quality-by-gflop", "quality-by-mb", "robustness"),
        *("scores", "scores-by-seed"),
    ]
    lines = (folder / "gap-closed.csv").read_text().splitlines()
    assert lines[0] == (
        "world,mode,row,to,by,gap closed %,gap closed %_low,gap closed %_high,"
        "over the items %_low,over the items %_high,by seed %_1,by seed %_2"
    )
    assert lines[1] == "demo,carry,proxy,large_federated,exact match,91,81,101,85,95,90,92"
    assert (folder / "quality-by-mb.csv").read_text() == "world,MB,proxy (carry) %\ndemo,5,\ndemo,20,90\n"
    assert (folder / "learning-rates.csv").read_text().splitlines()[1] == "demo,large_federated,,0.001,10,"
    scores = list(csv.DictReader((folder / "scores.csv").read_text().splitlines()))
    assert [row["world"] for row in scores] == ["demo"] * 6 + ["World <b>2</b>"] * 6
    assert float(scores[0]["exact match %_low"]) == pytest.approx(11)
    latex = (folder / "gap-closed.tex").read_text()
    assert "\\begin{tabular}{lllllrrr}" in latex
    assert (
        "demo & carry & proxy & large\\_federated & exact match & 91.0 [81.0, 101.0] & [85.0, 95.0] & 90.0, 92.0 \\\\"
        in latex
    )


def test_a_table_as_a_file_is_nothing_that_a_program_would_run():
    rows = [["=cmd()", "-"], ["[x]", Cell("-104,688", "~", {"": -104688.25, "_low": None})]]
    table = Table(caption="50 % & more", head=["a", "b"], rows=rows, texts=1)
    assert as_csv([table]) == "a,b,b_low\n'=cmd(),,\n[x],-104688.25,\n"
    latex = as_latex([table])
    assert latex.startswith("% 50 \\% \\& more\n")
    assert "{}[x] & -104,688 \\textasciitilde{} \\\\" in latex


def test_more_lines_than_colours_are_told_apart():
    curves = [Curve(f"row {number}", f"series-{number}", (1.0,), (1.0,)) for number in (0, 8)]
    first, second = draw_curves("t", curves, unit="s").axes[0].lines[:2]
    assert first.get_color() == second.get_color()
    assert first.get_markerfacecolor() != second.get_markerfacecolor()


def test_a_comparison_that_has_just_begun_makes_a_page_of_sentences(tmp_path):
    summary = {"title": "x", "rows": [], "errors": {"demo-1": "no disk"}}
    write(tmp_path, {"summary.json": summary, "cells/a.json": {}})
    (tmp_path / "cells" / "b.json").write_text('{"name": "b')
    page = comparison_page(tmp_path)
    assert all(found for found in sentences(page).values())
    assert page.notes[0] == "The cell demo-1 failed: no disk"
    assert "cells/b.json is damaged" in page.notes[1]


@pytest.mark.parametrize("summary", [{}, []])
def test_a_summary_without_tables_is_refused(summary, tmp_path):
    with pytest.raises(RunError, match=r"summary.json: must hold a comparison's tables; make the comparison again"):
        comparison_page(write(tmp_path, {"summary.json": summary}))


def test_answers_are_those_of_cells_that_count(tmp_path):
    """Not of a learning rate that was tried and not chosen, though its file's name comes first."""
    files = whole_comparison()
    chosen = files["cells/demo-0.json"]
    files["summary.json"] |= {"counted": ["demo-0"], "cells": {"done": 2, "all": 2}}
    tried = copy.deepcopy(chosen) | {"name": "demo"}
    tried["examples"][0]["answers"]["proxy"]["answer"] = "somebody else"
    files["cells/demo-.json"] = tried
    page = comparison_page(write(tmp_path, files))
    (examples,) = section(page, "examples").blocks
    assert [answer.text for answer in examples.examples[0].answers] == ["me"]
    assert [line[0] for line in section(page, "cells").blocks[-1].rows] == ["demo-0"]
    assert "2 cells" in page.facts


def test_a_seed_without_a_value_keeps_its_place(tmp_path):
    files = whole_comparison()
    files["summary.json"]["gap_closed"] = [{"world": "demo", "mode": "off", "mean": None, "values": [None, 0.5]}]
    files["summary.json"]["gap_closed"][0]["why"] = "no share: it gained nothing"
    page = comparison_page(write(tmp_path, files))
    table, said = section(page, "gap").blocks
    assert texts(table.rows) == [["demo", "off", "proxy", "large_federated", "exact match", "-", "-", "-, 50.0"]]
    assert said.text == "World demo, mode off: no share: it gained nothing."


def test_the_strongest_attack_is_the_one_with_the_largest_auc():
    rows = [
        {"setting": "as configured", "target": "tuned", "attack": attack, "auc": {"value": value, "ci95": [0.4, 0.9]}}
        for attack, value in (("likelihood_ratio", 0.55), ("calibrated", 0.7), ("loss", 0.6), ("broken", None))
    ]
    (plot,) = [
        plot
        for part in attack_sections({"membership": rows})[0].blocks
        if isinstance(part, Plots)
        for plot in part.plots
    ]
    assert [x for (x,), _ in drawn(plot.figure, "value")] == [0.7]


# --- drawing ---


def test_drawing_leaves_the_users_matplotlib_alone_and_does_not_depend_on_it():
    def pictures():
        plot = plot_points("a", "title", [Point("a", "proxy", 1.0)], unit="s", write=short)
        return plot.svg(), plot.png()

    with mpl.rc_context({"text.usetex": True, "font.size": 40, "axes.facecolor": "red"}):
        before = dict(mpl.rcParams)
        theirs = pictures()
        assert dict(mpl.rcParams) == before
    assert theirs == pictures()


def test_the_report_does_not_need_pyplot():
    """It keeps figures, and chooses a window system, for the whole process."""
    modules = list(Path(report.__file__).parent.glob("*.py"))
    assert len(modules) > 5
    assert not [path for path in modules if "pyplot" in path.read_text()]


def test_losses_of_very_different_size_are_on_a_logarithmic_axis():
    points = [Point("large", "large", 7.0), Point("proxy", "proxy", 0.04)]
    axes = draw_points("t", points, unit="nats", write=short).axes[0]
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "nats, logarithmic"
    assert draw_points("t", points[:1], unit="nats", write=short).axes[0].get_xscale() == "linear"


@pytest.mark.parametrize("rounds", [(1,), (1, 2), tuple(range(1, 9))])
def test_an_axis_of_rounds_has_whole_numbers(rounds):
    curve = Curve("training", "small", rounds, (1.0,) * len(rounds))
    ticks = draw_curves("t", [curve], unit="nats").axes[0].get_xticks()
    assert set(rounds) & set(ticks)
    assert all(tick == int(tick) for tick in ticks)


def test_bars_of_nothing_are_drawn():
    assert draw_bars("t", [Bar("a", {"": 0.0})], unit="s").axes[0].patches[0].get_width() == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (3, "3"), (1234567, "1,234,567"), (2.5, "2.50"), (99.96, "100"), (1234.5, "1,234"), (1e20, "1e+20")],
)
def test_numbers_are_short(value, text):
    assert short(value) == text


def test_times_are_in_the_unit_that_one_would_say():
    assert [duration(seconds) for seconds in (5, 600, 36_000)] == ["5 s", "10 min", "10.0 h"]


# --- the command ---


def test_the_command_finds_runs_and_comparisons_and_says_where_the_page_is(made, compared, tmp_path, monkeypatch):
    home = tmp_path / "home"
    shutil.copytree(made, home / "runs" / made.name)
    monkeypatch.setenv("FEDPT_HOME", str(home))
    monkeypatch.chdir(compared.parent)
    assert find_folder(compared.name) == compared
    assert find_folder("20261121") == home / "runs" / made.name
    out = tmp_path / "out"
    result = CliRunner().invoke(cli.app, ["report", str(compared), "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.strip() == f"The report is {out / PAGE}"
    assert (out / PAGE).read_bytes() == (compared / PAGE).read_bytes()
