from __future__ import annotations

import functools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import EOS, PAD, VOCAB, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fedpt_flwr.models import load_tokenizer
from fedpt_flwr.service.text import TextStream, token_bytes, token_text

TEXT = "the quick brown fox 😀 jumps 中文字 over — the lazy dog 👩‍👩‍👧 naïve 😀😀 \ufffd x\n" * 5


@functools.cache
def byte_level():
    """BPE over bytes; few merges, so that most characters outside ASCII are several tokens."""
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<eos>", "<pad>"]
    tokens.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=specials, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<eos>", pad_token="<pad>")


@functools.cache
def metaspace():
    """Words that begin with a sign for a space, which the decoder drops from the first."""
    tokens = Tokenizer(models.BPE(unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Metaspace()
    tokens.decoder = decoders.Metaspace()
    tokens.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "</s>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="</s>", unk_token="<unk>")


@functools.cache
def byte_fallback():
    """As of Llama 2: words with a sign for a space, and a token for each byte of any other character."""
    vocabulary = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "中", "é", "\ufffd"]
    model = models.BPE({token: index for index, token in enumerate(vocabulary)}, [], byte_fallback=True)
    tokens = Tokenizer(model)
    tokens.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="</s>", unk_token="<unk>")


@functools.cache
def demo():
    return load_tokenizer("demo:large")


@functools.cache
def token_of_byte():
    return {token_bytes(byte_level(), token)[0]: token for token in range(2, 258)}


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def byte_ids(data):
    return [byte_fallback().convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in data]


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(tokenizer, ids, *, prompt=(), stop=()):
    """What each token gives out, and what the end does."""
    stream = TextStream(tokenizer, prompt, stop)
    given_out = [stream.push(token) for token in ids] + [stream.finish()]
    assert stream.text == "".join(given_out)
    return given_out


def cut(text, stops):
    """The text before the stop string that is complete first, found the slow way."""
    for end in range(len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))]
    return text


# --- pieces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [byte_level, demo])
@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_pieces_of_any_tokens_of_bytes_make_their_text_whatever_the_prompt(tokenizer, data):
    tokenizer = tokenizer()
    some = st.sampled_from([0, 1, *range(2, len(tokenizer), 7)]) | st.integers(0, len(tokenizer) - 1)
    ids = data.draw(st.lists(some, max_size=80))
    prompt = data.draw(st.lists(some, max_size=12))
    assert "".join(pieces(tokenizer, ids, prompt=prompt)) == decode(tokenizer, ids)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.sampled_from([b"\xf0", b"\x9f", b"\x98", b"\x80", b"\xe4", b"\xb8", b"\xad", b"\xef\xbf\xbd", b"a"]),
        max_size=120,
    ),
    st.sets(st.integers(0, 120)),
    st.integers(0, 3),
)
@example([b"\x80"] * 120, set(), 2)
@example([b"\xf0", b"\x9f", b"\x98"] * 40, set(), 0)
@example([b"\xf0", b"\x9f", b"\x98", b"\x80"], set(range(120)), 40)
def test_pieces_of_broken_characters_make_their_text(chunks, specials, repeats):
    tokenizer = byte_level()
    ids = []
    for position, chunk in enumerate(chunks):
        # Special tokens between the bytes of a character are nothing at all.
        ids += [1] * repeats * (position in specials)
        ids += [token_of_byte()[byte] for byte in chunk]
    assert "".join(pieces(tokenizer, ids)) == decode(tokenizer, ids)


@settings(deadline=None)
@given(st.text(), st.text())
def test_pieces_of_a_text_that_was_written_are_the_text(prompt, text):
    tokenizer = byte_level()
    assert "".join(pieces(tokenizer, ids_of(tokenizer, text), prompt=ids_of(tokenizer, prompt))) == text


