"""Exact maps between tokenizers, their refusals, and a large model that speaks the small one's ids."""

import json
import random

import pytest
import torch
from reference import reference_greedy, reference_scores
from tiny import EOS, LETTERS, VOCAB, tiny_gpt2, tiny_llama, tiny_tokenizer
from tokenizers import Tokenizer, models
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from fedpt_flwr.config import parse_run_config
from fedpt_flwr.data import TokenizedExample
from fedpt_flwr.distiller import check_translated
from fedpt_flwr.errors import ConfigError, ModelError, VocabularyMismatch
from fedpt_flwr.losses import answer_losses
from fedpt_flwr.models import fingerprint, output_size
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.ragged import Stepper
from fedpt_flwr.vocabulary import IdMap, match_vocabularies, translate, translation_of


def letters(order=LETTERS, *, special=("<pad>", "<s>", "</s>"), added=()):
    """A tokenizer of letters in this order, with further special tokens behind them."""
    vocabulary = {token: number for number, token in enumerate([*special, *order])}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="</s>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
    return tokenizer


def bpe(*merges, order="abc"):
    vocabulary = {token: number for number, token in enumerate([*order, *("".join(merge) for merge in merges)])}
    tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[*merges]))
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="a")


SHUFFLED = "".join(random.Random(3).sample(LETTERS, len(LETTERS)))


# --- finding a map ---


def test_the_same_vocabulary_needs_no_map_and_padded_layers_are_fine():
    for sizes in (None, {"large": VOCAB + 19, "small": VOCAB}):
        found = match_vocabularies(tiny_tokenizer(), tiny_tokenizer(), sizes)
        assert (found.size, found.id_map) == (VOCAB, None)


def test_a_model_that_scores_fewer_ids_than_there_are_tokens_is_refused():
    with pytest.raises(VocabularyMismatch) as raised:
        match_vocabularies(tiny_tokenizer(), tiny_tokenizer(), {"large": VOCAB, "small": VOCAB - 1})
    assert str(raised.value) == (
        f"model.small: the small model scores {VOCAB - 1} ids, fewer than the tokenizer's {VOCAB}; "
        "use the tokenizer that belongs to the model"
    )


@pytest.mark.parametrize("added", [(), ("<|x|>", "<|y|>")], ids=["permutation", "padded"])
def test_a_permutation_and_a_superset_of_one_are_mapped_token_by_token(added):
    large, small = letters(SHUFFLED, special=("</s>", "<pad>", "<s>"), added=added), letters()
    found = match_vocabularies(large, small)
    assert found.size == VOCAB
    assert found.id_map.is_whole
    text = "how far = 12;\n"
    assert found.id_map.large_ids[small(text)["input_ids"]].tolist() == large(text)["input_ids"]


def test_a_small_model_may_have_further_tokens_and_the_map_says_which_are_missing():
    large, small = letters(), letters(SHUFFLED, added=("<|x|>",))
    id_map = match_vocabularies(large, small).id_map
    assert not id_map.is_whole
    assert (id_map.large_ids < 0).nonzero().tolist() == [[small.convert_tokens_to_ids("<|x|>")]]


def test_where_both_have_tokens_of_their_own_the_first_ones_are_shown():
    with pytest.raises(VocabularyMismatch) as raised:
        match_vocabularies(letters(SHUFFLED, added=("<|x|>", "<|y|>")), letters(added=("<|z|>",)))
    assert str(raised.value).startswith(
        "model.large and model.small: large and small model must share one vocabulary, or one of them must have all "
        f"tokens of the other; 2 of {VOCAB + 2} are the large model's alone and 1 of {VOCAB + 1} the small one's, the "
        f"first as (id in large / in small): '<|x|>' ({VOCAB} / None), '<|z|>' (None / {VOCAB}), "
    )
    assert str(raised.value).endswith("; choose two models of one family")


