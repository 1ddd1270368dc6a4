import math
import string
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import fedpt_demo_world
from fedpt_flwr.config import (
    CHOICE_LENGTHS,
    DISTILLATION_MODES,
    DP_MODES,
    INNER_STRATEGIES,
    NEED_SINGLE_UPDATES,
    SAMPLINGS,
    SCORED_ROWS,
    RunConfig,
    ScoringConfig,
    StrategyConfig,
    examine_run_config,
    flat_values,
    parse_run_config,
    settings,
    settings_markdown,
    toml_of,
)
from fedpt_flwr.errors import ConfigError

PROJECT = Path(__file__).parents[1]


def keys_of_pyproject():
    """The keys of ``[tool.flwr.app.config]`` as Flower flattens them."""
    table = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]
    flat = {}

    def walk(part, prefix):
        for key, value in part.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value

    walk(table, "")
    return flat


def sentence(**wrong):
    """The error's text for the keys given; ``__`` stands for a dot and ``_`` for a dash."""
    return complaint({key.replace("__", ".").replace("_", "-"): value for key, value in wrong.items()})


def complaint(flat):
    with pytest.raises(ConfigError) as raised:
        parse_run_config(flat)
    return str(raised.value)


# --- the two lists ---


def test_an_address_that_may_hold_a_key_is_not_shown():
    for address in ("http://user:sk-other@host", "https://host/v1?api_key=sk-other", "https://host/v1#sk-other"):
        with pytest.raises(ConfigError, match="hold no key; give the key in FEDPT_LARGE_API_KEY") as raised:
            parse_run_config({"model.large-url": address})
        assert "sk-" not in str(raised.value)


def test_pyproject_and_settings_list_the_same_keys_with_the_same_types_and_defaults():
    in_pyproject = keys_of_pyproject()
    in_code = {key: setting.default for key, setting in settings().items()}
    assert in_pyproject == in_code
    assert all(is_of_kind(value, settings()[key].kind) for key, value in in_pyproject.items())


def is_of_kind(value, kind):
    """Exactly of it: neither a whole number for a number, nor true for a whole number."""
    return type(value) in (get_args(kind) or (kind,))


def test_every_default_is_of_the_type_of_its_setting_and_every_setting_is_explained():
    for setting in settings().values():
        assert is_of_kind(setting.default, setting.kind), setting.key
        assert setting.doc.endswith("."), setting.key
        assert (setting.holds is None) == (setting.rule == ""), setting.key


def test_defaults_parse_and_nothing_given_means_the_defaults():
    assert parse_run_config({}) == parse_run_config(keys_of_pyproject()) == RunConfig()


def test_the_documentation_holds_the_table_of_all_keys_as_the_code_has_it():
    text = (PROJECT / "docs" / "run-config.md").read_text(encoding="utf-8")
    assert settings_markdown().strip() in text


