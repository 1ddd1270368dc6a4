"""What a comparison is made of, without running any of it: kinds, ablations, tuning files, statistics, views."""

import json
import os
import re

import numpy as np
import pytest

from fedpt_flwr.attack.plan import Federation
from fedpt_flwr.compare import FEDPT, KINDS, LARGE, Ablation, Cell, Plan, inputs, read_tuning, tuning_of
from fedpt_flwr.compare.cell import reliability
from fedpt_flwr.compare.inputs import digest_of_path, input_digests
from fedpt_flwr.compare.kinds import CENTRAL, DISTILLED, FEW_SHOT_SMALL, LARGE_CENTRAL, LOCAL, UNTOUCHED
from fedpt_flwr.compare.statistics import (
    bootstrap_p,
    gap_over_items,
    holm,
    item_sums,
    merged_bins,
    paired_difference,
    t_interval,
    t_quantile,
)
from fedpt_flwr.compare.views import cost_to_target, curves, quality_under_budget, ratios
from fedpt_flwr.errors import ConfigError, FedPTError

WORLD = {"proxy.alpha": "auto", "train.max-steps": 5}


def make_plan(**changes):
    settings = {"worlds": {"demo": WORLD}, "modes": ("final",), "seeds": (0, 1), "num_devices": 4}
    settings |= {"learning_rates": {kind: part.rates[:1] for kind, part in KINDS.items() if part.needs_rate}}
    return Plan(**settings | changes)


def told(plan, kind, **cell):
    return plan.run_config(Cell(world="demo", kind=kind, seed=0, **cell))


# --- kinds ---


def test_every_row_of_every_kind_says_what_it_is_and_no_two_kinds_give_the_same():
    rows = [row for kind in KINDS.values() for row in kind.rows.values()]
    assert len(set(rows)) == len(rows)
    for kind in KINDS.values():
        assert set(kind.meanings) == set(kind.rows.values())
        assert not kind.judged or kind.judged in kind.rows


def test_every_kind_that_chooses_a_learning_rate_tries_as_many():
    assert {len(kind.rates) for kind in KINDS.values() if kind.judged} == {3}


def test_what_is_tuned_in_one_place_makes_as_many_steps_as_all_devices_that_train_in_a_round():
    half = make_plan(worlds={"demo": WORLD | {"fraction-train": 0.5}})
    assert told(make_plan(), CENTRAL)["train.max-steps"] == 4 * 5
    assert told(half, CENTRAL)["train.max-steps"] == 2 * 5
    assert told(half, LARGE_CENTRAL)["fraction-train"] == 1.0
    # A quarter of four devices is one, but a round has three at least.
    quarter = make_plan(worlds={"demo": WORLD | {"fraction-train": 0.25, "min-replies": 3, "min-devices": 4}})
    assert told(quarter, CENTRAL)["train.max-steps"] == 3 * 5
    summed = make_plan(worlds={"demo": WORLD | {"fraction-train": 0.25, "privacy.secure-sum": True, "min-devices": 4}})
    assert told(summed, CENTRAL)["train.max-steps"] == 3 * 5
    assert told(make_plan(), LARGE_CENTRAL, learning_rate=0.1)["model.small"] == "demo:large"


def test_epochs_of_some_devices_are_no_number_of_epochs_of_one_that_has_all_data():
    epochs = WORLD | {"train.max-steps": 0, "train.epochs": 1}
    assert told(make_plan(worlds={"demo": epochs}), CENTRAL)["train.epochs"] == 1
    half = {"demo": epochs | {"fraction-train": 0.5}}
    with pytest.raises(ConfigError, match="train.max-steps: .* as many steps as the 2 of 4 devices .* got 0; bound"):
        make_plan(worlds=half)
    assert make_plan(worlds=half, kinds=(FEDPT, LARGE)).cells({})