@pytest.mark.parametrize(
    ("large", "small", "said"),
    [
        (
            bpe(("a", "b"), ("b", "c")),
            bpe(("b", "c"), ("a", "b")),
            "2 and 2 merges, which differ first at number 0 (in large / in small): 'a b' / 'b c'",
        ),
        (
            bpe(("a", "b"), ("b", "c")),
            bpe(("a", "b")),
            "2 and 1 merges, which differ first at number 1 (in large / in small): 'b c' / none",
        ),
        (letters(LETTERS + "é"), letters(), "1 tokens are one's alone or weigh otherwise, the first 'é'"),
        (letters("abc", special=("<pad>", "</s>")), bpe(order="abc"), "one is of the kind WordLevel, the other BPE"),
    ],
    ids=["order of merges", "more merges", "a word that only one has", "kind"],
)
def test_tokenizers_that_cut_otherwise_are_refused_with_the_first_difference(large, small, said):
    with pytest.raises(VocabularyMismatch) as raised:
        match_vocabularies(large, small)
    assert str(raised.value) == (
        "model.large and model.small: large and small model must cut texts into tokens by the same rules; "
        f"{said}; choose two models of one family"
    )


def test_pieces_that_weigh_otherwise_are_refused():
    def unigram(*pieces):
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(list(pieces), 0)), eos_token="a")

    one = unigram(("a", -1.0), ("b", -2.0), ("ab", -2.5))
    same = match_vocabularies(one, unigram(("b", -2.0), ("a", -1.0), ("ab", -2.5)))
    assert same.id_map.large_ids.tolist() == [1, 0, 2]
    with pytest.raises(VocabularyMismatch, match=r"1 tokens are one's alone or weigh otherwise, the first 'ab'"):
        match_vocabularies(one, unigram(("b", -2.0), ("a", -1.0), ("ab", -2.4)))


# --- a translated model ---


class Trio:
    """A large model whose tokenizer has other ids, and two small ones."""

    def __init__(self, *, added=(), small_added=(), make=tiny_llama, **settings):
        self.large_tokenizer = letters(SHUFFLED, special=("</s>", "<pad>", "<s>"), added=added)
        self.tokenizer = letters(added=small_added)
        size = max(self.large_tokenizer.get_vocab().values()) + 1
        self.plain, self.large = (make(1, vocab=size + 5, **settings) for _ in range(2))
        for model in (self.plain, self.large):
            model.generation_config.eos_token_id = [0, size + 2]
            model.generation_config.pad_token_id = size + 1
        self.tuned, self.untuned = (tiny_llama(seed, vocab=VOCAB + len(small_added)) for seed in (2, 3))
        self.id_map = match_vocabularies(self.large_tokenizer, self.tokenizer).id_map
        translate(self.large, self.id_map)

    def proxy(self, **settings):
        settings = {"vocab_size": len(self.id_map.large_ids), "tokenizer": self.tokenizer} | settings
        return ProxyModel(self.large, self.tuned, self.untuned, **settings)

    def speaking(self):
        """The plain large model behind a wrapper that maps ids by hand."""
        ids = self.id_map.large_ids

        class Output:
            def __init__(self, logits):
                self.logits = logits

        @torch.no_grad()
        def ask(tokens, **settings):
            logits = self.plain(ids[tokens], **settings).logits[..., ids.clamp_min(0)]
            return Output(logits.masked_fill(ids < 0, -torch.inf))

        return ask


IDS = torch.tensor([[5, 9, 12, 30, 7]])


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_translated_model_scores_what_the_plain_one_does_in_the_other_order(make):
    trio = Trio(make=make)
    torch.testing.assert_close(trio.large(IDS).logits, trio.speaking()(IDS).logits, rtol=0, atol=0)
    assert output_size(trio.large) == VOCAB
    assert fingerprint(trio.large) == fingerprint(trio.plain)


def test_ends_are_translated_and_those_it_cannot_write_are_left_out():
    large = Trio().large
    assert large.generation_config.eos_token_id == EOS
    assert large.generation_config.pad_token_id is None


@pytest.mark.parametrize("small_added", [(), ("<|x|>",)], ids=["whole", "with a token that only the small model has"])
@pytest.mark.parametrize("drafts", [None, 0, 3])
def test_a_proxy_writes_what_the_formula_says(small_added, drafts):
    trio = Trio(added=() if small_added else ("<|y|>",), small_added=small_added)
    parts = (trio.speaking(), trio.tuned, trio.untuned)
    proxy = trio.proxy()
    scores = proxy(input_ids=IDS).logits[0]
    torch.testing.assert_close(scores, reference_scores(*parts, IDS[0]), rtol=1e-4, atol=1e-4)
    expected = reference_greedy(*parts, IDS[0], max_new_tokens=12)
    expected = expected[: expected.index(EOS) + 1] if EOS in expected else expected
    written = proxy.generate(IDS, max_new_tokens=12, do_sample=False, draft_tokens=drafts)[0, IDS.shape[1] :]
    assert written.tolist() == expected
    if small_added:
        assert bool((scores[:, VOCAB] == -torch.inf).all())


