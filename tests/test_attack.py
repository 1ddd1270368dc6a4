"""The attack bench: who holds what, what answers cost, how well attacks do; a real attack finds what is there."""

import json
import math
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
from federation import QUICK
from tiny import tiny_llama
from typer.testing import CliRunner

from fedpt_flwr import cli
from fedpt_flwr.attack import Bench, Plan, summary_text
from fedpt_flwr.attack.exposure import exposure, exposure_bits, rank_of
from fedpt_flwr.attack.losses import MOST_NATS, Item, items_of, read_losses
from fedpt_flwr.attack.membership import (
    Guess,
    Shadow,
    bound,
    calibrated_scores,
    likelihood_ratio_scores,
    log_odds,
    loss_scores,
    resampled,
    roc_measures,
    success,
)
from fedpt_flwr.attack.plan import _SHADOWS as FIRST_SHADOW
from fedpt_flwr.attack.plan import AS_IT_IS, CONTROLS, TARGETS
from fedpt_flwr.attack.pool import make_canaries, make_pool, members, write_data
from fedpt_flwr.attack.summary import summarise
from fedpt_flwr.compare import FEDPT, LARGE, Ablation
from fedpt_flwr.config import DataConfig, flat_values, parse_run_config
from fedpt_flwr.data import TokenizedExample, read_records
from fedpt_flwr.demo_world import request_pool
from fedpt_flwr.errors import ConfigError, DataError, RunError
from fedpt_flwr.losses import answer_losses, answer_scores
from fedpt_flwr.prompts import Template
from fedpt_flwr.report import find_folder, make_report
from fedpt_flwr.runs import write_json
from fedpt_flwr.sources import device_shard

APP = Path(__file__).parents[1]
ONCE = np.ones((1, 4), dtype=np.float32)


# --- the success of an attack ----------------------------------------------------------------------------------------


def test_the_roc_is_the_hand_computed_one():
    # By falling score: member, other, member, other. Of four pairs the member is ahead in three.
    found = roc_measures(np.array([4.0, 3.0, 2.0, 1.0]), np.array([True, False, True, False]), ONCE)
    assert found["auc"] == pytest.approx(3 / 4)
    assert found["tpr_at_1_percent"] == 0.5  # the first member, before the first false alarm


def test_records_with_equal_scores_are_taken_together():
    # One pair of equals counts a half: member and other share a score, a member is above, an other below.
    found = roc_measures(np.array([2.0, 1.0, 1.0, 0.0]), np.array([True, True, False, False]), ONCE)
    assert found["auc"] == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert found["tpr_at_1_percent"] == 0.5
    blind = roc_measures(np.zeros(4), np.array([True, True, False, False]), ONCE)
    assert (blind["auc"], blind["tpr_at_1_percent"]) == (pytest.approx(0.5), 0.0)


def test_the_roc_of_weights_is_that_of_repeated_records():
    generator = np.random.default_rng(3)
    scores, inside = generator.integers(0, 5, 40).astype(float), generator.random(40) < 0.5
    weights = generator.integers(0, 4, (6, 40)).astype(np.float32)
    together = roc_measures(scores, inside, weights)
    for place, row in enumerate(weights.astype(int)):
        places = np.repeat(np.arange(40), row)
        alone = roc_measures(scores[places], inside[places], np.ones((1, len(places)), dtype=np.float32))
        for name, values in alone.items():
            assert together[name][place] == pytest.approx(values[0], rel=1e-6), name


def test_a_blind_attack_has_an_interval_around_one_half_and_a_sharp_one_does_not():
    generator = np.random.default_rng(0)
    inside = np.arange(400) % 2 == 0
    blind = success([Guess(generator.normal(size=400), inside)])
    sharp = success([Guess(generator.normal(size=400) + 2 * inside, inside)])
    low, high = blind["auc"]["ci95"]
    assert low < 0.5 < high
    assert sharp["auc"]["ci95"][0] > 0.85
    assert blind["tpr_at_0.1_percent"] is None, "200 non-members do not resolve a false positive rate of 0.1 %"
    assert (blind["members"], blind["non_members"]) == (200, 200)


def test_several_federations_are_averaged_and_a_record_without_a_score_is_left_out():
    first = Guess(np.array([4.0, 3.0, 2.0, 1.0, np.nan]), np.array([True, True, False, False, True]))
    second = Guess(np.array([1.0, 2.0, 3.0, 4.0, np.nan]), np.array([True, True, False, False, True]))
    found = success([first, second])
    assert found["auc"]["value"] == pytest.approx(0.5)
    assert found["auc"]["by_seed"]["values"] == [1.0, 0.0]
    assert found["members"] == 2


def test_blocks_of_many_records_give_the_draws_of_one(monkeypatch):
    whole = np.concatenate(list(resampled(60)))
    monkeypatch.setattr("fedpt_flwr.attack.membership._WEIGHTS_AT_ONCE", 60 * 7)
    blocks = list(resampled(60))
    assert len(blocks) > 100
    np.testing.assert_array_equal(np.concatenate(blocks), whole)