def test_the_table_has_one_row_of_four_cells_for_each_key():
    rows = [line for line in settings_markdown().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(settings())
    assert all(row.replace("\\|", "").count("|") == 5 for row in rows)


# --- what is accepted ---

WORDS = st.text(string.ascii_letters + string.digits + " {}#:\n", min_size=1, max_size=20).filter(str.strip)
SOURCES = st.sampled_from(["demo:train", "gpt2", "owner/name", "owner/name:config", "/data/train.jsonl", "/data"])
VALID = {
    "model.small": SOURCES,
    "model.large": SOURCES,
    "model.large-dtype": st.sampled_from(["float32", "bfloat16", "float16"]),
    "model.large-device-map": st.sampled_from(["", "auto", '{"": "cpu"}']),
    "model.large-max-memory": st.sampled_from(["", '{"cpu": "1GiB"}']),
    "model.large-offload-folder": st.sampled_from(["", "/data/offload"]),
    "model.large-quantization": st.sampled_from(["", '{"load_in_8bit": true}']),
    "model.device": st.sampled_from(["auto", "cpu", "cuda", "cuda:3", "mps"]),
    "tuning.mode": st.sampled_from(["full", "lora"]),
    "tuning.lora-dropout": st.floats(0, 1, exclude_max=True),
    "tuning.lora-aggregation": st.sampled_from(["average", "frozen-a"]),  # exact goes with two strategies
    "train.schedule": st.sampled_from(["constant", "linear", "cosine"]),
    "train.learning-rate-end": st.floats(0, 1, exclude_min=True),
    "train.beta2": st.floats(0, 1, exclude_max=True),
    "train.mixed-precision": st.sampled_from(["no", "bf16", "fp16"]),
    "data.train": SOURCES,
    "data.validation": SOURCES,
    "data.test": SOURCES,
    "data.public": st.one_of(st.just(""), SOURCES),
    "data.format": st.sampled_from(["template", "auto", "instruction", "completion", "chat", "text"]),
    "data.disclose": st.sampled_from(["size", "groups"]),
    "data.partitioner": st.sampled_from(["natural", "dirichlet", "iid", "node-local"]),
    "data.holdout-fraction": st.floats(0, 0.5, exclude_min=True, exclude_max=True),
    "fraction-train": st.floats(0, 1, exclude_min=True),
    "output-dir": st.sampled_from(["", "/data/runs"]),
    "threads.device": st.integers(1, 1024),
    "threads.server": st.integers(1, 1024),
    "seed": st.integers(0, 2**32 - 1),
    "proxy.alpha": st.floats(allow_nan=False, allow_infinity=False),
    "proxy.plausibility": st.floats(0, 1, exclude_max=True),
    "scoring.choice-length": st.sampled_from(CHOICE_LENGTHS),
    "scoring.loss-alpha": st.floats(allow_nan=False, allow_infinity=False),
    "privacy.secure-sum": st.just(False),
    "privacy.secure-sum-threshold": st.floats(0.5, 1, exclude_min=True),
    "privacy.secure-sum-range": st.floats(1e-9, 1e6),
    "privacy.noise-multiplier": st.floats(1e-3, 1e6),
    "privacy.clipping-norm": st.floats(1e-6, 1e6),
    "privacy.clipping-rate": st.floats(0, 10, exclude_min=True),
    "privacy.secure-sum-bits": st.sampled_from([16, 32]),
    "strategy.name": st.sampled_from(INNER_STRATEGIES),
    "strategy.above-norm": st.sampled_from(["clip", "refuse"]),
    "privacy.clipped-share": st.floats(0, 1, exclude_min=True, exclude_max=True),
    "privacy.delta": st.floats(0, 1, exclude_min=True, exclude_max=True),
    "privacy.sampling": st.just(SAMPLINGS[0]),
    "privacy.max-epsilon": st.just(0.0),
    "strategy.arguments": st.sampled_from(["", "eta = 0.01", "eta = 1, tau = 1e-3, name = 'a, b'"]),
    # So that no draw contradicts another one.
    "privacy.dp": st.just("off"),
    "train.max-steps": st.integers(1, 10**6),
    "min-devices": st.integers(2, 100),
    "min-replies": st.integers(1, 2),
    "model.small-dtype": st.just("float32"),
    "wire.dtype": st.sampled_from(["float32", "float16", "bfloat16", "int8"]),
    "model.large-url": st.sampled_from(["", "http://127.0.0.1:8000", "https://api.example.org/v1"]),
    "remote.api": st.sampled_from(["auto", "full", "echo", "next"]),
    "remote.hidden": st.sampled_from(["auto", "restrict", "fill"]),
    "remote.cache": st.sampled_from(["", "off", "/data/remote"]),
    "data.prompts": SOURCES,
    "distillation.mode": st.sampled_from([mode for mode in DISTILLATION_MODES if mode != "paired"]),
    "distillation.direction": st.sampled_from(["forward", "reverse"]),
    "scoring.rows": st.sampled_from(["tuned", "large,proxy", " proxy , tuned,"]),
    "data.choices": st.just(""),
    "stop.metric": st.just(""),
    "stop.target": st.just(0.0),
    "stop.patience": st.just(0),
}
BY_KIND = {
    bool: st.booleans(),
    int: st.integers(2, 10**6),
    float: st.floats(1e-300, 1e300),
    str: WORDS,
}


@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs"])))
@example('/tmp/\N{GRINNING FACE}/pair\x7f\x00\\"')
def test_keys_as_toml_are_read_as_they_were(text):
    keys = {"model.small": text, "seed": 3, "proxy.alpha": 0.5, "resume": True}
    assert tomllib.loads(toml_of(keys)) == keys


@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.fixed_dictionaries({}, optional={k: VALID[k] if k in VALID else BY_KIND[s.kind] for k, s in settings().items()})
)
def test_a_config_as_flat_values_is_what_it_was_parsed_from(given_values):
    config = parse_run_config(given_values)
    values = flat_values(config)
    assert values == {key: setting.default for key, setting in settings().items()} | given_values
    assert all(is_of_kind(values[key], setting.kind) for key, setting in settings().items())
    assert parse_run_config(values) == config


