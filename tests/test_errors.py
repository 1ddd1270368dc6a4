import pickle

import pytest

from fedpt_flwr import errors
from fedpt_flwr.errors import ConfigError, DataError, FedPTError, ModelError, VocabularyMismatch


def full_error(cls=DataError):
    return cls(
        "must be a file",
        value="/tmp/x",
        place="data.train",
        remedy="check the path",
        problems=[ConfigError("must be at least 1", value=0, place="min-devices"), "a plain one"],
    )


def test_a_sentence_says_place_rule_value_and_remedy_in_this_order():
    error = DataError("must be a file", value="/tmp/x", place="data.train", remedy="check the path")
    assert str(error) == "data.train: must be a file, got '/tmp/x'; check the path"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "must hold"),
        ({"value": 0}, "must hold, got 0"),
        ({"value": ""}, "must hold, got ''"),
        ({"value": False}, "must hold, got False"),
        ({"value": None}, "must hold"),
        ({"place": "here"}, "here: must hold"),
        ({"remedy": "do this"}, "must hold; do this"),
        ({"value": "a\nb"}, r"must hold, got 'a\nb'"),
    ],
)
def test_a_sentence_leaves_out_what_was_not_given(given, sentence):
    assert str(FedPTError("must hold", **given)) == sentence


def test_a_long_value_is_cut_to_200_characters():
    shown = str(FedPTError("must hold", value="x" * 10_000)).removeprefix("must hold, got ")
    assert len(shown) == 200
    assert shown == "'" + 198 * "x" + "…"


def test_each_problem_gets_a_line_of_its_own():
    assert str(full_error()).splitlines() == [
        "data.train: must be a file, got '/tmp/x'; check the path",
        "  - min-devices: must be at least 1, got 0",
        "  - a plain one",
    ]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("cls", [FedPTError, *FedPTError.__subclasses__(), VocabularyMismatch])
def test_an_error_survives_the_way_to_another_process(cls, protocol):
    sent = full_error(cls)
    arrived = pickle.loads(pickle.dumps(sent, protocol))
    assert type(arrived) is cls
    assert (arrived.rule, arrived.value, arrived.place, arrived.remedy) == (
        "must be a file",
        "/tmp/x",
        "data.train",
        "check the path",
    )
    assert [str(problem) for problem in arrived.problems] == [str(problem) for problem in sent.problems]
    assert str(arrived) == str(sent)


def test_one_problem_stands_for_itself():
    problem = ConfigError("must be at least 1", value=0, place="min-devices")
    assert ConfigError.of([problem]) is problem


def test_several_problems_become_one_error_that_counts_them():
    error = ConfigError.of([ConfigError("a"), ConfigError("b"), ConfigError("c")])
    assert str(error) == "3 settings of the run config are wrong\n  - a\n  - b\n  - c"
    assert len(error.problems) == 3


def test_every_error_of_the_package_is_one_that_a_user_can_mend():
    found = [part for part in vars(errors).values() if isinstance(part, type) and issubclass(part, Exception)]
    assert all(issubclass(part, FedPTError) for part in found)
    assert issubclass(VocabularyMismatch, ModelError)


def test_every_error_is_drawn_in_the_tree_at_the_top_of_its_module():
    names = {part.__name__ for part in vars(errors).values() if isinstance(part, type) and issubclass(part, Exception)}
    assert all(name in errors.__doc__ for name in names)