def test_the_bootstrap_begins_with_the_records_as_they_are_and_draws_as_many():
    weights = np.concatenate(list(resampled(7)))
    assert (weights[0] == 1).all()
    assert (weights.sum(1) == 7).all()
    assert len(np.unique(weights, axis=0)) > 100


@pytest.mark.parametrize("shape", [(2.0, 1), (1.8, 8), (11.45, 8)])
def test_noise_bounds_the_true_positive_rate_of_the_best_attack_on_a_record(shape):
    """Played: a device's clipped change is as long as it may be, one way with the record and the other way without."""
    noise_multiplier, releases = shape
    generator = np.random.default_rng(0)
    noise = noise_multiplier * generator.standard_normal((2, 200_000, releases))
    without, with_it = (sign + part for sign, part in zip((-1, 1), noise, strict=True))
    threshold = np.quantile(without.sum(1), 0.99)
    assert bound(noise_multiplier, releases, 0.01) == pytest.approx(np.mean(with_it.sum(1) > threshold), abs=0.01)


def test_a_lot_of_noise_allows_no_more_than_guessing():
    assert bound(1e9, 1, 0.01) == pytest.approx(0.01)
    assert bound(1.0, 10_000, 0.01) == pytest.approx(1.0)


# --- scores ----------------------------------------------------------------------------------------------------------


def test_loss_and_calibration_order_records_as_they_say():
    nats, tokens, before = np.array([2.0, 9.0]), np.array([2.0, 3.0]), np.array([2.5, 20.0])
    assert loss_scores(nats, tokens).tolist() == [-1.0, -3.0]
    assert calibrated_scores(nats, before).tolist() == [0.5, 11.0]


def test_log_odds_are_those_of_the_answer_and_finite_for_a_certain_one():
    assert log_odds(np.array([math.log(2)]))[0] == pytest.approx(0.0)
    assert log_odds(np.array([math.log(4)]))[0] == pytest.approx(math.log(1 / 3))
    assert np.isfinite(log_odds(np.array([0.0, MOST_NATS]))).all()


