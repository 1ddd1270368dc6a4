"""Every line of the table of refused models and tokenizers, provoked again."""

import re
from pathlib import Path

import pytest

from benchmarks.refusals import told

WORDS = {
    "a folder that is not there": "must be a folder that exists, got '/models/none'",
    "weights as `.bin` alone": "(.bin) are not loaded, save them again",
    "a shard that is missing": "model-00001-of-00007.safetensors",
    "a shard that is cut off": "SafetensorError",
    "a tokenizer without an end-of-text token": "set eos_token in its tokenizer_config.json",
    "models of two families": "the first as (id in large / in small): '<unk>' (0 / None), '\"' (None / 1)",
    "the same tokens merged in another order": "which differ first at number 0 (in large / in small)",
    "a tokenizer with more tokens than the model scores": "fewer than the tokenizer's 423",
    "LoRA targets of another family": "it has c_attn, c_fc, c_proj, lm_head",
    "texts longer than the context": "must not exceed the 160 tokens",
    "a device map that leaves weights out": "3 are left out, the first model.embed_tokens.weight",
}


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    return told(tmp_path_factory.mktemp("refusals"))


def test_every_refusal_is_one_sentence_that_says_where_or_what_and_what_to_do(sentences):
    for wrong, sentence in sentences.items():
        assert "\n" not in sentence, wrong
        assert len(sentence) < 700, wrong
        assert re.search(r", got |^model\.|^tuning\.|^train\.", sentence), wrong
    for wrong, words in WORDS.items():
        assert words in sentences[wrong], sentences[wrong]


def test_the_docs_show_what_one_is_told_today(sentences):
    text = _without_libraries((Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8"))
    for wrong, sentence in sentences.items():
        row = _without_libraries(f"| {wrong} | " + sentence.replace("|", "\\|") + " |")
        assert row in text.splitlines(), row


def _without_libraries(text):
    """The text without what libraries say, which changes with their versions, and with what this machine has."""
    text = re.sub(r"(cannot be loaded|in this way|is not there) \(.*?\), got ", r"\1 (…), got ", text)
    return re.sub(r"sees \d+ CUDA", "sees 0 CUDA", text)
