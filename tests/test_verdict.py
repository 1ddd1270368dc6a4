"""Tables and sentences for people."""

import pytest

from fedpt_flwr.verdict import render_table, results_table, verdict, worse_by

RESULTS = {
    "rows": {
        "tuned": {"n": 400, "exact_match": 0.125, "loss": 0.45, "ci95": {"exact_match": [0.096, 0.161]}},
        "large": {"n": 400, "exact_match": 0.0, "loss": 7.9, "ci95": {"exact_match": [0.0, 0.0095]}},
        "proxy": {
            "n": 400,
            "exact_match": 0.915,
            "loss": 0.07,
            "ci95": {"exact_match": [0.884, 0.938], "loss": [0.06, 0.08]},
        },
        "large_few_shot": {"n": 400, "shots": 7.5, "ci95": {}},
    },
    "proxy_minus_tuned": {"value": 0.79, "ci95": [0.75, 0.83]},
    "proxy_minus_large": {"value": 0.915, "ci95": [0.885, 0.9425]},
}


def test_the_table_shows_every_row_and_only_columns_that_one_has():
    assert results_table(RESULTS) == [
        ["model", "items", "exact match %", "loss", "shots"],
        ["tuned", "400", "12.5 [9.6, 16.1]", "0.45", "-"],
        ["large", "400", "0.0 [0.0, 0.9]", "7.9", "-"],
        ["proxy", "400", "91.5 [88.4, 93.8]", "0.07 [0.06, 0.08]", "-"],
        ["large_few_shot", "400", "-", "-", "7.5"],
    ]


def test_the_table_is_plain_text_in_columns():
    text = render_table([["model", "loss"], ["proxy", "0.07 [0.06, 0.08]"], ["large_few_shot", "-"]])
    assert text.splitlines() == [
        "model           loss",
        "--------------  -----------------",
        "proxy           0.07 [0.06, 0.08]",
        "large_few_shot  -",
    ]


def test_the_verdict_says_that_the_proxy_wins():
    assert verdict(RESULTS) == (
        "The proxy BEATS the tuned small model: exact match 91.5 % against 12.5 %, difference +79.0 points "
        "(95 % interval +75.0 to +83.0, 400 items, paired). "
        "The proxy BEATS the large model: exact match 91.5 % against 0.0 %, difference +91.5 points "
        "(95 % interval +88.5 to +94.2, 400 items, paired)."
    )


@pytest.mark.parametrize(
    ("interval", "outcome"),
    [((0.01, 0.1), "BEATS"), ((0.0, 0.1), "TIES WITH"), ((-0.1, 0.1), "TIES WITH"), ((-0.1, -0.01), "LOSES TO")],
)
def test_the_verdict_is_as_plain_about_ties_and_defeats(interval, outcome):
    results = RESULTS | {"proxy_minus_tuned": {"value": sum(interval) / 2, "ci95": list(interval)}}
    assert verdict(results).startswith(f"The proxy {outcome} the tuned small model")
    by_loss = {
        "rows": RESULTS["rows"],
        "proxy_minus_tuned_loss": {"value": -sum(interval) / 2, "ci95": [-interval[1], -interval[0]]},
    }
    assert verdict(by_loss).startswith(f"The proxy {outcome} the tuned small model: loss 0.07 against 0.45 nats")


def test_the_verdict_names_the_loss_where_exact_match_tells_nothing():
    nothing = {"value": 0.0, "ci95": [0.0, 0.0]}
    worse = {"value": 4.6, "ci95": [4.3, 4.9]}
    text = verdict(RESULTS | {"proxy_minus_tuned": nothing, "proxy_minus_tuned_loss": worse})
    assert text.startswith("The proxy TIES WITH the tuned small model: exact match")
    assert "By loss it LOSES TO it: loss 0.07 against 0.45 nats per answer token, difference +4.6 (95 %" in text


@pytest.mark.parametrize(("number", "outcome"), [(1, "CANNOT BE TOLD FROM"), (5, "CANNOT BE TOLD FROM"), (6, "BEATS")])
def test_a_handful_of_items_that_all_agree_is_chance(number, outcome):
    rows = {name: row | {"n": number} for name, row in RESULTS["rows"].items()}
    text = verdict(RESULTS | {"rows": rows})
    assert text.startswith(f"The proxy {outcome} the tuned small model: exact match 91.5 %")
    assert (f"{number} item{'s' if number > 1 else ''}, too few: 6 are the fewest, paired)" in text) == (number < 6)
    worse = RESULTS | {"rows": rows, "proxy_minus_tuned": difference(-0.3, -0.1)}
    assert worse_by(worse) == ([] if number < 6 else ["exact match"])


def difference(low, high):
    return {"value": (low + high) / 2, "ci95": [low, high]}


@pytest.mark.parametrize(
    ("exact_match", "loss", "measures"),
    [
        ((-0.3, -0.1), (0.1, 0.3), ["exact match", "loss"]),
        ((-0.3, -0.1), (-0.3, -0.1), ["exact match"]),
        ((0.1, 0.3), (0.1, 0.3), ["loss"]),
        ((0.1, 0.3), (-0.3, -0.1), []),
        ((-0.3, 0.1), (-0.1, 0.3), []),  # an interval that holds 0 says nothing
        ((-0.3, 0.0), (0.0, 0.3), []),
    ],
)
def test_a_proxy_is_worse_where_the_whole_interval_says_so(exact_match, loss, measures):
    compared = {"proxy_minus_tuned": difference(*exact_match), "proxy_minus_tuned_loss": difference(*loss)}
    assert worse_by(RESULTS | compared) == measures


def test_what_was_not_compared_is_not_worse():
    assert worse_by({"rows": RESULTS["rows"], "proxy_minus_large": difference(-1, -0.5)}) == []


def test_there_is_no_verdict_without_a_proxy():
    assert verdict({"rows": {"tuned": {"n": 3, "ci95": {}}}}) == "No verdict: the proxy was not compared."