def gaussian_records(gaps, *, noise, seed=0, number=8):
    """Shadows and an attacked federation whose log-odds are a record's own level, its gap if in, and noise."""
    generator = np.random.default_rng(seed)
    level = generator.normal(0, 5, len(gaps))

    def nats_of(inside):
        odds = level + gaps * inside + generator.normal(0, noise, len(gaps))
        return np.logaddexp(0, -odds)  # -log p for p = 1 / (1 + exp(-odds))

    shadows = []
    for _ in range(number // 2):
        inside = generator.random(len(gaps)) < 0.5
        shadows += [Shadow(nats_of(half), half) for half in (inside, ~inside)]
    inside = generator.random(len(gaps)) < 0.5
    return nats_of(inside), inside, shadows


def test_a_likelihood_ratio_finds_members_that_the_loss_hides():
    # Records differ by far more than training changes them, so the plain loss is nearly blind.
    nats, inside, shadows = gaussian_records(np.full(2000, 1.0), noise=0.5)
    plain = success([Guess(-nats, inside)])["auc"]["value"]
    ratio = success([Guess(likelihood_ratio_scores(nats, shadows), inside)])["auc"]["value"]
    assert plain < 0.6
    assert ratio > 0.85  # two Gaussians at a distance of two standard deviations, whose means are known roughly: 0.9


def test_a_record_that_a_model_was_not_asked_about_has_no_likelihood_ratio_and_the_others_keep_theirs():
    nats, _, shadows = gaussian_records(np.full(50, 1.0), noise=0.5)
    whole = likelihood_ratio_scores(nats[1:], [Shadow(part.nats[1:], part.is_member[1:]) for part in shadows])
    shadows[3].nats[0] = np.nan
    scores = likelihood_ratio_scores(nats, shadows)
    assert np.isnan(scores[0])
    np.testing.assert_allclose(scores[1:], whole)


def test_a_likelihood_ratio_without_anything_to_find_stays_blind():
    nats, inside, shadows = gaussian_records(np.zeros(2000), noise=0.5)
    low, high = success([Guess(likelihood_ratio_scores(nats, shadows), inside)])["auc"]["ci95"]
    assert low < 0.5 < high


def test_a_likelihood_ratio_trusts_a_record_of_its_own_where_records_differ():
    # Half of the records are learnt by heart, the others not at all: only their own gaps tell which.
    gaps = np.where(np.arange(4000) % 2 == 0, 4.0, 0.0)
    nats, inside, shadows = gaussian_records(gaps, noise=0.5)
    scores = likelihood_ratio_scores(nats, shadows)
    learnt = gaps > 0
    assert success([Guess(scores[learnt], inside[learnt])])["auc"]["value"] > 0.99
    assert np.abs(scores[learnt]).mean() > 10 * np.abs(scores[~learnt]).mean()


def test_the_likelihood_ratio_is_the_hand_computed_one():
    # One record. In: odds 1 and 3, out: -1 and 1. Means 2 and 0, variance (1+1+1+1) / (4-2) = 2, gap 2.
    shadows = [
        Shadow(np.logaddexp(0, -np.array([odds])), np.array([inside]))
        for odds, inside in ((1.0, True), (3.0, True), (-1.0, False), (1.0, False))
    ]
    nats = np.logaddexp(0, -np.array([1.5]))
    # ((1.5 - 0)^2 - (1.5 - 2)^2) / (2 * 2) = gap * (1.5 - 1) / 2
    assert likelihood_ratio_scores(nats, shadows)[0] == pytest.approx(((1.5**2) - 0.5**2) / 4)


# --- exposure --------------------------------------------------------------------------------------------------------


def test_a_rank_counts_those_that_are_likelier_and_halves_equals():
    assert rank_of(np.array([3.0, 1.0, 2.0]), 1) == 1.0
    assert rank_of(np.array([3.0, 1.0, 2.0]), 0) == 3.0
    assert rank_of(np.array([1.0, 1.0, 1.0]), 2) == 2.0


def test_exposure_is_all_bits_of_the_first_and_none_of_the_last():
    assert exposure_bits(1.0, 1024) == 10.0
    assert exposure_bits(1024.0, 1024) == 0.0
    found = exposure([1.0, 1.0, 512.0], 1024)
    assert found["value"] == pytest.approx((10 + 10 + 1) / 3)
    assert (found["first"], found["canaries"], found["most"]) == (pytest.approx(2 / 3), 3, 10.0)


def test_guessing_gives_the_exposure_that_the_docs_say():
    expected = np.mean([exposure_bits(rank, 1000) for rank in range(1, 1001)])
    assert expected == pytest.approx(1 / math.log(2), abs=0.01)
    assert "1.44 bits" in (APP / "docs" / "privacy.md").read_text()


# --- losses ----------------------------------------------------------------------------------------------------------


def test_many_candidates_in_few_items_cost_what_they_cost_one_by_one():
    model, prompt = tiny_llama(3), [5, 6, 7]
    answers = [[10 + first, 20 + second] for first in range(3) for second in range(4)] + [[8], [9, 9, 9]]
    items, where = items_of(prompt, answers)
    assert len(items) == 3 + 1 + 1
    batches = answer_scores(model, [item.read for item in items], pad_id=0, batch_size=2)
    nats = read_losses(items, batches, lambda scores: {"model": scores[0]})["model"]
    one_by_one = answer_losses(model, [TokenizedExample(prompt, answer) for answer in answers], pad_id=0).nats
    np.testing.assert_allclose([nats[item][end] for item, end in where], one_by_one, rtol=1e-5)


def test_records_of_all_lengths_cost_what_scoring_says_and_a_ruled_out_token_costs_the_most():
    model = tiny_llama(4)
    examples = [TokenizedExample([3] * (1 + place % 4), [4 + place] * (1 + place % 3)) for place in range(11)]
    items = [Item(example, (example.answer_ids[-1],)) for example in examples]

    def combine(scores):
        ruled_out = scores[0].clone()
        ruled_out[:, 4] = -math.inf
        return {"model": scores[0], "masked": ruled_out}

    found = read_losses(items, answer_scores(model, examples, pad_id=0, batch_size=3), combine)
    expected = answer_losses(model, examples, pad_id=0).nats
    np.testing.assert_allclose([float(nats[0]) for nats in found["model"]], expected, rtol=1e-5)
    assert found["masked"][0][0] == MOST_NATS
    assert found["masked"][1][0] < found["model"][1][0], "what is left out leaves its probability to the others"


# --- who holds what --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_pool():
    return make_pool(DataConfig(), num_devices=8, seed=0)


def test_the_generator_makes_more_requests_of_the_same_kind_each_once():
    records = request_pool(0, per_kind=480)
    assert len({tuple(record.values()) for record in records}) == len(records) == 8 * 480
    train = read_records("demo:train")
    assert {tuple(record.values()) for record in train} <= {tuple(record.values()) for record in records}
    assert {record["unit"] for record in records} == {record["unit"] for record in train}


def test_the_packaged_world_trains_on_as_many_records_as_it_has(demo_pool):
    assert demo_pool.num_devices == 8
    chosen = members(demo_pool, half=0)
    held = np.bincount(np.asarray(demo_pool.devices)[chosen], minlength=8)
    assert held.tolist() == [240] * 8
    assert [demo_pool.examples[place].group for place in (0, -1)] == ["boiler", "router"]


def test_two_halves_of_a_pair_are_what_the_other_is_not_and_pairs_differ(demo_pool):
    halves = [members(demo_pool, half=half) for half in range(4)]
    assert (halves[0] == ~halves[1]).all()
    assert (halves[2] == ~halves[3]).all()
    assert 0.4 < (halves[0] == halves[2]).mean() < 0.6


def test_a_federation_trains_on_its_half_and_on_its_own_secrets(demo_pool, tmp_path):
    data = DataConfig()
    chosen = members(demo_pool, half=6)
    canaries = make_canaries(data, num_devices=8, number=8, copies=(1, 4), digits=3, seed=1)
    told = write_data(demo_pool, chosen, canaries, data, tmp_path, seed=0)
    config = parse_run_config(flat_values(parse_run_config({})) | told)
    for device in range(8):
        shard = device_shard(config.data, device=device, num_devices=8, seed=5)
        own = {
            (demo_pool.examples[place].prompt, demo_pool.examples[place].answer)
            for place in np.flatnonzero(chosen)
            if demo_pool.devices[place] == device
        }
        secrets = [canary for canary in canaries if canary.device == device]
        assert [canary.copies for canary in secrets] == [1, 4]
        assert len(shard) == 240 + 5
        found = {(example.prompt, example.answer) for example in shard}
        true = [canary.examples(Template(data.template), data.answer_field)[canary.secret] for canary in secrets]
        assert found - own == {(example.prompt, example.answer) for example in true}
        assert own <= found


def test_other_seeds_hide_other_secrets_of_which_all_are_as_likely():
    data = DataConfig()
    secrets = [
        canary.secret
        for seed in range(50)
        for canary in make_canaries(data, num_devices=2, number=4, copies=(1,), digits=1, seed=seed)
    ]
    counts = np.bincount(secrets, minlength=10)
    assert counts.min() > 5
    assert counts.sum() == 200


def test_what_is_held_out_of_the_training_data_stays_held_out(tmp_path):
    source = tmp_path / "all.jsonl"
    lines = [{"q": f"q{number}", "a": f"a{number}", "site": f"s{number % 3}"} for number in range(60)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = DataConfig(
        train=str(source),
        validation="",
        test="",
        template="{q}\n",
        answer_field="a",
        group_field="site",
        value_field="",
        name_field="",
        cover_field="",
    )
    pool = make_pool(data, num_devices=3, seed=4)
    told = write_data(pool, members(pool, half=0), [], data, tmp_path / "data", seed=4)
    parts = [{record["q"] for record in read_records(told[f"data.{name}"])} for name in ("train", "validation", "test")]
    assert all(parts)
    assert sum(map(len, parts)) == len(set().union(*parts))
    assert {example.prompt for example in pool.examples}.isdisjoint({f"{name}\n" for name in parts[1] | parts[2]})


def test_a_record_that_is_there_twice_is_one_record(tmp_path):
    source = tmp_path / "all.jsonl"
    source.write_text("".join(f'{{"q": "q{number % 20}", "answer": "a"}}\n' for number in range(40)))
    elsewhere = {"validation": "demo:validation", "test": "demo:test"}
    pool = make_pool(
        DataConfig(train=str(source), template="{q}", partitioner="iid", **elsewhere), num_devices=2, seed=0
    )
    assert sorted(example.prompt for example in pool.examples) == sorted(f"q{number}" for number in range(20))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"partitioner": "node-local"}, ConfigError, "data.partitioner: an attack must know who holds what"),
        ({"format": "text", "partitioner": "iid"}, ConfigError, "data.format: an attack needs records of which each"),
        ({"train": "few.jsonl", "partitioner": "iid"}, DataError, "at least 4 different records"),
        ({"train": "none.jsonl", "partitioner": "iid"}, DataError, "none.jsonl"),
        ({"answer_field": "nope"}, DataError, "demo:train, record 1: the record has no field 'nope'; its fields are"),
        ({"group_field": "nope"}, DataError, "demo:train, record 1: the record has no field 'nope'"),
        ({"template": "{nope}"}, DataError, "demo:train, record 1: the record has no field 'nope'"),
    ],
)
def test_data_that_cannot_be_attacked_is_refused_with_a_sentence(changes, error, match, tmp_path):
    (tmp_path / "few.jsonl").write_text("".join(f'{{"q": "{n}", "answer": "a"}}\n' for n in range(6)))
    if "train" in changes:
        changes = changes | {"train": str(tmp_path / changes["train"]), "template": "{q}"}
    with pytest.raises(error, match=match):
        make_pool(DataConfig(**changes), num_devices=2, seed=0)