def test_a_translated_model_can_be_laid_out_batched_and_stepped():
    trio = Trio()
    proxy = trio.proxy()
    before = proxy.generate(IDS, max_new_tokens=10, do_sample=False, draft_tokens=0)
    assert isinstance(proxy.prepare().steppers()["large"], Stepper)
    assert torch.equal(proxy.generate(IDS, max_new_tokens=10, do_sample=False, draft_tokens=2), before)
    proxy.restore()
    short = torch.tensor([[0, 0, 5, 9, 12]])
    batch, mask = torch.cat([IDS, short]), torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    both = proxy.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False)
    alone = proxy.generate(short[:, 2:], max_new_tokens=6, do_sample=False)
    assert both[1, 5 : 5 + alone.shape[1] - 3].tolist() == alone[0, 3:].tolist()


def test_losses_of_the_large_model_alone_are_over_the_shared_tokens():
    trio = Trio(added=("<|y|>",))
    example = TokenizedExample([5, 9], [12, 30])
    found = answer_losses(trio.large, [example], pad_id=0, batch_size=1).nats[0]
    logs = trio.speaking()(torch.tensor([[5, 9, 12, 30]])).logits[0, 1:3].log_softmax(-1)
    assert found == pytest.approx(-float(logs[0, 12] + logs[1, 30]), rel=1e-5)