def test_a_whole_number_is_accepted_for_a_number_and_becomes_one():
    alpha = parse_run_config({"proxy.alpha": 1}).proxy.alpha
    assert (alpha, type(alpha)) == (1.0, float)


@pytest.mark.parametrize("alpha", [0.5, -3.0, 0.0, "auto"])
def test_the_strength_is_a_number_or_left_to_the_run(alpha):
    config = parse_run_config({"proxy.alpha": alpha})
    assert config.proxy.alpha == alpha
    assert parse_run_config(flat_values(config)) == config


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ("large,untuned,tuned,proxy", SCORED_ROWS),
        ("tuned", ("tuned",)),
        (" proxy , large ", ("large", "proxy")),  # in the order of the table
        ("tuned,tuned,", ("tuned",)),
    ],
)
def test_rows_to_score_are_names_separated_by_commas(rows, names):
    assert parse_run_config({"scoring.rows": rows}).scoring.row_names() == names
    assert ScoringConfig(rows=rows).row_names() == names


@pytest.mark.parametrize("key", ["model.small", "model.large", "data.train", "data.public"])
@pytest.mark.parametrize(
    "value", ["owner/name", "gpt2", "owner/name:config", "demo:train", "/abs/file.jsonl", "own-er/na.me_1.5b"]
)
def test_hub_ids_demo_names_and_absolute_paths_are_accepted(key, value):
    assert flat_values(parse_run_config({key: value}))[key] == value


@pytest.mark.parametrize("key", ["data.template", "data.public-template"])
def test_a_backslash_and_an_n_in_a_template_are_a_line_break_whatever_the_quotes(key):
    # What `-c` hands over for "a\nb" in TOML's two kinds of quotes.
    double, single = (tomllib.loads(text)["x"] for text in ('x = "{a}\\nb"', "x = '{a}\\nb'"))
    assert double != single
    read = [flat_values(parse_run_config({key: value}))[key] for value in (double, single)]
    assert read == ["{a}\nb", "{a}\nb"]


def test_a_backslash_elsewhere_stays():
    assert parse_run_config({"data.answer-pattern": r"#\n(\d+)"}).data.answer_pattern == r"#\n(\d+)"


# --- what is refused ---


@pytest.mark.parametrize("key", ["output-dir", "remote.cache", "model.large-offload-folder", "model.small"])
def test_a_path_of_nobodys_home_is_refused_like_any_relative_one(key):
    with pytest.raises(ConfigError, match=rf"{key}: must be an absolute path.* got '~nosuchuser/x'"):
        parse_run_config({key: "~nosuchuser/x"})


@pytest.mark.parametrize("key", ["output-dir", "remote.cache", "model.large-offload-folder"])
def test_what_can_be_nothing_but_a_path_must_be_absolute_whatever_it_looks_like(key):
    for value in ("answers", "owner/name"):
        with pytest.raises(ConfigError, match=rf"{key}: must be an absolute path"):
            parse_run_config({key: value})
    assert flat_values(parse_run_config({key: ""}))[key] == ""
    assert parse_run_config({"remote.cache": "off"}).remote.cache == "off"


@pytest.mark.parametrize("key", ["train.learning-rate", "proxy.alpha", "remote.price-sent"])
def test_an_integer_beyond_all_floats_is_refused(key):
    with pytest.raises(ConfigError, match=rf"{key}: must be a finite number"):
        parse_run_config({key: 10**400})


def test_json_nested_without_end_is_refused():
    with pytest.raises(ConfigError, match="model.large-quantization: must be empty or a JSON object"):
        parse_run_config({"model.large-quantization": '{"a":' * 100_000})


def test_an_unknown_key_gets_the_nearest_one_as_a_suggestion():
    assert sentence(train__batchsize=4) == "train.batchsize: is not a key of this app; did you mean train.batch-size?"