# --- what is run -----------------------------------------------------------------------------------------------------


def make_plan(**changes):
    settings = {
        "run_config": {"data.partitioner": "iid"},
        "targets": tuple(TARGETS),
        "seeds": (0, 1),
        "shadows": 4,
        "num_devices": 2,
        "canaries": 2,
        "copies": (1, 3),
        "digits": 2,
    }
    return Plan(**settings | changes)


def test_every_target_has_a_meaning_and_those_that_are_tuned_a_control():
    assert set(CONTROLS) | {"untuned", "large"} == set(TARGETS)
    assert set(CONTROLS.values()) <= set(TARGETS)
    docs = (APP / "docs" / "privacy.md").read_text()
    assert all(f"`{name}`" in docs for name in TARGETS)


def test_a_plan_has_the_federations_that_it_says_with_names_of_their_own():
    plan = make_plan(settings=(Ablation.parse("train.max-steps=5,10"),))
    parts = plan.federations()
    assert len(parts) == 3 * (2 + 4) + 1 * (2 + 4)
    assert len({part.name for part in parts}) == len(parts)
    assert [part.is_shadow for part in parts] == sorted(part.is_shadow for part in parts)
    assert {part.setting for part in parts if part.kind == LARGE} == {AS_IT_IS}
    wide = make_plan(settings=(Ablation.parse("train.max-steps=5,10"),), varies_large=True)
    assert len(wide.federations()) == 3 * (2 + 4) * 2