def test_the_neighbouring_method_has_the_large_model_as_its_teacher_and_the_budget_of_fedpt():
    fedpt, neighbour = (told(make_plan(), kind) for kind in (FEDPT, DISTILLED))
    assert (neighbour["proxy.alpha"], neighbour["distillation.mode"]) == (0.0, "final")
    same = [key for key in fedpt if key.startswith(("distillation.", "train.", "data.", "model."))]
    assert {key: neighbour[key] for key in same} == {key: fedpt[key] for key in same}


def test_a_device_that_is_alone_trains_as_it_would_with_others():
    alone, together = (told(make_plan(), kind) for kind in (LOCAL, FEDPT))
    assert alone["min-devices"] == 1
    same = [key for key in together if key.startswith(("train.", "data.")) or key == "num-server-rounds"]
    assert {key: alone[key] for key in same} == {key: together[key] for key in same}


def test_what_is_not_tuned_is_scored_once_unless_seeds_have_other_items():
    assert make_plan().seeds_of("demo", UNTOUCHED) == (0,)
    held_out = make_plan(worlds={"demo": WORLD | {"data.test": ""}})
    assert held_out.seeds_of("demo", UNTOUCHED) == (0, 1)
    assert FEW_SHOT_SMALL not in make_plan(worlds={"demo": WORLD | {"scoring.few-shot": 0}}).kinds_of("demo")


def test_all_kinds_make_so_many_cells():
    # untouched and untuned_few_shot once, seven kinds with two seeds, fedpt in a second mode with two more
    assert make_plan(modes=("final", "carry")).num_cells == 2 + 7 * 2 + 2
    assert len(make_plan(modes=("final", "carry")).cells({})) == 18


# --- ablations ---


def test_an_ablation_is_read_as_a_key_with_values_and_what_goes_with_it():
    ablation = Ablation.parse("distillation.mode='final','carry' proxy.alpha=0.5 data.prompts=demo:prompts_slang")
    assert (ablation.key, ablation.values) == ("distillation.mode", ("final", "carry"))
    assert ablation.fixed == {"proxy.alpha": 0.5, "data.prompts": "demo:prompts_slang"}
    assert Ablation.parse("proxy.alpha=0.25,1,auto").values == (0.25, 1, "auto")
    assert Ablation.parse("tuning.lora-rank=4").changes(4) == {"tuning.lora-rank": 4, "tuning.mode": "lora"}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("proxy.alpha=0.5 proxy.alpha=1", "must name each key once"),
        ("proxy.alpha=0.5,,1", "must have a value before and after each comma"),
        ("proxy.alpha=0.5,0.50", "must not name a value twice"),
    ],
)
def test_an_ablation_that_says_something_twice_or_not_at_all_is_refused(text, match):
    with pytest.raises(ConfigError, match=f"^--ablate: {match}, got '{text}'; for example"):
        Ablation.parse(text)


def test_cells_that_differ_in_seed_and_learning_rate_alone_are_alike():
    plan = make_plan(
        kinds=(FEDPT, LARGE),
        modes=("final", "carry"),
        learning_rates={LARGE: (2e-4, 4e-4)},
        ablations=(Ablation.parse("train.max-steps=5,6"),),
    )
    assert [(cell.kind, cell.mode, cell.changes) for cell in plan.unlike_cells()] == [
        (FEDPT, "final", ()),
        (FEDPT, "carry", ()),
        (LARGE, None, ()),
        (FEDPT, "final", (("train.max-steps", 6),)),
    ]


def test_a_value_that_changes_nothing_is_the_cell_that_is_there_anyway():
    plan = make_plan(ablations=(Ablation.parse("train.max-steps=5,10"), Ablation.parse("distillation.mode=final,off")))
    cells = plan.ablation_cells({})
    assert [cell.name for cell in cells if cell.seed == 0] == [
        "demo-fedpt-final-seed0",
        "demo-fedpt-final-train.max-steps_10-seed0",
        "demo-fedpt-final-seed0",
        "demo-fedpt-off-distillation.mode_off-seed0",
    ]
    assert plan.num_cells == make_plan().num_cells + 4
    assert told(plan, FEDPT, mode="off", changes=(("distillation.mode", "off"),))["distillation.mode"] == "off"


