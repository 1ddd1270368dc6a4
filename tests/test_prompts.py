from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpt_flwr.errors import DataError
from fedpt_flwr.prompts import Example, Template, extract_answer, field_text, normalise_answer


def test_a_template_writes_fields_between_its_own_text():
    assert Template("> {request}\n[{unit}]\n").render({"request": "how far", "unit": "km", "other": None}) == (
        "> how far\n[km]\n"
    )


def test_double_braces_are_written_as_braces():
    assert Template("{{{a}}} {{b}}").render({"a": "x"}) == "{x} {b}"


def test_fields_are_named_once_in_order_of_appearance():
    assert Template("{b} {a} {b} {{c}}").fields == ("b", "a")


def test_a_template_without_fields_is_the_same_for_every_record():
    assert Template("Continue.").render({}) == "Continue."


@pytest.mark.parametrize(
    ("text", "ending"),
    [
        ("> {request}\n[{unit}]\n", "]\n"),
        ("{a}", ""),
        ("{a}b{{c}}d", "b{c}d"),
        ("{a} {a}", ""),
        ("a{{b}}", "a{b}"),
        ("", ""),
    ],
)
def test_a_templates_ending_is_its_own_text_after_its_last_field(text, ending):
    assert Template(text).ending == ending


def test_braces_inside_values_are_not_read_again():
    assert Template("{a}").render({"a": "{b}", "b": "secret"}) == "{b}"


@settings(deadline=None)
@given(st.text(alphabet="{}ab:!.[]\n"))
def test_text_whose_braces_are_doubled_is_written_as_it_was(text):
    assert Template(text.replace("{", "{{").replace("}", "}}")).render({}) == text


@pytest.mark.parametrize(
    "text", ["{a.b}", "{a[0]}", "{a.__class__}", "{a!r}", "{a:>9}", "{a:{b}}", "{}", "{:d}", "{0.real}"]
)
def test_a_placeholder_that_is_more_than_a_name_is_refused(text):
    with pytest.raises(DataError, match=r"must be a field's name in braces and nothing else, got .*; write {field}"):
        Template(text)


@pytest.mark.parametrize("text", ["{a", "a}", "{a}}", "{{a}"])
def test_a_lone_brace_is_refused_with_how_to_write_it(text):
    with pytest.raises(DataError, match=r"the template cannot be read .* as {{ and }}"):
        Template(text)


def test_a_missing_field_is_named_with_the_fields_there_are_and_the_place():
    with pytest.raises(DataError, match=r"^f\.jsonl, line 3: the record has no field 'c'; its fields are 'a', 'b'$"):
        Template("{c}").render({"a": 1, "b": 2}, place="f.jsonl, line 3")


def test_an_empty_record_is_said_to_have_no_fields():
    with pytest.raises(DataError, match="its fields are none at all"):
        Template("{c}").render({})


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_field_without_a_value_is_refused(value):
    with pytest.raises(DataError, match="line 1: the field 'a' must have a value, got none"):
        field_text({"a": value}, "a", place="line 1")


@pytest.mark.parametrize("value", [[1], {"b": 1}, (1,), {1}, b"x"])
def test_a_field_that_holds_a_container_or_bytes_is_refused(value):
    with pytest.raises(DataError, match="the field 'a' must be text or a number, got"):
        field_text({"a": value}, "a")


def test_half_of_a_surrogate_pair_is_refused_before_a_tokenizer_fails_on_it():
    with pytest.raises(DataError, match=r"valid Unicode text \(character 3 is half"):
        field_text({"a": "ok\ud800"}, "a")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (" kept as it is\n", " kept as it is\n"),
        (7, "7"),
        (-1.5, "-1.5"),
        (51.0, "51"),  # SVAMP's answers
        (1e300, "1e+300"),
        (True, "True"),
    ],
)
def test_values_are_written_as_text(value, text):
    assert field_text({"a": value}, "a") == text


def test_an_example_has_no_group_unless_it_is_given_one():
    assert Example("p", "a").group == ""


@pytest.mark.parametrize(
    ("text", "pattern", "answer"),
    [
        (" the whole \n", "", "the whole"),
        ("2 + 2 = 4\n#### 4", "#### (.+)", "4"),
        ("#### 3\nno:\n#### -5 \n", "#### (.+)", "-5"),  # the last one counts
        ("no answer", "#### (.+)", None),
        ("", "#### (.+)", None),
        ("17 apples and 5 pears", "[0-9]+", "5"),  # no group: the whole match
        ("b", "(a)|b", None),  # the group took no part in the match
        ("x=1,y=2", "([xy])=([0-9])", "y"),  # of several groups the first
    ],
)
def test_the_part_that_is_compared_is_the_last_match(text, pattern, answer):
    assert extract_answer(text, pattern) == answer


def test_a_bad_answer_pattern_is_named():
    with pytest.raises(DataError, match=r"must be a regular expression \(missing .*, got '#### \(\.\+'"):
        extract_answer("#### 4", "#### (.+")


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("0", "0"),
        ("-0", "0"),
        ("0.0", "0"),
        ("-5", "-5"),
        ("\N{MINUS SIGN}5", "-5"),
        ("+5", "5"),
        ("1,234", "1234"),
        ("1,234,567.50", "1234567.5"),
        ("3.50", "3.5"),
        ("5.", "5"),
        (".5", "0.5"),
        ("$18", "18"),
        ("-$18.00", "-18"),
        ("$-18", "-18"),
        ("100", "100"),
        ("12345678901234567890123456789012345678901", "12345678901234567890123456789012345678901"),
        # Not numbers, so they stay as they are.
        ("none", "none"),
        ("", ""),
        (".", "."),
        ("-", "-"),
        ("1,23", "1,23"),
        ("007", "007"),
        ("1.2.3", "1.2.3"),
        ("5 apples", "5 apples"),
        ("  two\n words ", "two words"),
        ("Yes.", "Yes."),
    ],
)
def test_each_answer_has_one_form(text, form):
    assert normalise_answer(text) == form


@pytest.mark.parametrize(
    ("first", "second"), [("-5", "5"), ("1.5", "15"), ("1,5", "15"), ("0", ""), ("0", "none"), ("5", "5 km")]
)
def test_answers_that_differ_are_not_made_equal(first, second):
    assert normalise_answer(first) != normalise_answer(second)


@settings(deadline=None)
@given(st.text(alphabet="0123456789-+.,$ ab", max_size=8))
def test_the_form_of_a_form_is_itself(text):
    assert normalise_answer(normalise_answer(text)) == normalise_answer(text)