def test_every_record_is_in_half_of_the_shadows(demo_pool):
    halves = [part.half for part in make_plan(shadows=6).federations() if part.is_shadow and part.kind == FEDPT]
    assert len(halves) == 6
    assert min(halves) == FIRST_SHADOW
    assert (np.sum([members(demo_pool, half=half) for half in halves], axis=0) == 3).all()


def test_a_run_is_told_its_setting_and_nothing_of_it_is_scored_in_vain():
    plan = make_plan(settings=(Ablation.parse("train.max-steps=5"),))
    first = {(part.kind, part.is_shadow, part.setting): plan.told(part) for part in plan.federations()}
    assert first[FEDPT, False, "train.max-steps=5"]["train.max-steps"] == 5
    assert first[FEDPT, False, AS_IT_IS]["distillation.mode"] == "off"
    assert first[FEDPT, False, AS_IT_IS]["scoring.rows"] == "tuned,proxy"
    assert first[FEDPT, True, AS_IT_IS]["scoring.num-items"] == 1
    assert first[LARGE, False, AS_IT_IS]["model.small"] == "demo:large"
    assert first[LARGE, False, AS_IT_IS]["train.learning-rate"] == 4e-4
    carried = make_plan(run_config={"distillation.mode": "carry"})
    assert carried.told(carried.federations()[0])["distillation.mode"] == "carry"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"targets": ("tuned", "weights")}, "--targets: must be some of tuned, proxy"),
        ({"targets": ()}, "--targets: must be some of"),
        ({"targets": ("tuned", "tuned")}, "--targets: must name each target once"),
        ({"seeds": ()}, "--seeds: must be whole numbers from 0"),
        ({"seeds": (-1,)}, "--seeds: must be whole numbers from 0"),
        ({"seeds": (1, 1)}, "--seeds: must name each seed once"),
        ({"shadows": 2}, "--shadows: must be 0 or an even number of at least 4"),
        ({"shadows": 5}, "--shadows: must be 0 or an even number of at least 4"),
        ({"copies": (0,)}, "--copies: must be whole numbers of at least 1"),
        ({"copies": (2, 2)}, "--copies: must name each number once"),
        ({"digits": 7}, "--digits: must be from 1 to 6"),
        ({"canaries": 1001}, "--canaries: must be from 0 to 1000"),
        ({"run_config": {"seed": 3}}, "an attack gives these keys itself"),
        ({"run_config": {"train.max-steps": -1}}, "train.max-steps"),
        ({"settings": (Ablation.parse("train.max-stepps=4"),)}, "train.max-stepps: is not a key of this app"),
    ],
)
def test_a_plan_that_cannot_be_run_says_why(changes, match):
    with pytest.raises(ConfigError, match=match):
        make_plan(**changes)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--targets", "weights"], "--targets: must be some of"),
        (["--seeds", "one"], "--seeds: must be numbers"),
        (["--shadows", "3"], "--shadows: must be 0 or an even number"),
        (["-c", "data.partitioner='node-local'"], "devices with data of their own"),
        (["--ablate", "nonsense"], "must be a key with its values"),
    ],
)
def test_bad_options_are_one_clear_sentence(options, match, tmp_path):
    result = CliRunner().invoke(cli.app, ["attack", "--app", str(APP), "--out", str(tmp_path / "out"), *options])
    assert result.exit_code == 1
    assert match in str(result.exception)
    assert not (tmp_path / "out").exists()


# --- tables ----------------------------------------------------------------------------------------------------------


PRIVATE = {"delta": 1e-5, "noise_multiplier": 4.0, "releases": 3}


