"""The benchmark of decoding: its models, its arithmetic, and one run with tiny models; what others refuse."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import privacy, robustness, secure_sum, trio, wire
from fedpt_flwr.errors import ConfigError
from fedpt_flwr.runs import write_json

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY = trio.SIZES["tiny"]


@pytest.fixture(scope="module", params=trio.FAMILIES)
def family(request):
    return request.param


def scores(model, seed=7):
    ids = torch.randint(TINY.vocab, (4, 24), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        return model(ids).logits


def test_the_large_model_scores_as_its_core_does_at_ten_times_the_cost(family):
    core = trio.randomise(trio.FAMILIES[family](TINY), seed=0)
    large = trio.widened(core, trio.FAMILIES[family](TINY, TINY.times, TINY.extra_layers), TINY.times, seed=1)
    torch.testing.assert_close(scores(large), scores(core), rtol=0, atol=0.1)  # scores have a deviation of 3
    assert trio.bytes_read(large) > 10 * trio.bytes_read(core)


def test_the_drafter_is_right_as_often_as_wanted(family):
    core = trio.randomise(trio.FAMILIES[family](TINY), seed=0)
    untuned, tuned = trio.dialled_pair(core, 0.8)
    drafted = scores(tuned).argmax(-1)
    right = drafted == (scores(core) + scores(tuned) - scores(untuned)).argmax(-1)
    assert 0.6 < right.float().mean() < 0.95


def test_the_drafter_that_is_always_wrong_is(family):
    core = trio.randomise(trio.FAMILIES[family](TINY), seed=0)
    untuned, tuned = trio.shifted_pair(core)
    right = scores(tuned).argmax(-1) == (scores(core) + scores(tuned) - scores(untuned)).argmax(-1)
    assert right.float().mean() < 0.03


def test_models_are_made_once(tmp_path):
    made = trio.make(tmp_path, "llama", TINY)
    written = (tmp_path / "large" / "model.safetensors").stat().st_mtime_ns
    assert trio.make(tmp_path, "llama", TINY) == made
    assert (tmp_path / "large" / "model.safetensors").stat().st_mtime_ns == written


def test_drafting_counts_rounds_as_they_would_go():
    # Two drafts a round: r r + its own token; w + own; r w + own; the last token is never drafted.
    right = torch.tensor([[True, True, True, False, True, False, True]])
    # rounds at 0 (2 of 2), 3 (0 of 2), 4 (1 of 2), 6 (0 of 0)
    assert trio.drafting(right, 2) == (3 / 6, 7 / 4)


def test_agreement_looks_at_each_new_token_after_the_true_ones():
    model = trio.randomise(trio.llama(TINY), seed=0)
    prompts = torch.arange(1, 11).view(2, 5)  # 0 would be taken for padding
    with torch.inference_mode():
        new = model.generate(prompts, max_new_tokens=6, do_sample=False, pad_token_id=0)[:, 5:].clone()
        assert trio.agreement(model, prompts, new).all()
        new[0, 3] = (new[0, 3] + 1) % TINY.vocab
        right = trio.agreement(model, prompts, new)
    assert right[0, :4].tolist() == [True, True, True, False]
    assert right[1].all()


# --- tables that go on, and what is no table ---

ROBUST = ["--rounds", "2", "--items", "4", "--defences", "FedAvg", "--shares", "0.125", "--attacks", "noise"]


def refusal(benchmark, *words):
    with pytest.raises(SystemExit) as raised:
        benchmark.main(list(map(str, words)))
    return str(raised.value)


def test_a_table_of_malicious_devices_goes_on_with_its_own_config_alone(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(robustness, "run_one", lambda told, *_: ran.append(told) or {"norms": [1.0]})
    out = tmp_path / "cells.json"
    for _ in range(2):
        robustness.main(["--out", str(out), *ROBUST])
    assert [told["num-server-rounds"] for told in ran] == [2, 2]
    text = refusal(robustness, "--out", out, *ROBUST, "--rounds", 3)
    assert "the cell FedAvg/none/1/0 was made with num-server-rounds=2" in text
    assert text.endswith("got 3; name another file in --out, or ask for what this one has")
    assert "train.max-steps=None" in refusal(robustness, "--out", out, *ROBUST, "-c", "train.max-steps=4")
    assert "was made with devices=8" in refusal(robustness, "--out", out, *ROBUST, "--devices", 9)
    assert "\n" not in text


def with_defences(out, *names):
    words = ["--out", str(out), *ROBUST]
    words[words.index("FedAvg") : words.index("FedAvg") + 1] = names
    return words


def test_bounds_follow_from_the_plain_mean_of_the_same_seed_and_no_other_cell(tmp_path, monkeypatch):
    norms = itertools.count(1.0)
    monkeypatch.setattr(robustness, "run_one", lambda *_: {"norms": [next(norms)]})
    out = tmp_path / "cells.json"
    words = with_defences(out, "FedAvg", "FedAvg, norm clipped", "FedMedian")
    robustness.main([*words, "--seeds", "3", "4"])
    robustness.main([*words, "--seeds", "3", "4"])
    found = json.loads(out.read_text())
    of_seed = {seed: found[f"FedAvg/none/1/{seed}"]["norms"][0] for seed in (3, 4)}
    assert of_seed == {3: 1.0, 4: 7.0}  # three defences with and without an attack, seed by seed
    for (seed, norm), attack in itertools.product(of_seed.items(), ("none", "noise")):
        clipped = found[f"FedAvg, norm clipped/{attack}/1/{seed}"]["config"]
        assert clipped["strategy.max-update-norm"] == norm
    found["FedAvg/none/1/4"]["norms"] = [9.0]
    out.write_text(json.dumps(found))
    text = refusal(robustness, *words, "--seeds", 3, 4)
    assert "FedAvg, norm clipped/none/1/4 was made with strategy.max-update-norm=7.0" in text


def test_without_honest_norms_nothing_is_clipped_or_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(robustness, "run_one", lambda *_: pytest.fail("a run without a bound"))
    text = refusal(robustness, *with_defences(tmp_path / "cells.json", "FedAvg, norm clipped"))
    assert "bounds on the norm follow from the cell of FedAvg without an attack" in text
    assert text.endswith("got 'FedAvg/none/1/0'; name FedAvg in --defences, too")


def test_columns_of_one_table_differ_by_the_attack_alone(tmp_path, monkeypatch):
    ran = []

    def run_one(told, malicious, _):
        ran.append((told["strategy.arguments"], malicious.attack, malicious.num_malicious))
        return {"exact_match": {"tuned": 0.0, "proxy": len(ran) / 100}, "norms": []}

    monkeypatch.setattr(robustness, "run_one", run_one)
    words = with_defences(tmp_path / "cells.json", "Krum")
    words[words.index("0.125") : words.index("0.125") + 1] = ["0.125", "0.25"]
    robustness.main(words)
    one, two = "num-malicious-nodes = 1", "num-malicious-nodes = 2"
    assert ran == [(one, "", 0), (one, "noise", 1), (two, "", 0), (two, "noise", 2)]
    text = robustness.render(json.loads((tmp_path / "cells.json").read_text()), 8)
    assert [line for line in text.splitlines() if line.startswith("| Krum")] == [
        "| Krum | 0.0 / 1.0 | 0.0 / 2.0 |",
        "| Krum | 0.0 / 3.0 | 0.0 / 4.0 |",
    ]


def test_a_measurement_of_bytes_is_taken_again_with_its_own_config_alone(tmp_path):
    line = wire.LINES[0]
    name = "all_weights-4-0.003-0.json"
    config = wire.config_of(4, line, 0.003, 0) | {"devices": wire.DEVICES, "ranks": []}
    write_json(tmp_path / name, {"config": config, "up": 7})
    assert wire.run(tmp_path, 4, line, 0.003, 0)["up"] == 7
    write_json(tmp_path / name, {"config": config | {"train.max-steps": 21}, "up": 7})
    with pytest.raises(ConfigError, match=f"the cell {name} was made with train.max-steps=21"):
        wire.run(tmp_path, 4, line, 0.003, 0)
    write_json(tmp_path / name, {"up": 7})  # as an older version left it
    with pytest.raises(ConfigError, match=f"the cell {name} was made with"):
        wire.run(tmp_path, 4, line, 0.003, 0)


def test_a_table_of_epsilons_goes_on_with_its_own_config_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(privacy, "run_one", lambda *_: {"exact_match": {}, "privacy": None})
    words = ["--out", tmp_path / "cells.json", "--devices", 8, "--epsilons", "inf", "--seeds", 0]
    privacy.main(list(map(str, words)))
    privacy.main(list(map(str, words)))
    assert "8/inf/0 was made with strategy.max-update-norm=0.5" in refusal(privacy, *words, "--clip", 2.0)
    assert "8/inf/0 was made with scoring.num-items=112" in refusal(privacy, *words, "--items", 8)


def test_lengths_of_noise_are_plain_numbers():
    # 3.276 * sqrt(104,688) is 1060: over 8 devices 132, over 10,000 0.106, each in two digits
    table = privacy.ratios([104_688], [8, 10_000], [4], 8)
    assert table.splitlines()[-1] == "| 104,688 | 4 | 3.276 | 130 | 0.11 |"


@pytest.mark.parametrize(("devices", "words"), [(2, "2 devices begin needs 3"), (257, "has at most 256 devices")])
def test_a_secure_sum_of_too_few_or_too_many_devices_ends_in_a_sentence(devices, words):
    assert words in refusal(secure_sum, "--devices", devices, "--weights", 1)


@pytest.mark.slow
def test_a_quick_run_writes_every_figure_and_no_row_differs(tmp_path):
    command = [sys.executable, "decoding.py", "--quick", "--dtypes", "float32", "--json", str(tmp_path / "found.json")]
    output = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=False)
    assert output.returncode == 0, output.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found) == {"machine", "options", "goals", "skipped", "results"}
    assert set(found["results"]) == {"llama", "gpt2"}
    llama, gpt2 = (found["results"][family]["float32"] for family in ("llama", "gpt2"))
    assert set(llama) == {"batch1", "middle", "never", "adapter", "batch8", "batch32", "memory"}
    assert set(gpt2) == {"batch1", "middle", "never", "adapter", "batch8"}
    assert set(llama["memory"]) == {"large", "three models", "proxy", "LoRA pair", "small_weights"}
    drafts = {f"draft {length}" for length in (1, 2, 3, 4, 6)}
    alone = {"stock", "stock, prepared", "own plain"}
    unprepared = {"three-forward, unprepared", "adaptive, unprepared"}
    for name in ("batch1", "adapter"):
        methods = {"reference", "three-forward", "adaptive"} | drafts | alone | unprepared
        assert set(llama[name]["methods"]) == methods
    for seen in [*(llama[name] for name in llama if name != "memory"), *gpt2.values()]:
        assert {"agreement", "drafting", "bandwidth_bytes_per_s", "batch", "prompt_tokens", "new_tokens"} <= set(seen)
        for name, method in seen["methods"].items():
            assert method["tokens_per_second"] > 0
            assert method["rows_differing"] == [], name
    assert llama["never"]["agreement"] < 0.05 < llama["middle"]["agreement"] < llama["batch1"]["agreement"]
    whats = {(goal["what"], goal["family"]) for goal in found["goals"]}
    assert ("adaptive / stock generate()", "llama") in whats
    assert ("LoRA pair's / (large + 1.1 small)", "llama") in whats
    assert "goal" in output.stdout