def test_an_unknown_key_with_nothing_near_it_points_to_the_documentation():
    assert sentence(zzz=4) == "zzz: is not a key of this app; all keys are in docs/run-config.md"


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("seed", "0", "must be a whole number, got '0'"),
        ("seed", 1.0, "must be a whole number, got 1.0"),
        ("seed", True, "must be a whole number, got True"),
        ("proxy.alpha", True, "must be a finite number or 'auto', got True"),
        ("proxy.alpha", False, "must be a finite number or 'auto', got False"),
        ("proxy.alpha", "1", "must be a finite number or 'auto', got '1'"),
        ("proxy.alpha", "Auto", "must be a finite number or 'auto', got 'Auto'"),
        ("proxy.alpha", "", "must be a finite number or 'auto', got ''"),
        ("proxy.alpha", math.nan, "must be a finite number, got nan"),
        ("scoring.loss-alpha", "auto", "must be a number, got 'auto'"),
        ("scoring.loss-alpha", True, "must be a number, got True"),
        ("scoring.rows", "", "must be some of large, untuned, tuned and proxy, separated by commas, got ''"),
        ("scoring.rows", " , ", "must be some of large, untuned, tuned and proxy, separated by commas, got ' , '"),
        (
            "scoring.rows",
            "tuned,device",
            "must be some of large, untuned, tuned and proxy, separated by commas, got 'tuned,device'",
        ),
        ("distillation.mode", "on", "must be one of off, final, carry, paired, paper, got 'on'"),
        ("distillation.steps", 0, "must be at least 1, got 0"),
        ("distillation.temperature", 0.0, "must be greater than 0, got 0.0"),
        ("distillation.gamma", -1.0, "must be at least 0, got -1.0"),
        ("distillation.num-prompts", -1, "must be at least 0, got -1"),
        ("stop.patience", 1.5, "must be a whole number, got 1.5"),
        ("proxy.alpha", math.inf, "must be a finite number, got inf"),
        ("train.learning-rate", -math.inf, "must be a finite number, got -inf"),
        ("round-timeout-s", math.inf, "must be a finite number, got inf"),
        ("train.gradient-checkpointing", 1, "must be true or false, got 1"),
        ("train.gradient-checkpointing", "true", "must be true or false, got 'true'"),
        ("tuning.mode", 1, "must be a text, got 1"),
        ("tuning.mode", False, "must be a text, got False"),
        ("tuning.mode", "Lora", "must be one of full, lora, got 'Lora'"),
        ("model.device", "gpu", "must be auto, cpu, cuda, cuda:<number> or mps, got 'gpu'"),
        ("model.device", "cuda:", "must be auto, cpu, cuda, cuda:<number> or mps, got 'cuda:'"),
        ("num-server-rounds", 0, "must be at least 1, got 0"),
        ("num-server-rounds", 2**63, f"must be a whole number of at most 63 bits, got {2**63}"),
        ("seed", -(2**63), f"must be a whole number of at most 63 bits, got {-(2**63)}"),
        ("threads.device", 1025, "must be from 1 to 1024, got 1025"),
        ("threads.server", 0, "must be from 1 to 1024, got 0"),
        ("keep-rounds", -1, "must be at least 0, got -1"),
        ("fraction-train", 0.0, "must be greater than 0 and at most 1, got 0.0"),
        ("fraction-train", 1.01, "must be greater than 0 and at most 1, got 1.01"),
        ("train.learning-rate", 0, "must be greater than 0, got 0"),
        ("train.learning-rate-end", 0.0, "must be greater than 0 and at most 1, got 0.0"),
        ("train.beta2", 1.0, "must be at least 0 and below 1, got 1.0"),
        ("train.max-length", 1, "must be at least 2, got 1"),
        ("data.holdout-fraction", 0.5, "must be greater than 0 and below 0.5, got 0.5"),
        ("seed", -1, "must be from 0 to 4294967295, got -1"),
        ("seed", 2**32, "must be from 0 to 4294967295, got 4294967296"),
        ("model.small", "  ", "must not be empty, got '  '"),
        ("data.answer-field", "", "must not be empty, got ''"),
    ],
)
def test_a_wrong_value_is_reported_with_key_rule_and_value(key, value, rule):
    assert complaint({key: value}) == f"{key}: {rule}"