@settings(deadline=None)
@given(data=st.data())
def test_every_piece_is_final_and_whole(data):
    tokenizer = byte_level()
    ids = ids_of(tokenizer, data.draw(st.text(alphabet="a 中😀é", max_size=30)))
    stream = TextStream(tokenizer, [])
    for number, token in enumerate(ids, start=1):
        assert "\ufffd" not in stream.push(token)
        # What is not given out yet is the beginning of one character.
        assert decode(tokenizer, ids[:number]).rstrip("\ufffd") == stream.text
    assert stream.finish() == ""


def test_a_character_in_several_tokens_comes_with_its_last():
    tokenizer = byte_fallback()
    ids = [*byte_ids("😀".encode()), *ids_of(tokenizer, "b")]
    assert pieces(tokenizer, ids) == ["", "", "", "😀", "b", ""]


@settings(deadline=None)
@given(
    st.text(alphabet="ab 中文é😀𝄞\n", max_size=60),
    st.sampled_from(["", "a", "中", "文文文文文文", "a ", "\n"]),
)
def test_characters_of_single_bytes_follow_each_other(text, prompt):
    tokenizer = byte_fallback()
    parts = pieces(tokenizer, byte_ids(text.encode()), prompt=byte_ids(prompt.encode()))
    if prompt:
        assert "".join(parts) == text
        assert parts[:-1] == [
            text.encode()[: number + 1]
            .decode(errors="ignore")
            .removeprefix(text.encode()[:number].decode(errors="ignore"))
            for number in range(len(text.encode()))
        ]
    else:
        assert "".join(parts) == text.removeprefix(" ")  # the decoder's own doing


def test_half_a_character_is_given_out_at_the_end():
    tokenizer = byte_level()
    ids = ids_of(tokenizer, "b😀")[:-1]
    parts = pieces(tokenizer, ids)
    assert parts[-1] == "\ufffd"
    assert "".join(parts) == decode(tokenizer, ids) == "b\ufffd"


def test_the_prompts_half_a_character_is_not_the_answers():
    tokenizer = byte_level()
    half = ids_of(tokenizer, "b😀")
    assert decode(tokenizer, half[:-1]).endswith("\ufffd")
    ids = [half[-1], *ids_of(tokenizer, "dog")]
    assert "".join(pieces(tokenizer, ids, prompt=half[:-1])) == decode(tokenizer, ids)


def test_bytes_that_are_no_characters_do_not_block():
    tokenizer = byte_fallback()
    stream = TextStream(tokenizer, [])
    given_out = [stream.push(token) for token in byte_ids(b"\x80" * 500)]
    assert all(len("".join(given_out[: number + 1])) >= number + 1 - 3 for number in range(500))
    assert "".join(given_out) + stream.finish() == "\ufffd" * 500
    assert len(stream._window) <= 32


def test_the_replacement_character_itself_does_not_block():
    tokenizer = byte_level()
    ids = ids_of(tokenizer, "\ufffd" * 50)
    stream = TextStream(tokenizer, [])
    assert "".join(stream.push(token) for token in ids).startswith("\ufffd" * 40)
    assert stream.text + stream.finish() == "\ufffd" * 50


def test_after_bytes_that_are_no_characters_all_is_as_ever():
    tokenizer = byte_fallback()
    ids = [*byte_ids(b"\x80" * 50), *ids_of(tokenizer, "b"), *byte_ids("😀".encode())]
    assert pieces(tokenizer, ids)[-6:] == ["\ufffd" * 3 + "b", "", "", "", "😀", ""]


@pytest.mark.parametrize("tokenizer", [metaspace, byte_fallback])
def test_a_first_token_keeps_the_space_that_parts_it_from_the_prompt(tokenizer):
    tokenizer = tokenizer()
    word = next(token for token in range(len(tokenizer)) if tokenizer.convert_ids_to_tokens(token)[:2] in ("▁t", "▁a"))
    text = decode(tokenizer, [word])
    assert not text.startswith(" ")
    assert pieces(tokenizer, [word, word], prompt=[word]) == [f" {text}", f" {text}", ""]
    assert pieces(tokenizer, [word, word], prompt=[word, 1, 1])[0] == f" {text}"  # special tokens are no context
    assert pieces(tokenizer, [word, word]) == [text, f" {text}", ""]


