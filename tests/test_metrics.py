import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from fedpt_flwr.metrics.rouge_l import rouge_l
from fedpt_flwr.scoring import judge_answers, load_metric

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("exact_match", "contains_value", "right_field", "rouge_l")

# The imports take seconds, so one process makes them and then divides into three.
LOADING = """
import os, socket, sys, traceback, warnings
from pathlib import Path

import evaluate
from fedpt_flwr import scoring

def refuse(*args, **kwargs):
    raise AssertionError("a metric went to the network")

def load_and_use(load, home):
    evaluate.config.HF_MODULES_CACHE = home / "modules"
    evaluate.config.HF_METRICS_CACHE = home / "metrics"
    for name in sys.argv[3:]:
        reference = {"contains_value": "jute", "right_field": "filter"}.get(name, "filter = jute ;ok")
        result = load(name).compute(predictions=["filter = jute ;ok", "no idea"], references=[reference] * 2)
        assert result == {name: 0.5, "scores": [1, 0]}, result

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
folder, metrics = Path(sys.argv[1]), Path(sys.argv[2])
children = []
for load, home in [
    (lambda name: evaluate.load(str(metrics / name / f"{name}.py")), folder / "home"),
    (scoring.load_metric, folder / "home"),
    (scoring.load_metric, folder / "file"),
]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of a fork where there are threads
        child = os.fork()
    if child == 0:
        try:
            load_and_use(load, home)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    children.append(child)
sys.exit(sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))
"""


@pytest.mark.slow
def test_metrics_load_without_network_in_two_processes_at_once_and_with_a_home_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        LOADING,
        str(tmp_path),
        str(ROOT / "fedpt_flwr" / "metrics"),
        *NAMES,
    ]
    outcome = subprocess.run(command, env=environment, cwd=tmp_path, text=True, capture_output=True, timeout=200)
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (0, "", "")
    copies = [path.name for path in (tmp_path / "home").rglob("exact_match.py")]
    assert len(copies) == 1, "the two processes should have shared one copy"


@pytest.mark.parametrize(
    ("prediction", "reference", "pattern", "right"),
    [
        ("filter = jute ;ok", "filter = jute ;ok", "", 1),
        ("  filter =  jute ;ok\n", "filter = jute ;ok", "", 1),
        ("filter = jute ;ok done", "filter = jute ;ok", "", 0),
        ("filter = Jute ;ok", "filter = jute ;ok", "", 0),
        ("", "filter = jute ;ok", "", 0),
        ("so 6 * 3 #### 1,018.0", "it is #### 1018", "#### (.+)", 1),
        ("so it is 1018", "it is #### 1018", "#### (.+)", 0),  # nothing to extract
        ("#### 18", "18", "#### (.+)", 0),  # a reference without an answer matches nothing
    ],
)
def test_exact_match_compares_what_counts_of_an_answer(prediction, reference, pattern, right):
    metric = load_metric("exact_match")
    result = metric.compute(predictions=[prediction], references=[reference], answer_pattern=pattern)
    assert result == {"exact_match": right, "scores": [right]}


@pytest.mark.parametrize(
    ("prediction", "value", "right"),
    [
        ("filter = jute ;ok", "jute", 1),
        ("colour = red\nfilter = jute, or so", "jute", 1),
        ("filter = felt ;ok", "jute", 0),
        ("a cloak", "oak", 0),
        ("semi-oak", "oak", 0),
        ("it is oak.", "oak", 1),
        ("two  words", "two words", 1),
        ("3.5 kg", "5", 0),
        ("3.5 kg", "3", 0),
        ("3.5 kg", "3.5", 1),
        ("1,500 W", "500", 0),
        ("-5 C", "5", 0),
        ("a+b (c)", "(c)", 1),
        ("anything", "", 0),
    ],
)
def test_contains_value_finds_the_value_as_a_whole(prediction, value, right):
    result = load_metric("contains_value").compute(predictions=[prediction], references=[value])
    assert result == {"contains_value": right, "scores": [right]}