@pytest.mark.parametrize("key", ["model.small", "model.large", "data.train", "data.validation", "data.test"])
@pytest.mark.parametrize("value", ["./models/a", "../a", "~/a", "a/b/c", "train.jsonl", "data/train.csv", "a/b.txt"])
def test_a_relative_path_is_refused_with_the_line_to_type(tmp_path, monkeypatch, key, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = (tmp_path / value.removeprefix("~/")).resolve()
    assert complaint({key: value}) == (
        f"{key}: must be an absolute path, because Flower's processes run in other folders, got {value!r}; "
        f"type {key}='{expected}'"
    )


@pytest.mark.parametrize("value", ["runs", "my/runs", "./runs"])
def test_an_output_dir_is_always_a_path_and_must_be_absolute(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    assert f"type output-dir='{(tmp_path / value).resolve()}'" in complaint({"output-dir": value})


def test_all_that_is_wrong_is_reported_at_once():
    lines = complaint(
        {
            "train.batch-siez": 4,
            "seed": "x",
            "proxy.alpha": math.nan,
            "num-server-rounds": 0,
            "data.train": "./train.jsonl",
            "train.epochs": 0,
            "train.max-steps": 0,
        }
    ).splitlines()
    assert lines[0] == "6 settings of the run config are wrong"
    assert [line.split(":")[0] for line in lines[1:]] == [
        "  - train.batch-siez",
        "  - num-server-rounds",
        "  - seed",
        "  - data.train",
        "  - proxy.alpha",
        "  - train.epochs and train.max-steps",
    ]


@pytest.mark.parametrize(
    ("flat", "words"),
    [
        ({"train.max-steps": 0}, ["train.epochs and train.max-steps", "must not both be 0"]),
        ({"min-devices": 3, "min-replies": 4}, ["min-replies must not exceed min-devices", "4 > 3", "to 4"]),
        ({"data.group-field": ""}, ["data.group-field", "partitioner natural needs a group field"]),
        ({"data.group-field": "", "data.partitioner": "dirichlet"}, ["partitioner dirichlet needs a group field"]),
        ({"data.partitioner": "node-local", "data.test": ""}, ["data.test", "cannot be held out of data.train"]),
        (
            {"data.partitioner": "node-local", "data.validation": ""},
            ["data.validation", "set data.validation to a file of the server"],
        ),
        (
            {"train.fedprox-mu": 0.1, "strategy.arguments": "proximal_mu = 0.2"},
            ["train.fedprox-mu and strategy.arguments", "mu is given twice", "0.1 and 0.2"],
        ),
        (
            {"train.fedprox-mu": 0.1, "strategy.arguments": "proximal-mu = 0.2"},
            ["train.fedprox-mu and strategy.arguments", "mu is given twice"],
        ),
        ({"strategy.arguments": "eta 0.1"}, ["strategy.arguments", "`name = value` pairs", "'eta 0.1'", "for example"]),
        ({"strategy.arguments": "eta = 0.1\ntau = 1"}, ["strategy.arguments", "`name = value` pairs"]),
        ({"data.train": ""}, ["data.train", "must not be empty", "node-local"]),
        (
            {"data.prompts": "", "data.public": ""},
            [
                "distillation.mode and data.prompts",
                "needs public prompts (data.prompts) or public texts (data.public)",
                "got 'final'",
                "distillation.mode='off'",
            ],
        ),
        (
            {"distillation.mode": "paired", "tuning.mode": "lora"},
            [
                "distillation.mode and tuning.mode",
                "an adapter is on one of them",
                "mode='carry', or tuning.mode='full'",
            ],
        ),
        (
            {"proxy.alpha": "auto", "proxy.plausibility": 0.1},
            ["proxy.alpha and proxy.plausibility", "the mask is chosen too", "got 0.1", "or give both"],
        ),
        (
            {"tuning.mode": "lora", "tuning.lora-aggregation": "exact", "strategy.name": "FedAdam"},
            [
                "tuning.lora-aggregation and strategy.name",
                "in new directions after every round",
                "got 'FedAdam'",
                "set strategy.name='FedAvg', or tuning.lora-aggregation='frozen-a'",
            ],
        ),
        (
            {"tuning.mode": "lora", "tuning.lora-aggregation": "exact", "distillation.mode": "carry"},
            ["tuning.lora-aggregation and distillation.mode", "got 'carry'", "set distillation.mode='final'"],
        ),
        ({"stop.target": 0.9}, ["stop.metric", "a target or patience needs a metric", "exact_match"]),
        ({"stop.patience": 2}, ["stop.metric", "a target or patience needs a metric", "loss"]),
        (
            {"stop.metric": "exact_match", "stop.target": 1.5},
            ["stop.metric and stop.target", "no run can reach a target above 1", "1.5"],
        ),
        ({"stop.metric": "loss"}, ["stop.metric and stop.target", "a metric needs a target or patience", "'loss'"]),
        (
            {"stop.metric": "loss", "stop.patience": 2, "scoring.round-items": 0},
            ["stop.metric and scoring.round-items", "rounds must be scored to decide when to end", "got 0"],
        ),
        (
            {"privacy.dp": "server-fixed", "strategy.name": "FedMedian"},
            ["privacy.dp and strategy.name", "the plain mean of equal weights alone", "'FedMedian'", "'FedAvg'"],
        ),
        (
            {"privacy.dp": "server-fixed", "strategy.name": "FedAdam"},
            ["privacy.dp and strategy.name", "or privacy.dp='off'"],
        ),
        (
            {"privacy.dp": "server-fixed", "strategy.max-update-norm": 2.0},
            ["privacy.dp and strategy.max-update-norm", "clipped to privacy.clipping-norm already", "got 2.0"],
        ),
        (
            {"privacy.dp": "server-fixed", "privacy.sampling": "poisson"},
            [
                "privacy.sampling",
                "no amplification holds here",
                "follows from the seed",
                "got 'poisson'",
                "leave it out",
            ],
        ),
        ({"privacy.sampling": "without-replacement"}, ["privacy.sampling", "no amplification holds here"]),
        (
            {"privacy.max-epsilon": 8.0},
            [
                "privacy.dp and privacy.max-epsilon",
                "a run without noise keeps no budget",
                "got 8.0",
                "set privacy.dp='server-fixed', say",
            ],
        ),
        (
            {"privacy.dp": "client-adaptive", "wire.dtype": "bfloat16"},
            ["privacy.dp and wire.dtype", "clips its change as it is sent, in float32", "privacy.dp='server-adaptive'"],
        ),
        (
            {"privacy.dp": "server-fixed", "tuning.mode": "lora", "tuning.lora-aggregation": "exact"},
            ["privacy.dp and tuning.lora-aggregation", "this one averages products", "'frozen-a'"],
        ),
        (
            {"privacy.dp": "server-fixed", "data.validation": ""},
            ["privacy.dp and data.validation", "held out of data.train", "private text that the server reads"],
        ),
        (
            {"privacy.dp": "server-fixed", "data.test": "", "data.validation": "demo:validation"},
            ["privacy.dp and data.test", "set data.test to a file of the server"],
        ),
        (
            {"privacy.dp": "server-fixed", "data.public": "demo:train"},
            ["privacy.dp and data.public", "must not be the devices' text", "got 'demo:train'"],
        ),
        (
            {"privacy.dp": "server-fixed", "data.train": "/d/t.jsonl", "data.validation": "/d/../d/t.jsonl"},
            ["privacy.dp and data.validation", "must not be the devices' text"],
        ),
        (
            {
                "privacy.dp": "server-fixed",
                "data.test": "owner/name",
                "data.train": "owner/name",
                "data.test-split": "train",
            },
            ["privacy.dp and data.test", "must not be the devices' text"],
        ),
        (
            {"privacy.dp": "server-fixed", "data.choices": "/d/t.jsonl", "data.train": "/d/t.jsonl"},
            ["privacy.dp and data.choices", "are the devices' text"],
        ),
        (
            {"privacy.dp": "server-fixed", "privacy.secure-sum": True, "min-devices": 3},
            ["privacy.secure-sum and privacy.dp", "a secure sum shows none of them", "set one of the two"],
        ),
        (
            {"strategy.max-update-norm": 2.0, "privacy.secure-sum": True, "min-devices": 3},
            ["privacy.secure-sum and strategy.max-update-norm", "cannot be seen in a secure sum"],
        ),
        (
            {"privacy.dp": "server-fixed", "data.choices": "test,train"},
            ["privacy.dp and data.choices", "answers found in data.train are the devices' text", "data.choices='test'"],
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(flat, words):
    text = complaint(flat)
    assert len(text.splitlines()) == 1
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    "flat",
    [
        {"train.max-steps": 0, "train.epochs": 1},
        {"privacy.dp": "server-fixed", "data.train": "owner/name", "data.test": "owner/name"},
        {"min-devices": 3, "min-replies": 3},
        {"data.group-field": "", "data.partitioner": "iid"},
        {"data.group-field": "", "data.partitioner": "node-local"},
        {"data.train": "", "data.partitioner": "node-local"},
        {"data.validation": "", "data.test": ""},
        {"train.fedprox-mu": 0.0, "strategy.arguments": "proximal_mu = 0.2"},
        {"data.prompts": "", "data.public": "", "distillation.mode": "off"},
        {"data.prompts": "", "distillation.mode": "carry"},
        {"data.public": "", "distillation.mode": "paper"},
        {"distillation.mode": "carry", "tuning.mode": "lora"},
        {"tuning.lora-aggregation": "exact", "strategy.name": "FedAdam"},  # no adapter is tuned
        {"tuning.mode": "lora", "tuning.lora-aggregation": "exact", "strategy.name": "FedProx"},
        {"tuning.mode": "lora", "tuning.lora-aggregation": "exact", "distillation.mode": "paper"},
        {
            "tuning.mode": "lora",
            "tuning.lora-aggregation": "frozen-a",
            "strategy.name": "Krum",
            "distillation.mode": "carry",
        },
        {"distillation.mode": "paired", "tuning.mode": "full"},
        {"stop.metric": "exact_match", "stop.target": 1.0},
        {"stop.metric": "loss", "stop.target": 1.5},
        {"stop.metric": "loss", "stop.patience": 1},
        {"scoring.round-items": 0},
        {"proxy.alpha": "auto", "proxy.plausibility": 0.0},
        {"proxy.alpha": 0.5, "proxy.plausibility": 0.1},
    ],
)
def test_settings_at_the_border_of_a_contradiction_are_accepted(flat):
    assert isinstance(parse_run_config(flat), RunConfig)


@pytest.mark.parametrize("mode", [mode for mode in DP_MODES if mode != "off"])
def test_every_kind_of_differential_privacy_is_accepted_with_the_defaults(mode):
    privacy = parse_run_config({"privacy.dp": mode}).privacy
    assert (privacy.is_on, privacy.is_adaptive, privacy.clips_on_devices) == (
        True,
        mode.endswith("adaptive"),
        mode.startswith("client"),
    )


@pytest.fixture
def texts(tmp_path):
    """A folder with two text files, a folder in it, and links to the folder and to one of its files."""
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    for name in ("a", "b", "deeper/c"):
        (folder / f"{name}.jsonl").write_text("{}")
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "linked.jsonl").symlink_to(folder / "a.jsonl")
    return tmp_path


@pytest.mark.parametrize(
    ("train", "test", "refused"),
    [
        ("texts", "texts/a.jsonl", True),
        ("texts/a.jsonl", "texts", True),
        ("absent/a.jsonl", "absent", True),
        ("texts/a.jsonl", "link/a.jsonl", True),
        ("texts/a.jsonl", "others/linked.jsonl", True),
        ("texts", "others", True),
        ("texts/a.jsonl", "texts/b.jsonl", False),
        ("texts", "texts/deeper", False),  # of a folder, folders in it are not read
        ("texts", "texts/deeper/c.jsonl", False),
    ],
)
def test_a_private_run_knows_the_devices_text_by_other_paths(texts, train, test, refused):
    flat = {"privacy.dp": "server-fixed", "data.train": f"{texts / train}", "data.test": f"{texts / test}"}
    problems = examine_run_config(flat)[1]
    assert [problem.place for problem in problems] == ["privacy.dp and data.test"] * refused


@pytest.mark.parametrize(
    ("train", "test", "refused"),
    [
        (("demo:train", "train"), (str(Path(fedpt_demo_world.__file__).with_name("train.jsonl")), "test"), True),
        (("demo:train", "train"), ("owner/name", "train"), False),
        (("owner/name", "train"), ("owner/name", "train[:10%]"), True),
        (("owner/name", "train[10%:]+extra"), ("owner/name", "test + extra[:5]"), True),
        (("owner/name", "train"), ("owner/name", "all"), True),
        (("owner/name", "train"), ("owner/name:default", "train"), True),
        (("owner/name:de", "train"), ("owner/name:en", "train"), False),
        (("owner/name", "train"), ("owner/name", "training[:10%]"), False),
    ],
)
def test_a_private_run_knows_the_devices_text_by_other_names(train, test, refused):
    flat = {"privacy.dp": "server-fixed", "data.train": train[0], "data.test": test[0]}
    problems = examine_run_config(flat | {"data.train-split": train[1], "data.test-split": test[1]})[1]
    assert [problem.place for problem in problems] == ["privacy.dp and data.test"] * refused


def test_what_a_private_run_must_not_be_an_open_one_may():
    open_run = {"strategy.name": "Krum", "strategy.max-update-norm": 1.0, "data.validation": "", "data.test": ""}
    assert not parse_run_config(open_run | {"data.choices": "train"}).privacy.is_on


@pytest.mark.parametrize(
    ("key", "bad", "good", "rule"),
    [
        ("noise-multiplier", [0.0, 1e-200, 9e-4, 2e6, 1e300], [1e-3, 1e6], "must be from 0.001 to 1000000"),
        ("clipping-norm", [0.0, 1e-300, 1e300], [1e-6, 1e6], "must be from 0.000001 to 1000000"),
        ("clipping-rate", [0.0, 10.1, 1e5], [1e-9, 10.0], "must be greater than 0 and at most 10"),
        ("secure-sum-range", [0.0, 1e-300, 1e7], [1e-9, 1e6], "must be from 0.000000001 to 1000000"),
    ],
)
def test_numbers_of_privacy_have_bounds_within_which_they_can_be_computed_with(key, bad, good, rule):
    for value in bad:
        assert complaint({f"privacy.{key}": value}) == f"privacy.{key}: {rule}, got {value!r}"
    for value in good:
        assert parse_run_config({f"privacy.{key}": value})


def test_a_contradiction_with_a_setting_that_is_wrong_anyway_is_not_reported_twice():
    assert complaint({"min-devices": 0, "min-replies": 2}) == "min-devices: must be at least 1, got 0"


def test_strategy_arguments_keep_their_types():
    arguments = StrategyConfig(arguments="eta = 0.01, beta-1 = 9, name = 'a, b', weighted = true").parsed_arguments()
    assert arguments == {"eta": 0.01, "beta_1": 9, "name": "a, b", "weighted": True}
    assert StrategyConfig().parsed_arguments() == {}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tuning_all_weights_in_16_bits_is_refused_and_an_adapter_on_them_is_not(dtype):
    with pytest.raises(ConfigError, match=r"tuning\.mode and model\.small-dtype: .* float32"):
        parse_run_config({"model.small-dtype": dtype})
    assert parse_run_config({"model.small-dtype": dtype, "tuning.mode": "lora"})


def test_an_answer_pattern_must_compile():
    with pytest.raises(ConfigError, match=r"data\.answer-pattern: must be a valid regular expression, got '\(x'"):
        parse_run_config({"data.answer-pattern": "(x"})


def test_a_secure_sum_needs_three_devices_and_a_strategy_that_makes_a_mean():
    assert parse_run_config({"privacy.secure-sum": True, "min-devices": 3}).privacy.secure_sum
    said = complaint({"privacy.secure-sum": True})
    assert said.startswith(
        "privacy.secure-sum and min-devices: a secure sum needs three devices: each of two would have"
    )
    assert "got 2; set min-devices=3 or more" in said
    for name in INNER_STRATEGIES:
        config = {"privacy.secure-sum": True, "min-devices": 3, "strategy.name": name}
        if name not in NEED_SINGLE_UPDATES:
            assert parse_run_config(config).strategy.name == name
            continue
        said = complaint(config)
        assert (
            "privacy.secure-sum and strategy.name: this strategy compares the devices' changes with each other" in said
        )
        assert f"got '{name}'; set strategy.name='FedAvg', say, or privacy.secure-sum=false" in said


def test_what_needs_single_changes_on_the_wire_does_not_go_with_a_secure_sum():
    secure = {"privacy.secure-sum": True, "min-devices": 3}
    said = complaint(secure | {"wire.dtype": "int8"})
    assert said.startswith("privacy.secure-sum and wire.dtype: what 8 bits lose a device adds to its next change")
    said = complaint(secure | {"tuning.mode": "lora", "tuning.lora-aggregation": "exact"})
    assert said.startswith("privacy.secure-sum and tuning.lora-aggregation: exact aggregation multiplies")
    assert parse_run_config(secure | {"tuning.mode": "lora", "tuning.lora-aggregation": "frozen-a"}).privacy.secure_sum


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("threshold", 0.5, "must be greater than 0.5 and at most 1, got 0.5"),
        ("threshold", 1.01, "must be greater than 0.5 and at most 1, got 1.01"),
        ("bits", 8, "must be one of 16, 32, got 8"),
    ],
)
def test_what_a_secure_sum_is_told_is_checked(key, value, said):
    assert complaint({f"privacy.secure-sum-{key}": value}) == f"privacy.secure-sum-{key}: {said}"