def result_of(part, *, epsilon=None, right=0.75):
    """A federation that learnt by heart what it trained on, in numbers."""
    inside = (np.arange(200) + part.half) % 2 == 0
    difficulty = 1 + np.arange(200) / 100
    nats = {name: (difficulty - 0.9 * inside).tolist() for name in part_targets(part)}
    nats |= {control: difficulty.tolist() for control in ("untuned", "large")}
    return {
        "nats": nats,
        "ranks": {name: [1.0, 50.0] for name in nats},
        "tokens": [4] * 200,
        "members": inside.astype(int).tolist(),
        "canaries": [{"device": 0, "copies": 1}, {"device": 1, "copies": 3}],
        "candidates": 100,
        "absent": {"device_last": "no device has replied"} if part.kind == FEDPT else {},
        "pool": {"digest": "x", "source": "demo:train", "devices": 2},
        "rows": {"tuned": {"exact_match": 0.25, "loss": 0.5}, "proxy": {"exact_match": right, "loss": 0.25}},
        "alpha": 0.5,
        "plausibility": 0.001,
        **({"privacy": PRIVATE | {"epsilon": epsilon}} if epsilon is not None else {}),
    }


def part_targets(part):
    return [LARGE] if part.kind == LARGE else ["tuned", "proxy"]


@pytest.fixture(scope="module")
def summary():
    plan = make_plan(targets=("tuned", "proxy", LARGE), settings=(Ablation.parse("train.max-steps=5"),))
    done = {
        part.name: result_of(part, epsilon=2.0 if part.changes and not part.is_shadow else None)
        for part in plan.federations()
    }
    head = {"title": "Attack", "command": "fedpt attack", "cells": {"done": len(done), "all": len(done)}}
    return json.loads(json.dumps(head | summarise(plan, done) | {"errors": {}}))


def test_the_tables_have_a_row_for_every_target_and_attack(summary):
    rows = {(row["setting"], row["target"], row["attack"]): row for row in summary["membership"]}
    assert {key[1:] for key in rows if key[0] == AS_IT_IS} == {
        ("tuned", "loss"),
        ("tuned", "calibrated"),
        ("tuned", "likelihood_ratio"),
        ("proxy", "loss"),
        ("proxy", "calibrated"),
        ("proxy", "likelihood_ratio"),
        (LARGE, "loss"),
        (LARGE, "calibrated"),
        (LARGE, "likelihood_ratio"),
        ("untuned", "loss"),
        ("large", "loss"),
    }
    assert rows[AS_IT_IS, "tuned", "calibrated"]["auc"]["value"] == 1.0
    assert rows[AS_IT_IS, "untuned", "loss"]["auc"]["value"] == pytest.approx(0.5, abs=0.02)


def test_epsilon_and_what_it_allows_stand_beside_what_was_measured(summary):
    for row in summary["membership"] + summary["exposure"] + summary["utility"]:
        is_private = row["setting"] == "train.max-steps=5"
        assert row["epsilon"] == (2.0 if is_private else None)
    private = [row for row in summary["membership"] if row["epsilon"] == 2.0]
    assert private
    assert all(row["allowed_at_1_percent"] == bound(4.0, 3, 0.01) for row in private)


def test_noise_that_the_server_adds_bounds_no_attack_on_a_single_reply():
    plan = make_plan(targets=("tuned", "device_last"), shadows=0)
    done = {part.name: result_of(part, epsilon=1.0) for part in plan.federations()}
    for result in done.values():
        result["nats"]["device_last"] = result["nats"]["tuned"]
    rows = {row["target"]: row for row in summarise(plan, done)["membership"]}
    assert rows["tuned"]["allowed_at_1_percent"] == bound(4.0, 3, 0.01)
    assert rows["device_last"]["allowed_at_1_percent"] is None


def test_secrets_of_all_federations_count_by_their_copies(summary):
    rows = {(row["target"], row["copies"]): row for row in summary["exposure"] if row["setting"] == AS_IT_IS}
    assert rows["tuned", 1]["value"] == pytest.approx(math.log2(100))
    assert rows["tuned", 3]["value"] == pytest.approx(1.0)
    assert rows["tuned", 1]["canaries"] == 6  # two seeds and four shadows


def test_what_the_models_are_worth_is_the_mean_of_the_seeds_with_each_of_them():
    plan = make_plan(targets=("tuned", "proxy"))
    done = {part.name: result_of(part, right=0.25 + 0.5 * part.seed) for part in plan.federations()}
    (row,) = summarise(plan, done)["utility"]
    assert row["proxy_exact_match"] == 0.5
    assert row["proxy_exact_match_by_seed"] == [0.25, 0.75]
    assert "50.0 % (25.0 to 75.0)" in summary_text(summarise(plan, done))


def test_without_all_shadows_there_is_no_likelihood_ratio():
    plan = make_plan(targets=("tuned",))
    done = {part.name: result_of(part) for part in plan.federations()[:-1]}
    found = summarise(plan, done)
    assert {row["attack"] for row in found["membership"]} == {"loss", "calibrated"}
    assert found["absent"] == {f"{AS_IT_IS}, device_last": "no device has replied"}


