"""Several examples in one row: the same update as from rows of their own."""

import numpy as np
import pytest
import torch
from tiny import EOS, PAD, VOCAB, tiny_gpt2, tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM, BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

from fedpt_flwr.config import TrainConfig, TuningConfig
from fedpt_flwr.data import TokenizedExample, collate, collate_packed
from fedpt_flwr.errors import ModelError
from fedpt_flwr.models import make_tunable, tunable_arrays
from fedpt_flwr.training import check_packing, train_locally


def examples(number=12):
    """Of very different lengths."""
    rng = np.random.default_rng(0)
    return [
        TokenizedExample(
            rng.integers(3, VOCAB, rng.integers(1, 12)).tolist(), [*rng.integers(3, VOCAB, rng.integers(1, 9)), EOS]
        )
        for _ in range(number)
    ]


def test_a_packed_batch_by_hand():
    long, middle, short = TokenizedExample([5], [6, 7, 2]), TokenizedExample([8], [2]), TokenizedExample([9], [])
    packed = collate_packed([short, long, middle], pad_id=0)
    assert packed["input_ids"].tolist() == [[5, 6, 7, 2], [8, 2, 9, 0]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert packed["labels"].tolist() == [[-100, 6, 7, 2], [-100, 2, -100, -100]]


def test_packing_keeps_every_example_and_never_needs_more_room():
    batch = examples()
    packed, padded = collate_packed(batch, PAD), collate(batch, PAD)
    assert packed["input_ids"].shape[0] < padded["input_ids"].shape[0]
    assert packed["input_ids"].shape[1] == padded["input_ids"].shape[1]
    for part, nothing in (("input_ids", PAD), ("labels", -100)):
        kept = sorted(packed[part][packed[part] != nothing].tolist())
        assert kept == sorted(padded[part][padded[part] != nothing].tolist()), part


def gpt2():
    """Without dropout, whose draws depend on the form of a batch."""
    model = tiny_gpt2()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        setattr(model.config, name, 0.0)
    return model


@pytest.mark.parametrize("make", [tiny_llama, gpt2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("piece", [0, 3])
def test_packed_training_has_the_loss_and_the_weights_of_training_in_rows_of_their_own(make, attention, piece):
    found = []
    for packing in (False, True):
        model = make()
        model.set_attn_implementation(attention)
        model = make_tunable(model.requires_grad_(False), TuningConfig(), seed=1)
        config = TrainConfig(max_steps=3, batch_size=6, packing=packing)
        result = train_locally(
            model, examples(), config, learning_rate=0.01, fedprox_mu=0.0, pad_id=PAD, seed=5, max_batch_size=piece
        )
        found.append((result, tunable_arrays(model)))
    (apart, weights), (packed, others) = found
    assert packed.loss == pytest.approx(apart.loss, rel=1e-5)
    assert packed.loss_last == pytest.approx(apart.loss_last, rel=1e-4)
    counts = ("num_examples_seen", "num_tokens", "num_answer_tokens", "num_steps", "flops")
    assert [getattr(packed, name) for name in counts] == [getattr(apart, name) for name in counts]
    for name in weights:
        torch.testing.assert_close(others[name], weights[name], rtol=0, atol=1e-4)


def test_an_adapter_is_trained_the_same_in_packed_rows():
    losses = []
    for packing in (False, True):
        model = make_tunable(tiny_llama().requires_grad_(False), TuningConfig(mode="lora"), seed=1)
        config = TrainConfig(max_steps=3, batch_size=6, packing=packing)
        losses.append(
            train_locally(model, examples(), config, learning_rate=0.01, fedprox_mu=0.0, pad_id=PAD, seed=5).loss
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": 16},
    "qwen2": {"num_key_value_heads": 2},
    "gemma": GROUPED,
    "gemma3_text": GROUPED | {"sliding_window": 16},
    "gpt_neox": {},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_these_families_keep_examples_apart(family, dtype):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | FAMILIES[family])
    check_packing(AutoModelForCausalLM.from_config(config).to(dtype).eval())


def test_a_model_that_reads_the_row_as_one_text_is_refused():
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3))
    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=2, initializer_range=0.3)
    )
    for model in (bloom.eval(), mamba.eval()):
        with pytest.raises(
            ModelError, match=r"cannot keep examples in one row apart, got .*; set train\.packing=false"
        ):
            check_packing(model)
        assert not model.training


def test_the_check_leaves_a_model_in_the_mode_in_which_it_was():
    model = tiny_llama().train()
    check_packing(model)
    assert model.training