def test_a_token_that_the_large_model_lacks_cannot_be_read_but_may_pad():
    trio = Trio(small_added=("<|x|>",))
    with pytest.raises(ModelError) as raised:
        trio.large(torch.tensor([[5, VOCAB]]))
    assert str(raised.value) == (
        f"the large model cannot read tokens that its vocabulary lacks, got [{VOCAB}]; leave these tokens out of "
        "prompts and answers, or choose a large model that has them"
    )
    small, large = letters(added=("<fill>",)), tiny_llama(1)
    small.pad_token = "<fill>"
    translate(large, match_vocabularies(letters(SHUFFLED), small).id_map)
    ids, mask = torch.tensor([[small.pad_token_id, 5, 6]]), torch.tensor([[0, 1, 1]])
    scores = large(ids, attention_mask=mask, position_ids=torch.tensor([[0, 0, 1]])).logits[0, -1]
    torch.testing.assert_close(scores, large(ids[:, 1:]).logits[0, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("missing", [0, VOCAB - 1])
def test_drafts_padding_and_timing_need_no_token_that_the_large_model_lacks(missing):
    large, tuned, untuned = (tiny_llama(seed) for seed in (1, 2, 3))
    ids = torch.arange(VOCAB)
    translate(large, IdMap(torch.where(ids == missing, -1, ids)))
    for small in (tuned, untuned):  # both love that token, so that the shift is small
        small.lm_head.register_forward_hook(lambda _head, _inputs, scores: scores + 50.0 * (ids == missing))
    proxy = ProxyModel(large, tuned, untuned, vocab_size=VOCAB)
    batch = torch.tensor([[9, 5, 6, 7, 8], [1, 5, 6, 7, 8]])
    asked = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    alone = [proxy.generate(row[None], draft_tokens=None, **asked)[0, -8:].tolist() for row in (batch[0], batch[1, 1:])]
    mask = torch.tensor([[1] * 5, [0, 1, 1, 1, 1]])
    for drafts in (3, "auto"):
        assert proxy.generate(batch, attention_mask=mask, draft_tokens=drafts, **asked)[:, -8:].tolist() == alone


def test_a_token_that_a_large_model_lacks_is_ruled_out_also_where_scores_are_capped():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8, "sliding_window": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    large = Gemma2ForCausalLM(Gemma2Config(vocab_size=VOCAB + 9, **sizes, **heads)).eval()
    assert large.config.final_logit_softcapping
    ids = torch.tensor([[5, 6]])
    with torch.no_grad():
        plain = large(ids + 4).logits
        large_ids = torch.arange(4, VOCAB + 4)
        large_ids[-1] = -1
        translate(large, IdMap(large_ids, 0))
        scores = large(ids).logits
        assert torch.equal(scores[..., :-1], plain[..., 4 : VOCAB + 3])
        assert torch.equal(scores[..., -1], torch.full((1, 2), -torch.inf))
        assert torch.equal(large(ids, return_dict=False)[0], scores)


def test_a_model_speaks_one_language_at_a_time():
    trio = Trio()
    before = trio.large(IDS).logits
    translate(trio.large, trio.id_map)
    assert torch.equal(trio.large(IDS).logits, before)
    with pytest.raises(ModelError, match="speak the ids of one small model at a time; load it once more for the other"):
        translate(trio.large, IdMap(torch.arange(VOCAB).flip(0)))


def test_a_map_must_fit_the_model():
    with pytest.raises(VocabularyMismatch, match=rf"must stay below the large model's {VOCAB} rows, got {VOCAB + 6}"):
        translate(tiny_llama(), IdMap(torch.tensor([VOCAB + 6, 1])))
    for ids in ([1, 1], [-1, -1], [-2, 0]):
        with pytest.raises(ModelError, match="must give each of them another one, or -1"):
            IdMap(torch.tensor(ids))


# --- on disk ---


def test_a_proxy_folder_keeps_the_map_and_checks_it(tmp_path):
    trio = Trio()
    trio.plain.save_pretrained(tmp_path / "large")
    trio.untuned.save_pretrained(tmp_path / "small")
    refs = {"large_ref": str(tmp_path / "large"), "untuned_ref": str(tmp_path / "small")}
    proxy = trio.proxy()
    folder = tmp_path / "proxy"
    proxy.save_pretrained(folder, **refs, tokenizer=trio.tokenizer)
    loaded = ProxyModel.from_pretrained(folder)
    assert torch.equal(loaded(input_ids=IDS).logits, proxy(input_ids=IDS).logits)
    assert loaded.generation_config.eos_token_id == EOS
    again = ProxyModel.from_pretrained(folder, like=loaded)
    assert again.large is loaded.large
    loaded.save_pretrained(tmp_path / "again")
    assert translation_of(ProxyModel.from_pretrained(tmp_path / "again").large).digest() == trio.id_map.digest()

    config = json.loads((folder / "config.json").read_text())
    IdMap(trio.id_map.large_ids.flip(0)).save(folder)
    with pytest.raises(ModelError, match=rf"not the one of this proxy \({config['large']['ids']}\), got"):
        ProxyModel.from_pretrained(folder)
    (folder / "large-ids.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match=r"large-ids\.safetensors: the map of ids cannot be read"):
        ProxyModel.from_pretrained(folder)
    (folder / "large-ids.safetensors").unlink()
    with pytest.raises(ModelError, match=r"the map of ids cannot be read .*copy the folder again"):
        ProxyModel.from_pretrained(folder)


def test_a_large_model_that_is_translated_is_not_taken_for_a_plain_one(tmp_path):
    trio = Trio()
    plain = ProxyModel(trio.plain, trio.tuned, trio.untuned, vocab_size=VOCAB)
    trio.untuned.save_pretrained(tmp_path / "small")
    trio.plain.save_pretrained(tmp_path / "large")
    plain.save_pretrained(tmp_path / "proxy", large_ref=str(tmp_path / "large"), untuned_ref=str(tmp_path / "small"))
    with pytest.raises(ModelError, match="is translated to another small model's ids; load it once more"):
        ProxyModel.from_pretrained(tmp_path / "proxy", large=trio.large)


def test_the_library_translates_if_it_is_given_both_tokenizers():
    trio = Trio()
    proxy = ProxyModel(
        trio.plain, trio.tuned, trio.untuned, tokenizer=trio.tokenizer, large_tokenizer=trio.large_tokenizer
    )
    assert torch.equal(proxy(input_ids=IDS).logits, trio.proxy()(input_ids=IDS).logits)


# --- distillation ---


@pytest.mark.parametrize(("key", "value"), [("distillation.mode", "paper"), ("distillation.direction", "reverse")])
def test_a_teacher_that_lacks_tokens_cannot_teach_everything(key, value):
    config = parse_run_config({key: value})
    check_translated(config, IdMap(torch.tensor([1, 0])))
    check_translated(parse_run_config({}), IdMap(torch.tensor([1, -1])))
    with pytest.raises(ConfigError, match=f"{key}: needs a large model that has all of the small model's tokens, got"):
        check_translated(config, IdMap(torch.tensor([1, -1])))