@pytest.mark.parametrize(
    ("prediction", "field", "right"),
    [
        ("filter = felt ;ok", "filter", 1),
        (" filter = jute = felt", "filter", 1),
        ("the filter = jute", "filter", 0),
        ("colour = red", "filter", 0),
        ("filter", "filter", 0),
        ("filter=jute", "filter", 0),
    ],
)
def test_right_field_looks_only_at_what_stands_before_the_value(prediction, field, right):
    result = load_metric("right_field").compute(predictions=[prediction], references=[field])
    assert result == {"right_field": right, "scores": [right]}


def test_means_are_means_of_the_scores():
    result = load_metric("exact_match").compute(predictions=["a", "b", "c"], references=["a", "b", "d"])
    assert result == {"exact_match": 2 / 3, "scores": [1, 1, 0]}


def test_an_answer_from_which_nothing_can_be_extracted_is_invalid_and_wrong():
    answers = ["#### 4", "#### 5", "four", ""]
    judged = judge_answers(answers, ["#### 4"] * 4, answer_pattern="#### (.+)")
    assert judged["exact_match"].tolist() == [1, 0, 0, 0]
    assert judged["invalid_rate"].tolist() == [0, 0, 1, 1]
    assert judge_answers(["four", " "], ["four", "four"])["invalid_rate"].tolist() == [0, 1]


def test_values_and_fields_are_judged_only_where_they_are_given():
    answers, right = ["filter = felt ;ok"], ["filter = jute ;ok"]
    assert set(judge_answers(answers, right)) == {"exact_match", "invalid_rate"}
    judged = judge_answers(answers, right, values=["jute"], fields=["filter"])
    assert {name: marks.tolist() for name, marks in judged.items()} == {
        "exact_match": [0],
        "contains_value": [0],
        "right_field": [1],
        "invalid_rate": [0],
    }


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("the cat sat", "the cat sat", 1),
        ("The CAT, sat!", "the cat sat", 1),
        ("sat cat the", "the cat sat", 1 / 3),  # one word in the same order, of three and three
        ("the dog sat down", "the cat sat", 4 / 7),  # P = 2/4, R = 2/3, F = 2 P R / (P + R)
        ("a b a b a", "b a b", 3 / 4),  # P = 3/5, R = 1
        ("", "the cat sat", 0),
        ("the cat sat", "", 0),
        ("...", "!", 0),
        ("x2 1,000", "x2 1 000", 1),  # words are runs of letters and digits
    ],
)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(prediction, reference, score):
    result = load_metric("rouge_l").compute(predictions=[prediction], references=[reference])
    assert result["scores"] == [pytest.approx(score)]


def longest_common(first, second):
    """The usual table."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for place, other in enumerate(second, 1):
            diagonal, row[place] = row[place], diagonal + 1 if word == other else max(row[place], row[place - 1])
    return row[-1]


def some_texts(number, seed):
    """Pairs of texts of few different words, so that many ways lead to a common subsequence."""
    rng = random.Random(seed)
    return [tuple(" ".join(rng.choices("abcdef", k=rng.randint(0, 90))) for _ in range(2)) for _ in range(number)]


def test_rouge_l_finds_the_length_that_the_usual_table_has():
    for first, second in some_texts(60, seed=0):
        words = first.split(), second.split()
        assert rouge_l._longest_common(*words) == longest_common(*words), (first, second)


@pytest.mark.slow  # the other package takes seconds to import
def test_rouge_l_gives_what_the_package_rouge_score_gives():
    scorer = pytest.importorskip(
        "rouge_score.rouge_scorer", reason="rouge-score is not installed: pip install -e '.[lm-eval]'"
    )
    texts = [*some_texts(100, seed=1), ("What's a naïve test-case? 3.50!", "a NAIVE test case: 3.5"), ("", "x")]
    judge = scorer.RougeScorer(["rougeL"])
    predictions, references = zip(*texts, strict=True)
    ours = load_metric("rouge_l").compute(predictions=list(predictions), references=list(references))["scores"]
    theirs = [judge.score(reference, prediction)["rougeL"].fmeasure for prediction, reference in texts]
    assert ours == pytest.approx(theirs)