def test_the_number_of_devices_can_be_varied():
    plan = make_plan(ablations=(Ablation.parse("devices=2,16"),))
    few, many = plan.ablation_cells({})[::2]
    assert (plan.devices_of(few), plan.devices_of(many)) == (2, 16)
    assert plan.run_config(many)["data.partitioner"] == "iid"  # whole groups are too few
    assert "devices" not in plan.run_config(many)


# --- files ---


def test_a_digest_is_of_what_lies_behind_a_path_and_not_of_the_path(tmp_path, monkeypatch):
    def digest(name, **files):
        for file, text in files.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / file).write_text(text)
        return digest_of_path(tmp_path / name)

    first = digest("one", a="1", b="22")
    assert digest("two", a="1", b="22") == first
    assert digest("one", b="23") != first
    assert digest("one", b="22") == first
    (tmp_path / "one" / ".cache").mkdir()
    (tmp_path / "one" / ".cache" / "lock").write_text("")
    assert digest("one") == first
    assert digest("one", c="") != first
    assert digest("two", **{".d": ""}) != first  # a hidden file of a folder is read as any other
    (tmp_path / "two" / ".d").unlink()
    assert digest_of_path(tmp_path / "one" / "a") != digest_of_path(tmp_path / "one" / "b")
    monkeypatch.setattr(inputs, "_LARGEST_READ", 1)
    before = digest("two")
    os.utime(tmp_path / "two" / "a", ns=(0, 0))  # it is read, and still the same
    assert digest("two") == before
    os.utime(tmp_path / "two" / "b", ns=(0, 0))  # it is too large to be read, and has another time
    assert digest("two") != before


def test_digests_are_of_the_files_that_a_config_names_and_that_are_here(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    flat = {"data.train": str(tmp_path / "train.jsonl"), "data.test": str(tmp_path / "none.jsonl")}
    flat |= {"data.choices": "test", "output-dir": str(tmp_path), "remote.cache": str(tmp_path)}
    flat["data.public"] = "/" + 300 * "x"
    found = {"data.train": digest_of_path(tmp_path / "train.jsonl")}
    with pytest.raises(ConfigError, match="data.public: cannot be read"):
        input_digests(flat)
    assert input_digests(flat | {"data.public": ""}) == found


# --- tuning ---


def validated(kind, exact_match):
    return {"validation_rows": {KINDS[kind].main_row: {"exact_match": exact_match, "loss": 1.0}}}


def test_a_tuning_file_holds_what_was_chosen_and_gives_it_back(tmp_path):
    plan = make_plan(kinds=(FEDPT, LARGE), seeds=(7,), learning_rates={FEDPT: (1e-3, 3e-3, 1e-2), LARGE: (2e-4, 4e-4)})
    settled = {
        cell.name: validated(cell.kind, 1.0 if cell.learning_rate in (3e-3, 4e-4) else 0.5) for cell in plan.cells({})
    }
    held = tuning_of(plan, settled, command="fedpt compare --tune", code_hash="c")
    rates = held["worlds"]["demo"]["rates"]
    assert (rates[FEDPT]["learning_rate"], rates[FEDPT]["at_the_edge"], len(rates[FEDPT]["tried"])) == (3e-3, False, 3)
    assert rates[LARGE]["at_the_edge"]
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps(held))
    tuned, notes = read_tuning(path, {"demo": WORLD, "other": WORLD}, num_devices=4)
    assert (tuned, notes) == ({"demo": {FEDPT: 3e-3, LARGE: 4e-4}}, [])
    known = make_plan(tuned=tuned, kinds=(FEDPT, LARGE), learning_rates={LARGE: (1.0, 2.0)})
    assert {cell.learning_rate for cell in known.cells({})} == {3e-3, 4e-4}
    _, notes = read_tuning(path, {"demo": WORLD | {"train.max-steps": 6}}, num_devices=8)
    assert notes == [
        "World demo: the learning rates were chosen with other settings (train.max-steps, devices) and are "
        "used all the same; --tune chooses them anew"
    ]
    with pytest.raises(
        ConfigError, match=r"^--tuning, .*: must be about one of the worlds other, got \['demo'\]; give"
    ):
        read_tuning(path, {"other": WORLD}, num_devices=4)
    assert tuning_of(plan, dict.fromkeys(settled), command="c", code_hash="c")["worlds"]["demo"]["rates"] == {}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, r"cannot be read \(.*No such file"),
        ("# A", r"cannot be read \("),
        ("[]", "must be a file that `fedpt comp"),
    ],
)
def test_what_is_no_tuning_file_is_one_sentence(content, match, tmp_path):
    path = tmp_path / "tuning.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(FedPTError, match=rf"^--tuning, {path}: {match}.*; name a tuning.json that `--tune` wrote$"):
        read_tuning(path, {"demo": WORLD}, num_devices=4)