def test_nothing_done_gives_empty_tables():
    found = summarise(make_plan(), {})
    assert (found["membership"], found["exposure"], found["utility"]) == ([], [], [])
    assert summary_text(found) == ""


def test_the_summary_is_fit_for_a_terminal(summary):
    text = summary_text(summary)
    assert "train.max-steps=5" in text
    assert "infinite" in text
    assert "25.0 % (25.0 to 25.0)" in text
    assert "1.000 [1.000, 1.000]" in text


def test_the_report_has_the_tables_and_escapes_what_it_is_given(summary, tmp_path):
    evil = "<script>alert(1)</script>"
    (tmp_path / "attack.json").write_text(json.dumps(summary | {"title": evil, "errors": {"cell": evil}}))
    page = make_report(find_folder(str(tmp_path)))
    text = page.read_text()
    assert evil not in text
    assert "&lt;script&gt;" in text
    for part in (
        "Membership inference",
        "Canary exposure",
        "likelihood ratio",
        "epsilon 2",
        "as configured",
        "[75.0, 75.0]",
    ):
        assert part in text, part
    assert (tmp_path / "plot-membership.png").exists()
    assert (tmp_path / "tables" / "membership.csv").exists()


def test_settings_are_named_in_the_report_by_what_tells_them_apart(tmp_path):
    settings = (Ablation.parse("privacy.noise-multiplier=1.5,3.0 privacy.dp='server-fixed'"),)
    plan = make_plan(targets=("tuned",), settings=settings, shadows=0)
    done = {part.name: result_of(part, epsilon=2.0 if part.changes else None) for part in plan.federations()}
    (tmp_path / "attack.json").write_text(json.dumps(summarise(plan, done)))
    text = make_report(tmp_path).read_text()
    assert ">privacy.noise-multiplier=1.5<" in text
    assert "also changes privacy.dp=server-fixed" in text
    assert "epsilon 2, privacy.noise-multiplier=3.0" in text
    assert (tmp_path / "plot-utility.png").exists()


@pytest.mark.parametrize("found", [{}, {"membership": 3, "exposure": [1], "utility": {}, "cells": []}])
def test_a_report_of_little_or_of_nonsense_is_a_page_nonetheless(found, tmp_path):
    (tmp_path / "attack.json").write_text(json.dumps(found))
    assert "No federation was attacked yet" in make_report(tmp_path).read_text()


def test_an_attack_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "attack.json").write_text("[]")
    with pytest.raises(RunError, match="must hold an object"):
        make_report(tmp_path)


def test_federations_of_other_files_behind_the_same_path_are_run_again(tmp_path):
    def bench():
        made = Bench(plan, tmp_path / "one", app=APP)
        made.close()
        return made

    data = tmp_path / "validation.jsonl"
    data.write_text("".join((APP / "fedpt_demo_world" / "validation.jsonl").read_text().splitlines(keepends=True)[:6]))
    plan = make_plan(run_config={"data.validation": str(data), "data.partitioner": "iid"}, seeds=(0,), shadows=0)
    begun = bench()
    for federation in begun.federations:
        task, digest = begun._task(federation), next(iter(begun._digests.values()))
        kept = {"nats": {}, "pool": {"digest": digest}, "code_hash": begun._code_hash}
        kept |= {"run_config": plan.recorded(federation), "inputs": dict(task.inputs)}
        write_json(tmp_path / "one" / "cells" / f"{federation.name}.json", kept)
    assert bench().num_found == len(begun.federations)
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:5]))
    again = bench()
    assert (again.num_found, again.num_outdated) == (0, len(begun.federations))


# --- real federations ------------------------------------------------------------------------------------------------

TINY = QUICK | {"data.partitioner": "iid", "train.batch-size": 8, "train.max-steps": 8, "train.learning-rate": 0.02}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """An attack on tiny shards that are learnt by heart, interrupted after a federation and gone on with."""
    folder = tmp_path_factory.mktemp("attacks") / "one"
    few = folder.parent / "few.jsonl"
    few.write_text("".join((APP / "fedpt_demo_world" / "train.jsonl").read_text().splitlines(keepends=True)[:240:5]))
    fewer = few.with_name("fewer.jsonl")  # all of these are scored
    fewer.write_text("".join(few.read_text().splitlines(keepends=True)[:6]))
    own = {"data.train": str(few), "data.validation": str(fewer), "distillation.mode": "off"}
    plan = make_plan(
        run_config=TINY | own,
        seeds=(0, 1),
        shadows=0,
        copies=(1, 8),
        targets=("tuned", "proxy", "proxy_without_mask", "device_first", "device_last", "aggregate_first", LARGE),
        large_learning_rate=4e-3,
    )
    told = []

    def interrupt(progress):
        told.append(progress)
        raise KeyboardInterrupt

    begun = Bench(plan, folder, app=APP)
    with pytest.raises(KeyboardInterrupt):
        begun.run(jobs=1, on_cell=interrupt)
    begun.close()
    assert multiprocessing.active_children() == []
    bench = Bench(plan, folder, app=APP)
    assert bench.num_found == 1
    bench.run(jobs=1, on_cell=told.append)
    assert bench.failed == {}
    summary = bench.write_summary(command="fedpt attack")
    bench.close()
    assert [progress.done for progress in told] == [1, 2, 3, 4]
    return plan, folder, summary


