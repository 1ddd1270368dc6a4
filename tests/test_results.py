"""Claims about what a run writes about itself, when it may end early, and whether a resumed run is the same one."""

import json
import logging
import math
from pathlib import Path

import pytest

from fedpt_flwr.config import StopConfig, flat_values, parse_run_config
from fedpt_flwr.errors import ConfigError
from fedpt_flwr.results import (
    check_same_run,
    device_cost_row,
    is_good_enough,
    run_results,
    server_cost_row,
    summary_lines,
)

NAN, INF = math.nan, math.inf

# --- costs ---


def test_what_the_server_measured_stands_whatever_the_device_says():
    metrics = {"server-round": 9, "num-steps": 3, "bytes_up": 1, "round": 7, "device": 5}
    row = device_cost_row(2, 0, bytes_down=10, bytes_up=20, metrics=metrics, refused="")
    assert row == {"round": 2, "device": 0, "bytes_down": 10, "bytes_up": 20, "num_steps": 3}


def test_a_refused_reply_costs_bytes_and_says_why():
    row = device_cost_row(2, 0, bytes_down=10, bytes_up=20, metrics={"num-steps": 3}, refused="too late", limits={})
    assert row == {"round": 2, "device": 0, "bytes_down": 10, "bytes_up": 20, "refused": "too late"}


def device(number, server_round=1, **costs):
    metrics = {name.replace("_", "-"): value for name, value in costs.items() if name not in ("up", "down")}
    return device_cost_row(
        server_round, number, bytes_down=costs.get("down", 0), bytes_up=costs.get("up", 0), metrics=metrics, refused=""
    )


def test_costs_are_means_and_maxima_of_devices_and_the_servers_sums_by_phase():
    rows = [
        device(0, up=10, down=100, seconds=1.0, peak_memory_bytes=7, memory_growth_bytes=5),
        device(1, up=20, down=300, seconds=3.0, peak_memory_bytes=9),
        device_cost_row(1, 2, bytes_down=9999, bytes_up=9999, metrics={}, refused="no"),
        server_cost_row(1, "validation", large_tokens=5, seconds=0.1),
        server_cost_row(2, "distillation", large_tokens=7, seconds=0.12345),
        server_cost_row(2, "validation", large_tokens=11, seconds=0.1),
        server_cost_row(2, "device", large_tokens=13, seconds=0.1),
    ]
    results = run_results(parse_run_config({"seed": 4}), rows, rounds=2, num_devices=3, seconds=1.23456)
    assert results == {
        "seed": 4,
        "rounds": 2,
        "devices": 3,
        "costs": {
            "seconds": 1.23,
            "server_large_tokens": 36,
            "server_large_tokens_validation": 16,
            "server_large_tokens_distillation": 7,
            "server_large_tokens_device": 13,
            "bytes_up_per_device_and_round": 15,
            "bytes_down_per_device_and_round": 200,
            "device_seconds_per_round": 2.0,
            "device_peak_memory_bytes": 9,
            "device_memory_growth_bytes": 5,
        },
    }
    assert rows[4]["seconds"] == 0.123


def test_a_run_in_which_every_reply_was_refused_has_no_means():
    rows = [device_cost_row(1, 0, bytes_down=1, bytes_up=1, metrics={}, refused="no")]
    assert run_results(parse_run_config({}), rows, rounds=1, num_devices=1, seconds=0)["costs"] == {
        "seconds": 0, "server_large_tokens": 0
    }  # fmt: skip