# --- statistics ---


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    # 97.5 % points of Student's t, from the tables of any textbook.
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (30, 2.042), (120, 1.980)],
)
def test_quantiles_are_those_of_the_tables(freedom, quantile):
    assert t_quantile(freedom) == pytest.approx(quantile, abs=5e-4)


def test_the_interval_is_the_hand_computed_one():
    # Mean 0.9, standard deviation 0.1; 4.3027 * 0.1 / sqrt(3) = 0.24842.
    assert t_interval([0.8, 0.9, 1.0]) == pytest.approx((0.65158, 1.14842), abs=1e-5)
    assert t_interval([0.5, 0.5]) == (0.5, 0.5)
    assert t_interval([0.5]) is None


def items(keys, **rows):
    marks = {name: {"exact_match": marks, "loss": [0.5 * mark for mark in marks]} for name, marks in rows.items()}
    return {"keys": list(keys), "tokens": [2] * len(keys), "rows": marks}


def test_what_seeds_made_of_an_item_is_one_draw():
    first, second = items("ab", proxy=[1, 1], tuned=[0, 1]), items("ab", proxy=[1, 0], tuned=[0, 0])
    columns = [((part, "proxy"), (part, "tuned")) for part in (first, second)]
    # Item a: proxy 1 + 1, tuned 0; item b: proxy 1 + 0, tuned 1 + 0; two seeds each.
    np.testing.assert_array_equal(item_sums(columns, "exact_match"), [[2, 0, 2], [1, 1, 2]])
    found = paired_difference(columns, "exact_match")
    assert found["value"] == 0.5  # (2 - 0 + 1 - 1) / 4
    assert found["ci95"] == [0.0, 1.0]  # both items the same: a (1) or b (0)
    assert found["by_seed"]["values"] == [0.5, 0.5]
    assert found["items"] == 2


def test_a_loss_is_weighted_by_its_tokens():
    part = items("ab", proxy=[1, 3], tuned=[1, 1])
    part["tokens"] = [1, 3]
    # Nats: proxy 0.5 + 3 * 1.5 = 5, tuned 0.5 + 3 * 0.5 = 2; of 4 tokens.
    assert paired_difference([((part, "proxy"), (part, "tuned"))], "loss")["value"] == pytest.approx(0.75)


def test_items_that_a_seed_lacks_count_where_they_are():
    first, second = items("ab", proxy=[1, 0], tuned=[0, 0]), items("bc", proxy=[1, 1], tuned=[0, 1])
    columns = [((part, "proxy"), (part, "tuned")) for part in (first, second)]
    np.testing.assert_array_equal(item_sums(columns, "exact_match"), [[1, 0, 1], [1, 0, 2], [1, 1, 1]])