@pytest.mark.timeout(900)  # the first one makes the attack
@pytest.mark.slow
def test_a_real_attack_finds_what_was_learnt_by_heart_and_nothing_in_the_controls(done):
    _, _, summary = done
    rows = {(row["target"], row["attack"]): row["auc"] for row in summary["membership"]}
    for control in ("untuned", "large"):
        low, high = rows[control, "loss"]["ci95"]
        assert low < 0.5 < high
    assert rows["device_last", "calibrated"]["ci95"][0] > 0.55
    assert rows["device_last", "calibrated"]["value"] > rows["aggregate_first", "calibrated"]["value"] - 0.05
    bits = {(row["target"], row["copies"]): row["value"] for row in summary["exposure"]}
    assert bits["device_last", 8] > bits["untuned", 8] + 1
    assert summary["absent"] == {}


@pytest.mark.slow
def test_the_last_aggregate_of_one_device_is_its_last_reply(tmp_path, done):
    plan, _, _ = done
    alone = make_plan(
        run_config=dict(plan.run_config) | {"min-devices": 1},
        targets=("tuned", "device_last", "device_first", "aggregate_first"),
        seeds=(0,),
        shadows=0,
        num_devices=1,
    )
    bench = Bench(alone, tmp_path / "alone", app=APP)
    bench.run(jobs=1)
    assert bench.failed == {}
    (result,) = bench.done.values()
    bench.close()
    np.testing.assert_allclose(result["nats"]["tuned"], result["nats"]["device_last"], atol=2e-4)
    np.testing.assert_allclose(result["nats"]["aggregate_first"], result["nats"]["device_first"], atol=2e-4)
    assert result["ranks"]["tuned"] == result["ranks"]["device_last"]


@pytest.mark.slow
def test_a_finished_attack_runs_nothing_again_and_another_one_is_refused(done, tmp_path):
    plan, folder, _ = done
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    bench = Bench(plan, copy, app=APP)
    assert bench.num_found == len(bench.federations)
    with pytest.raises(RunError, match="another process works on this attack"):
        Bench(plan, copy, app=APP)
    bench.close()
    cell = next((copy / "cells").iterdir())
    cell.write_text(cell.read_text()[:-20])
    bench = Bench(plan, copy, app=APP)
    assert (bench.num_found, bench.num_outdated) == (len(bench.federations) - 1, 1)
    bench.close()
    other = make_plan(run_config=dict(plan.run_config), seeds=(0, 1), shadows=0)
    with pytest.raises(ConfigError, match="holds another attack"):
        Bench(other, copy, app=APP)
    with pytest.raises(RunError, match="must be a new folder or that of an attack"):
        Bench(plan, copy / "cells", app=APP)


@pytest.mark.slow
def test_a_federation_that_fails_says_why_and_the_others_go_on(done, tmp_path):
    plan, _, _ = done
    failing = make_plan(
        run_config=dict(plan.run_config),
        targets=("tuned",),
        seeds=(0,),
        shadows=0,
        settings=(Ablation.parse("min-devices=99 wait-timeout-s=0.1"),),
    )
    bench = Bench(failing, tmp_path / "out", app=APP)
    bench.run(jobs=1)
    assert len(bench.done) == 1
    ((name, error),) = bench.failed.items()
    assert "min-devices" in name
    assert "99" in error
    assert bench.write_summary(command="x")["errors"] == bench.failed
    bench.close()


@pytest.mark.slow
def test_in_half_a_type_and_with_adapters_the_same_targets_are_read(done, tmp_path):
    plan, _, _ = done
    changed = make_plan(
        run_config=dict(plan.run_config)
        | {"min-devices": 1, "wire.dtype": "float16", "tuning.mode": "lora", "tuning.lora-rank": 4},
        targets=("tuned", "device_last", "aggregate_first"),
        seeds=(0,),
        shadows=0,
        num_devices=1,
    )
    bench = Bench(changed, tmp_path / "half", app=APP)
    bench.run(jobs=1)
    assert bench.failed == {}
    (result,) = bench.done.values()
    bench.close()
    # A device sends its change, rounded to half a type; the server adds it to weights that it did not round.
    np.testing.assert_allclose(result["nats"]["tuned"], result["nats"]["device_last"], rtol=0.02, atol=0.02)