def test_the_end_of_the_log_has_table_verdict_and_costs():
    row = {"n": 4, "exact_match": 0.5, "ci95": {"exact_match": [0.1, 0.9]}}
    costs = {
        "seconds": 61.4, "server_large_tokens": 12_345, "server_large_tokens_distillation": 1_000,
        "server_large_tokens_device": 234, "bytes_up_per_device_and_round": 2e6,
        "device_peak_memory_bytes": 3e8, "device_memory_growth_bytes": 4e7,
    }  # fmt: skip
    results = {"rows": {"tuned": row, "device": row}, "costs": costs}
    lines = summary_lines(results, Path("/runs/one"))
    text = "\n".join(lines)
    assert "tuned" in text
    assert "device  4      50.0 [10.0, 90.0]" in text
    assert "A device and round: 2.00 MB up" in text
    assert "Peak memory of a device's process: 300 MB" in text
    assert "in a fresh process: 40 MB" in text
    assert "Tokens through the large model: 12,345, of which 1,234 to distil and the rest to score" in text
    assert lines[-1] == "The run took 61 s; its folder is /runs/one"
    results["costs"]["seconds_after_round"] = 3
    line = summary_lines(results, Path("/runs/one"))[-1]
    assert line == "After round 3, where it was resumed, the run took 61 s; its folder is /runs/one"


# --- an early end ---


def ends(course, **rule):
    return is_good_enough(course, StopConfig(**rule))


def first_end(course, **rule):
    """The round after which a run with this course would end; None: it is run to its end."""
    return next((rounds for rounds in range(1, len(course) + 1) if ends(course[:rounds], **rule)), None)


@pytest.mark.parametrize("course", [[], [1.0], [0.0] * 9, [NAN] * 9])
def test_a_run_without_a_metric_is_run_to_its_end(course):
    assert not ends(course)
    assert not ends(course, target=0.1, patience=1)


@pytest.mark.parametrize("metric", ["exact_match", "loss"])
def test_nothing_is_good_enough_before_the_first_round(metric):
    assert not ends([], metric=metric, target=0.5, patience=1)


@pytest.mark.parametrize(
    ("metric", "course", "target", "end"),
    [
        ("exact_match", [0.1, 0.5, 0.9], 0.5, 2),  # exactly the target is enough
        ("exact_match", [0.1, 0.5, 0.9], 0.51, 3),
        ("exact_match", [0.1, 0.5, 0.9], 0.95, None),
        ("loss", [2.0, 1.0, 0.1], 1.0, 2),  # less is better
        ("loss", [2.0, 1.0, 0.1], 0.99, 3),
        ("loss", [2.0, 1.0, 0.1], 0.05, None),
        ("loss", [0.0], 0.0, None),  # 0 is no target
        ("exact_match", [0.9, 0.1], 0.95, None),
        ("exact_match", [NAN, 0.9], 0.5, 2),
        ("loss", [NAN, INF, -INF, 0.5], 0.5, 4),  # what is no number is never good
    ],
)
def test_a_run_ends_as_soon_as_it_reaches_its_target(metric, course, target, end):
    assert first_end(course, metric=metric, target=target) == end


def test_only_the_last_round_can_reach_the_target():
    # a run that went on after it (with another rule, say) is not judged by what it once was
    assert not ends([0.9, 0.1], metric="exact_match", target=0.5)


@pytest.mark.parametrize(
    ("metric", "course", "patience", "end"),
    [
        ("exact_match", [0.1, 0.2, 0.2, 0.1, 0.3], 1, 3),  # as good as before is not better
        ("exact_match", [0.1, 0.2, 0.2, 0.1, 0.3], 2, 4),
        ("exact_match", [0.1, 0.2, 0.2, 0.1, 0.3, 0.1, 0.1, 0.1], 3, 8),
        ("exact_match", [0.1, 0.2, 0.3, 0.4], 1, None),
        ("exact_match", [0.0, 0.0, 0.0], 2, 3),
        ("loss", [2.0, 1.0, 1.5, 0.9, 1.0, 1.1], 2, 6),
        ("loss", [1.0, 2.0], 1, 2),
        ("loss", [3.0, 2.0, 1.0], 1, None),
        ("loss", [3.0, NAN, 2.0, NAN, NAN], 2, 5),  # a round without a number is none that is better
        ("loss", [NAN, NAN, NAN], 2, 3),
        ("exact_match", [0.5] * 9, 0, None),  # 0 is no patience at all, but for ever
    ],
)
def test_a_run_ends_when_so_many_rounds_were_no_better_than_the_best_before(metric, course, patience, end):
    assert first_end(course, metric=metric, patience=patience) == end