def test_a_row_that_was_not_measured_is_not_compared():
    part = items("ab", proxy=[1, 0])
    part["rows"]["proxy"]["exact_match"][1] = None
    assert paired_difference([((part, "proxy"), (part, "proxy"))], "exact_match") is None
    assert paired_difference([((part, "proxy"), (part, "tuned"))], "exact_match") is None


def test_p_values_count_both_sides_and_are_never_zero():
    assert bootstrap_p(np.array([-1.0, 1.0, 2.0])) == pytest.approx(1.0)  # 2 (1 + 1) / 4
    assert bootstrap_p(np.full(999, 0.3)) == pytest.approx(0.002)
    assert bootstrap_p(np.zeros(9)) == 1.0


def test_holm_raises_p_values_as_in_a_hand_computed_case():
    # Sorted: 0.01 * 4, 0.02 * 3, 0.03 * 2 = 0.06, 0.2 * 1.
    assert holm([0.2, 0.01, 0.03, 0.02]) == pytest.approx([0.2, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_gap_has_an_interval_over_items_or_is_none():
    rows = {"proxy": [1, 1, 1, 0], "large": [0, 0, 0, 0], "reference": [1, 1, 1, 1]}
    part = items("abcd", **rows)
    names = ("proxy", "large", "reference")
    assert gap_over_items([[(part, name) for name in names]]) == [0.25, 1.0]
    assert gap_over_items([[(part, "proxy"), (part, "large"), (part, "large")]]) is None


def test_calibration_is_the_hand_computed_one():
    # 0.95 twice, one right: |1.9 - 1| = 0.9; 0.05 once, wrong: 0.05; of three answers.
    found = reliability([0.95, 0.95, 0.05], [1, 0, 0])
    assert found["ece"] == pytest.approx(0.95 / 3)
    assert found["bins"][9] == [2, pytest.approx(1.9), 1]
    assert reliability([1.0], [1])["ece"] == 0.0


def test_bins_are_added_up():
    parts = [reliability([0.95, 0.05], [1, 0]), reliability([0.95], [0])]
    assert merged_bins(parts) == pytest.approx(np.array(reliability([0.95, 0.05, 0.95], [1, 0, 0])["bins"]))


# --- views ---


def cell(seed, row, scores, *, bytes_up=10, flops=5.0):
    curve = [
        {"round": place, "bytes_up": bytes_up, "bytes_down": 0, "flops": flops, "rows": {row: {"exact_match": score}}}
        for place, score in enumerate(scores, 1)
    ]
    return {"seed": seed, "curve": curve, "rows": {row: {"exact_match": scores[-1]}}}


def untouched(seed, score):
    """A cell whose large model is better on all validation items than on those that score rounds."""
    return cell(seed, "large", [score]) | {
        "kind": UNTOUCHED,
        "validation_rows": {"large": {"exact_match": score + 0.3}},
    }


@pytest.fixture
def groups():
    return {
        ("w", UNTOUCHED, None): [untouched(0, 0.2)],
        ("w", FEDPT, "final"): [cell(0, "proxy", [0.1, 0.7, 0.9]), cell(1, "proxy", [0.2, 0.5, 0.9])],
        ("w", LARGE, None): [cell(0, LARGE, [0.5, 1.0], bytes_up=100), cell(1, LARGE, [0.4, 1.0], bytes_up=100)],
    }


def targets(groups):
    return {(row["row"], row["share"]): row for row in cost_to_target(groups)}


def test_the_cost_of_a_target_is_that_of_the_first_round_that_is_there(groups):
    found = targets(groups)
    # Half of the way from 0.2 to 1.0 is 0.6: the proxies are there in rounds 2 and 3, the large ones in round 2.
    half = found["proxy", 0.5]
    assert (half["round"], half["bytes"], half["flops"]) == (2.5, 25, 12.5)
    assert found[LARGE, 0.5]["bytes"] == 200
    assert (found["proxy", 0.9]["seeds"], found["proxy", 0.9]["seeds_reached"]) == (2, 0)  # 0.92
    assert "bytes" not in found["proxy", 0.9]
    assert {row for row, _ in found} == {"proxy", LARGE}
    assert all("why" not in row for row in found.values())


def test_where_seeds_have_other_items_each_gap_begins_at_its_own_large_model(groups):
    groups["w", UNTOUCHED, None] = [untouched(0, 0.2), untouched(1, 0.0)]
    # Half of the way of seed 1 is 0.5, where its proxy is in round 2; from seed 0's 0.2 it would be 0.6, in round 3.
    assert targets(groups)["proxy", 0.5]["round"] == 2


@pytest.mark.parametrize("end", [0.2, 0.1])
def test_where_there_is_no_gap_nothing_closes_it_and_the_table_says_why(end, groups):
    groups["w", LARGE, None][1] = cell(1, LARGE, [0.4, end])
    rows = cost_to_target(groups)
    assert {row["row"] for row in rows} == {"proxy", LARGE}
    for row in rows:
        assert row["seeds_reached"] <= 1
        assert not {"round", "bytes", "flops", "seconds"} & row.keys()
        assert row["why"] == (
            f"no costs: with seed 1 {LARGE} gains nothing over large (20.0 % before, {100 * end:.1f} % after)"
        )


def test_the_large_model_as_it_is_is_scored_on_the_items_of_rounds_and_has_no_course_of_its_own(groups):
    flat = {"scoring.round-items": 7}
    assert told(make_plan(worlds={"demo": WORLD | flat}), UNTOUCHED)["scoring.round-items"] == 7
    assert {row["row"] for row in curves(groups)} == {"proxy", LARGE}
    assert {row["row"] for row in quality_under_budget(groups)} == {"proxy", LARGE}


def test_quality_under_a_budget_is_the_best_that_was_there_by_then(groups):
    found = {(row["row"], row["cost"]): row for row in quality_under_budget(groups)}
    # A quarter of three rounds ends in the first, a half in the second.
    assert found["proxy", "bytes"]["budgets"] == [10, 20, 30, 200]
    assert found["proxy", "bytes"]["exact_match"] == pytest.approx([0.15, 0.6, 0.9, 0.9])
    assert found[LARGE, "bytes"]["exact_match"] == [None, None, None, 1.0]


def test_a_budget_is_enough_for_the_seed_that_spends_most(groups):
    first, second = (cell(seed, "proxy", [0.2, 0.7, 0.75, 0.8], flops=flops) for seed, flops in ((0, 100), (1, 100.2)))
    found = quality_under_budget({("w", FEDPT, "final"): [first, second]})
    (row,) = [row for row in found if row["cost"] == "flops"]
    assert row["budgets"] == pytest.approx([100.2, 200.4, 400.8])
    assert row["exact_match"] == pytest.approx([0.2, 0.7, 0.8])


def test_costs_are_put_beside_those_of_the_large_model():
    costs = [
        {"world": "w", "mode": "final", "row": "proxy", "device_flops_per_round": 5.0, "device_state_bytes": 2.0},
        {"world": "w", "mode": None, "row": LARGE, "device_flops_per_round": 50.0},
    ]
    assert ratios(costs) == [{"world": "w", "mode": "final", "against": LARGE, "device_flops_per_round": 0.1}]


def test_names_tell_cells_apart_whatever_is_varied():
    longs = ["x" * 100 + end for end in "ab"]
    values = [0.5, -0.5, "a/b", "a_b", "a b", "/models/a", "_models_a", *longs]
    cells = [Cell(world="w", kind="fedpt", seed=0, changes=(("model.large", value),)) for value in values]
    cells += [Cell(world=world, kind="fedpt", seed=0) for world in ("my world", "my_world")]
    attacked = [Federation(kind="fedpt", changes=cell.changes, seed=0, half=0) for cell in cells if cell.changes]
    for names in ([cell.name for cell in cells], [federation.name for federation in attacked]):
        assert len(set(names)) == len(names)
        assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,130}", name) for name in names)