@settings(deadline=None)
@given(st.data())
def test_pieces_of_words_with_spaces_are_the_continuation_of_the_prompt(data):
    tokenizer = metaspace()
    tokens = st.lists(st.integers(0, len(tokenizer) - 1), max_size=60)
    prompt, ids = data.draw(tokens), data.draw(tokens)
    whole, before = decode(tokenizer, prompt + ids), decode(tokenizer, prompt)
    if before and "\ufffd" not in before:  # which is no context, because it may be half of a character
        assert before + "".join(pieces(tokenizer, ids, prompt=prompt)) == whole


@settings(deadline=None)
@given(st.lists(st.integers(0, VOCAB - 1), max_size=60))
def test_pieces_of_letters_are_the_text_without_special_tokens(ids):
    tokenizer = tiny_tokenizer()
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == decode(tokenizer, ids)
    assert all(part == "" for part, token in zip(parts, ids, strict=False) if token in (PAD, EOS))


def test_tokens_that_the_vocabulary_does_not_have_are_nothing():
    assert pieces(tiny_tokenizer(), [5, VOCAB + 10, 5]) == ["c", "", "c", ""]


def test_a_token_costs_the_same_however_long_the_text_is():
    tokenizer = byte_level()
    stream = TextStream(tokenizer, [])
    longest = 0
    for token in ids_of(tokenizer, TEXT) * 3:
        stream.push(token)
        longest = max(longest, len(stream._window))
    assert longest <= 20


# --- stop strings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stops", "given_out", "stopped"),
    [
        ("abcd", ["c"], "ab", True),
        ("abcd", ["a"], "", True),
        ("abcd", ["x"], "abcd", False),
        ("abcd", ["de", "cx"], "abcd", False),  # the beginning of one is given out at the end
        ("abcd", ["abcd", "bc"], "a", True),  # complete first
        ("abcd", ["bc", "abc"], "", True),  # together: the longer one
        ("aaab", ["aab"], "a", True),
        ("ababac", ["abac"], "ab", True),
        ("abcabd", ["abd"], "abc", True),
        ("ab;cd;", [";"], "ab", True),
        ("a\n\nb", ["\n\n"], "a", True),
    ],
)
def test_a_stop_string_ends_the_text_before_itself(text, stops, given_out, stopped):
    tokenizer = byte_level()
    for ids in (ids_of(tokenizer, text), [token for letter in text for token in ids_of(tokenizer, letter)]):
        stream = TextStream(tokenizer, [], stops)
        for token in ids:
            stream.push(token)
        assert stream.stopped == stopped
        stream.finish()
        assert stream.text == given_out


@settings(deadline=None, max_examples=500)
@given(
    st.lists(st.text(alphabet="ab;😀", min_size=1, max_size=4), max_size=30),
    st.lists(st.text(alphabet="ab;😀", min_size=1, max_size=6), min_size=1, max_size=4),
)
def test_stop_strings_are_found_as_by_looking_at_every_prefix(words, stops):
    tokenizer = byte_level()
    ids = [token for word in words for token in ids_of(tokenizer, word)]
    text = "".join(words)
    assert "".join(pieces(tokenizer, ids, stop=stops)) == cut(text, stops)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_stop_strings_are_found_in_any_tokens(data):
    tokenizer = demo()
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=40))
    text = decode(tokenizer, ids)
    stops = []
    for _ in range(data.draw(st.integers(1, 3))):  # taken from the text, so that they are found
        begin = data.draw(st.integers(0, max(0, len(text) - 1)))
        stops.append(text[begin : begin + data.draw(st.integers(1, 9))] or "x")
    parts = pieces(tokenizer, ids, stop=stops)
    assert "".join(parts) == cut(text, stops)