def test_whichever_rule_comes_first_ends_the_run():
    course = [0.1, 0.3, 0.2, 0.2, 0.9]
    assert first_end(course, metric="exact_match", target=0.9, patience=2) == 4
    assert first_end(course, metric="exact_match", target=0.3, patience=2) == 2
    assert first_end(course, metric="exact_match", target=0.9, patience=3) == 5


def test_a_run_that_was_resumed_says_of_which_part_its_seconds_are():
    settings = {"rounds": 4, "num_devices": 1, "seconds": 2}
    whole, part = (run_results(parse_run_config({}), [], **settings, resumed_after=after) for after in (0, 3))
    assert part["costs"] == whole["costs"] | {"seconds_after_round": 3}
    assert "seconds_after_round" not in whole["costs"]


# --- the same run ---


def record(code="a", fingerprints=None, hashes=None, **keys):
    flat = {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}
    return {
        "run_config": flat_values(parse_run_config(flat)),
        "fingerprints": fingerprints or {"large": "1", "small": "2"},
        "data_hashes": hashes or {"validation": "3", "test": "4"},
        "code_hash": code,
    }


def refused(before, now):
    with pytest.raises(ConfigError) as raised:
        check_same_run(before, now, place="/runs/one")
    return str(raised.value)


def test_a_run_is_the_same_as_itself_after_a_way_through_json(caplog):
    before = json.loads(json.dumps(record(proxy__alpha=0.5)))
    check_same_run(before, record(proxy__alpha=0.5), place="/runs/one")
    check_same_run(before, record(proxy__alpha=0.5, resume="latest", output_dir="/elsewhere"), place="/runs/one")
    patience = {"wait_timeout_s": 9.0, "round_timeout_s": 9.0, "max_failed_rounds": 5, "min_devices": 1}
    check_same_run(before, record(proxy__alpha=0.5, keep_rounds=9, **patience), place="/runs/one")
    assert not caplog.messages


def test_keys_that_differ_are_named_with_what_they_were_and_are():
    text = refused(record(), record(train__max_steps=7, seed=1, resume="latest"))
    assert text.startswith("/runs/one: a resumed run must be the same run; of ")
    assert "keys 2 differ: seed (was 0, is 1), train.max-steps (was 20, is 7); give what config.json there says" in text


def test_a_key_that_one_of_them_lacks_differs():
    before, now = record(), record()
    del before["run_config"]["stop.metric"]
    assert "keys 1 differ: stop.metric (was None, is '')" in refused(before, now)
    before = record()
    before["run_config"]["old-key"] = 3
    assert "keys 1 differ: old-key (was 3, is None)" in refused(before, now)


def test_of_many_keys_ten_are_shown():
    before = record()
    before["run_config"] |= {f"old-{letter}": 1 for letter in "abcdefghijkl"}
    text = refused(before, record())
    assert "keys 12 differ" in text
    assert text.count("was ") == 10


def test_other_models_or_data_are_another_run():
    assert "of 2 models 1 differ: small (was '2', is '5')" in refused(
        record(), record(fingerprints={"large": "1", "small": "5"})
    )
    assert "of 2 data sets 1 differ: test (was '4', is '6')" in refused(
        record(), record(hashes={"validation": "3", "test": "6"})
    )


def test_other_code_is_warned_about_and_not_refused(caplog):
    with caplog.at_level(logging.WARNING):
        check_same_run(record(code="a"), record(code="b"), place="/runs/one")
    assert caplog.messages == ["The code has changed since this run began: it may not end as it would have"]