@settings(deadline=None)
@given(st.text(alphabet="ab", max_size=30), st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1))
def test_only_what_may_begin_a_stop_string_is_held_back(text, stops):
    tokenizer = byte_level()
    stream = TextStream(tokenizer, [], stops)
    seen = ""
    for letter in text:
        stream.push(*ids_of(tokenizer, letter))
        seen += letter
        if stream.stopped:
            break
        held = max(
            length for length in range(6) if any(seen.endswith(stop[:length]) for stop in stops if len(stop) >= length)
        )
        assert stream.text == seen[: len(seen) - held]


def test_a_stop_string_in_the_prompt_does_not_count_nor_one_that_began_there():
    tokenizer = byte_level()
    parts = pieces(tokenizer, ids_of(tokenizer, "b;c"), prompt=ids_of(tokenizer, "a;ba"), stop=["ab", "a;b"])
    assert "".join(parts) == "b;c"


def test_after_a_stop_string_nothing_comes():
    tokenizer = byte_level()
    stream = TextStream(tokenizer, [], ["x"])
    given_out = [stream.push(token) for token in ids_of(tokenizer, "the x dog")]
    assert stream.stopped
    assert "".join(given_out) == stream.text == "the "
    assert [stream.push(5), stream.finish(), stream.finish()] == ["", "", ""]


def test_a_stop_string_may_be_the_rest_of_a_broken_character():
    tokenizer = byte_level()
    stream = TextStream(tokenizer, [], ["\ufffd"])
    assert "".join(stream.push(token) for token in ids_of(tokenizer, "b😀")[:-1]) == "b"
    assert (stream.finish(), stream.stopped, stream.text) == ("", True, "b")


# --- one token --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [byte_level, demo])
def test_the_bytes_of_any_tokens_are_the_bytes_of_their_text(tokenizer):
    tokenizer = tokenizer()
    for token in range(len(tokenizer)):
        found = bytes(token_bytes(tokenizer, token))
        assert found.decode(errors="replace") == token_text(tokenizer, token)
        assert found.decode(errors="replace") == tokenizer.decode([token], clean_up_tokenization_spaces=False)
    ids = ids_of(tokenizer, TEXT.replace("\ufffd", ""))
    if tokenizer is byte_level():  # the demo world's texts have fewer characters
        assert b"".join(bytes(token_bytes(tokenizer, token)) for token in ids) == TEXT.replace("\ufffd", "").encode()
        assert sorted(byte for token in range(2, 258) for byte in token_bytes(tokenizer, token)) == list(range(256))


@pytest.mark.parametrize(
    ("token", "text", "data"),
    [
        ("▁a", " a", b" a"),
        ("▁", " ", b" "),
        ("b", "b", b"b"),
        ("é", "é", "é".encode()),  # a letter here, though it stands for a byte in other vocabularies
        ("中", "中", "中".encode()),
        ("<0x41>", "A", b"A"),
        ("<0xE4>", "\ufffd", b"\xe4"),
        ("\ufffd", "\ufffd", "\ufffd".encode()),
        ("</s>", "</s>", b"</s>"),
    ],
)
def test_a_token_by_itself_has_its_space_and_its_bytes(token, text, data):
    tokenizer = byte_fallback()
    token_id = tokenizer.convert_tokens_to_ids(token)
    assert token_text(tokenizer, token_id) == text
    assert bytes(token_bytes(tokenizer, token_id)) == data


def test_a_token_of_one_letter_is_that_letter():
    assert token_text(tiny_tokenizer(), 5) == "c"
    assert token_text(tiny_tokenizer(), EOS) == "</s>"
    assert token_bytes(tiny_tokenizer(), 5) == [ord("c")]


def test_bytes_that_cannot_be_had_are_none():
    class Mute:
        def decode(self, ids, **_):
            return "\ufffd" * len(ids)

        def convert_ids_to_tokens(self, _):
            return "zz"

    assert token_bytes(Mute(), 3) is None
