"""Weights prepared for decoding, against the layers and models as they were."""

import copy
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import HRAConfig, LoraConfig, OFTConfig, get_peft_model
from test_ragged import FAMILIES, make, random_ids
from tiny import VOCAB, tiny_gpt2, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from fedpt_flwr import huge_pages, packing
from fedpt_flwr.config import TuningConfig
from fedpt_flwr.errors import ModelError
from fedpt_flwr.models import (
    check_plain,
    fingerprint,
    load_adapter,
    load_causal_lm,
    make_tunable,
    set_arrays,
    tunable_arrays,
)
from fedpt_flwr.packing import PackedLinear, is_prepared, join, prepare, restore, suits_single_rows
from fedpt_flwr.proxy import ProxyModel

pytest.importorskip("numba", reason="compiled loops need the extra fast")


KINDS = {
    "onednn": (packing._OneDnn, math.inf),
    "few rows": (packing._FewRows, math.inf),
    "few rows, moved": (packing._FewRows, 1),
}
"""How weights are laid out, and how many bytes of them are moved into large pages."""


@pytest.fixture(autouse=True, params=KINDS)
def product(request, monkeypatch):
    make_product, least_bytes = KINDS[request.param]
    if least_bytes == 1 and not huge_pages._page_bytes():
        pytest.skip("this system has no huge pages")
    product = make_product()
    monkeypatch.setattr(huge_pages, "_LEAST_BYTES", least_bytes)
    if not packing._has_kernel(torch.float32, product):
        pytest.skip("oneDNN is not on this machine")
    monkeypatch.setattr(packing, "_product", lambda *_: product)
    return product


def layers():
    torch.manual_seed(0)
    conv = Conv1D(24, 16)
    nn.init.normal_(conv.bias)
    return {"linear": nn.Linear(16, 24, bias=False), "linear, bias": nn.Linear(16, 24), "conv1d": conv}


def in_a_model(layer):
    return nn.Sequential(layer)


def adapted(base, seed=0, **settings):
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=4, **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def weights(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def same(some, others):
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


@pytest.mark.parametrize("name", layers())
@pytest.mark.parametrize("shape", [(1, 16), (5, 16), (2, 3, 16), (16,), (0, 16), (2, 0, 16)])
def test_a_packed_layer_multiplies_as_the_plain_one(name, shape):
    layer = layers()[name]
    x = torch.randn(shape)
    expected = layer(x)
    model = in_a_model(layer)
    assert prepare(model) == 1
    assert isinstance(model[0], PackedLinear)
    torch.testing.assert_close(model(x), expected.detach(), atol=1e-5, rtol=1e-5)


def test_inputs_may_lie_in_memory_as_they_like():
    model = in_a_model(nn.Linear(16, 24))
    x = torch.randn(16, 5, 2)
    expected = model(x[..., 0].t())
    assert prepare(model) == 1
    torch.testing.assert_close(model(x[..., 0].t()), expected.detach())


@pytest.mark.parametrize("wrong", [torch.zeros(2, 16, dtype=torch.float64), torch.zeros(2, 15)])
def test_inputs_that_do_not_fit_are_refused_by_both(wrong):
    model = in_a_model(nn.Linear(16, 24))
    with pytest.raises(RuntimeError):
        model(wrong)
    assert prepare(model) == 1
    with pytest.raises(RuntimeError):
        model(wrong)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_scores_and_generates_as_before(name):
    model = make(name)
    ids = random_ids(2, 9)
    settings = {"max_new_tokens": 6, "attention_mask": torch.ones_like(ids), "do_sample": False}
    with torch.no_grad():
        expected = model(ids).logits
        written = [model.generate(ids, num_beams=beams, **settings) for beams in (1, 2)]
        assert prepare(model) > 0
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
        for beams, before in zip((1, 2), written, strict=True):
            assert torch.equal(model.generate(ids, num_beams=beams, **settings), before)


@pytest.mark.parametrize("build", [tiny_llama, partial(tiny_llama, tie_word_embeddings=False), tiny_gpt2])
def test_a_restored_model_is_the_one_that_it_was(build):
    model = build()
    ids = random_ids(2, 5) % model.config.vocab_size
    before, mark, scores = weights(model), fingerprint(model), model(ids).logits
    names, parts = [name for name, _ in model.named_parameters()], list(model.modules())
    assert prepare(model) > 0
    assert is_prepared(model)
    assert prepare(model) == 0  # nothing is packed twice
    restore(model)
    assert not is_prepared(model)
    assert same(weights(model), before)
    assert fingerprint(model) == mark
    assert [name for name, _ in model.named_parameters()] == names  # tied ones are tied again
    assert all(one is other for one, other in zip(model.modules(), parts, strict=True))
    assert torch.equal(model(ids).logits, scores)


def test_a_tied_head_stays_one_tensor_with_the_embedding(product):
    model = tiny_llama()
    prepare(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (type(model.lm_head) is PackedLinear) == product.keeps_plain
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)
    hidden = torch.randn(3, model.config.hidden_size)
    torch.testing.assert_close(model.lm_head(hidden), hidden @ model.model.embed_tokens.weight.detach().T)


def test_a_copy_of_a_tied_head_goes_with_the_copied_embedding():
    model = tiny_llama()
    prepare(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.embed_tokens.weight.zero_()
    hidden = torch.randn(3, model.config.hidden_size)
    assert not twin.lm_head(hidden).any()
    assert model.lm_head(hidden).any()


@pytest.mark.parametrize(
    "use",
    [
        lambda weight: torch.ones(2, weight.shape[1]) @ weight.T,
        lambda weight: torch.nn.functional.linear(torch.ones(2, weight.shape[1]), weight),
        lambda weight: torch.addmm(torch.zeros(2, 1), torch.ones(2, weight.shape[0]), weight),
        lambda weight: weight.data.mul_(2.0),
        lambda weight: weight.add_(1.0),
        lambda weight: torch.zeros(weight.shape).add_(weight),
        lambda weight: weight.detach().norm(),
        lambda weight: weight[0],
    ],
)
def test_a_packed_weight_that_is_read_or_written_says_so_and_gives_no_numbers(use):
    model = tiny_llama()
    prepare(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ModelError, match="neither read nor written"):
        use(weight)
    assert weight.dtype == torch.float32
    assert weight.device.type == "cpu"
    assert weight.numel() == weight.shape[0] * weight.shape[1]
    assert "packed" in repr(weight)


def test_an_adapter_that_comes_to_a_prepared_model_works_there_and_afterwards(tmp_path):
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    other = get_peft_model(tiny_llama(), LoraConfig(**settings)).eval()
    other.save_pretrained(tmp_path)
    ids = random_ids(2, 6) % VOCAB
    with torch.no_grad():
        expected = other(ids).logits
        model = get_peft_model(tiny_llama(), LoraConfig(**settings)).eval()
        prepare(model)
        with pytest.raises(ModelError, match="neither read nor written"):
            model.merge_adapter()
        model.load_adapter(str(tmp_path), "loaded")
        model.set_adapter("loaded")
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
        model.add_adapter("new", LoraConfig(**settings))
        assert all(weight.device.type == "cpu" for weight in model.parameters())
        restore(model)
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("draft_tokens", [None, "auto"])
@pytest.mark.parametrize("kind", ["dora", "hra", "oft"])
def test_under_an_adapter_that_reads_the_weight_it_stays_plain(kind, draft_tokens):
    settings = {"target_modules": ["q_proj", "up_proj"]}
    config = {
        "dora": lambda: LoraConfig(r=4, use_dora=True, init_lora_weights=False, **settings),
        "hra": lambda: HRAConfig(r=4, init_weights=False, **settings),
        "oft": lambda: OFTConfig(r=0, oft_block_size=4, init_weights=False, **settings),
    }[kind]()
    proxy = ProxyModel(tiny_llama(1), get_peft_model(tiny_llama(2), config).eval())
    ids = random_ids(2, 6) % VOCAB
    how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = proxy.generate(ids, **how)
    proxy.prepare()
    assert prepare(proxy.tuned) > 0 or is_prepared(proxy.tuned)
    assert torch.equal(proxy.generate(ids, **how, draft_tokens=draft_tokens), expected)


def test_a_model_restored_under_inference_mode_can_be_trained():
    model = tiny_llama()
    with torch.inference_mode():
        prepare(model)
        restore(model)
    model(random_ids(1, 4) % 32).logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_a_prepared_model_is_saved_with_its_weights(tmp_path):
    model = tiny_llama(tie_word_embeddings=False)
    before = weights(model)
    prepare(model)
    assert same(weights(model), before)
    model.save_pretrained(tmp_path)
    assert same(weights(AutoModelForCausalLM.from_pretrained(tmp_path)), before)


def test_a_copy_of_a_prepared_model_stands_for_itself():
    model = tiny_llama()
    before = weights(model)
    prepare(model)
    twin = copy.deepcopy(model)
    restore(twin)
    with torch.no_grad():
        twin.model.layers[0].mlp.up_proj.weight.zero_()
    assert is_prepared(model)
    assert same(weights(model), before)


def test_reading_and_writing_packed_weights_is_refused(tmp_path):
    model = tiny_llama()
    arrays = tunable_arrays(model.requires_grad_(True))
    prepare(model)
    for attempt in (
        lambda: fingerprint(model),
        lambda: set_arrays(model, arrays),
        lambda: tunable_arrays(model),
        lambda: make_tunable(model, TuningConfig(), seed=0),
        lambda: load_adapter(model, tmp_path),
        lambda: model.load_state_dict(arrays),
        lambda: model(random_ids(1, 4) % 32).logits.sum().backward(),
    ):
        with pytest.raises(ModelError, match=r"undo that with packing.restore\(model\)"):
            attempt()


def test_converting_a_prepared_model_is_refused():
    model = tiny_llama()
    prepare(model)
    with pytest.raises(ModelError, match="neither moved nor converted"):
        model.to(torch.bfloat16)


def test_moving_a_prepared_model_to_where_it_is_changes_nothing():
    model = tiny_llama()
    prepare(model)
    scores = model(random_ids(1, 4) % 32).logits
    assert torch.equal(model.to("cpu").float()(random_ids(1, 4) % 32).logits, scores)


def test_one_packed_base_serves_with_and_without_its_adapter():
    model = adapted(tiny_llama(tie_word_embeddings=False))
    ids = random_ids(1, 6) % 32
    with torch.no_grad():
        tuned = model(ids).logits
        with model.disable_adapter():
            untuned = model(ids).logits
        prepare(model)
        packed = [part for part in model.modules() if isinstance(part, PackedLinear)]
        assert len(packed) == 2 * 7 + 1  # the adapter's own matrices are not among them
        torch.testing.assert_close(model(ids).logits, tuned, atol=1e-4, rtol=1e-4)
        with model.disable_adapter():
            torch.testing.assert_close(model(ids).logits, untuned, atol=1e-4, rtol=1e-4)


def test_layers_with_hooks_or_without_a_kernel_stay_as_they_are(monkeypatch):
    hooked = in_a_model(nn.Linear(16, 24))
    hooked[0].register_forward_hook(lambda *_: None)
    assert prepare(hooked) == 0
    assert prepare(in_a_model(nn.Linear(16, 24).double())) == 0
    monkeypatch.setattr(packing, "_has_kernel", lambda dtype, product: False)
    assert prepare(tiny_llama()) == 0


@torch.inference_mode()
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_model_that_was_made_for_inference_only_is_packed_like_any_other(is_tied):
    model = tiny_llama(tie_word_embeddings=is_tied)
    model = model.from_pretrained(None, config=model.config, state_dict=weights(model)).eval()
    assert model.lm_head.weight.is_inference()
    ids = random_ids(2, 7) % VOCAB
    before = model(ids).logits
    assert prepare(model) > 0
    torch.testing.assert_close(model(ids).logits, before)
    restore(model)
    assert torch.equal(model(ids).logits, before)


@torch.inference_mode()
def test_projections_that_were_made_for_inference_only_are_not_joined():
    model = tiny_llama()
    model = model.from_pretrained(None, config=model.config, state_dict=weights(model)).eval()
    ids = random_ids(2, 7) % VOCAB
    before = model(ids).logits
    assert join(model) == 0
    assert torch.equal(model(ids).logits, before)


def moves(product):
    return product.keeps_plain and huge_pages._LEAST_BYTES == 1


def test_weights_are_moved_once_and_the_tied_one_with_them(product, monkeypatch):
    if not moves(product):
        pytest.skip("weights stay where they are")
    model = tiny_llama(tie_word_embeddings=True)
    monkeypatch.setattr(huge_pages, "free_bytes", lambda: 0)
    prepare(model)
    assert not huge_pages._rooms or not any(map(huge_pages.lies_in_room, model.parameters()))
    restore(model)
    monkeypatch.undo()
    monkeypatch.setattr(huge_pages, "_LEAST_BYTES", 1)
    monkeypatch.setattr(packing, "_product", lambda *_: product)
    before = weights(model)
    prepare(model)
    assert huge_pages.lies_in_room(model.lm_head.weight)
    assert model.model.embed_tokens.weight.data_ptr() == model.lm_head.weight.data_ptr()
    restore(model)
    moved = {name: weight.data_ptr() for name, weight in model.named_parameters() if "proj" in name}
    assert len(moved) == 14
    prepare(model)
    restore(model)
    assert {name: weight.data_ptr() for name, weight in model.named_parameters() if "proj" in name} == moved
    assert same(weights(model), before)


def test_two_parameters_that_show_one_memory_go_on_doing_so(product):
    model = tiny_llama(tie_word_embeddings=False)
    embedding = model.model.embed_tokens.weight
    model.lm_head.weight = nn.Parameter(embedding.data)
    ids = random_ids(2, 7) % VOCAB
    before = model(ids).logits
    prepare(model)
    torch.testing.assert_close(model(ids).logits, before)
    restore(model)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(model(ids).logits, before)


PREPARED = """
from pathlib import Path
import torch
import fedpt_flwr.few_tokens
from fedpt_flwr import packing
from torch import nn

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

torch.ones(7 << 20)  # freed at once: smaller blocks come from glibc's heap from now on
model = nn.Sequential(*(nn.Linear(1024, 4096, bias=False) for _ in range(40)))
packing.prepare(nn.Sequential(nn.Linear(64, 64)), for_loops=True)
before = resident("VmRSS")
count = packing.prepare(model, for_loops=True)
size = sum(weight.numel() * 4 for weight in model.parameters())
print(count, resident("VmRSS") - before, resident("VmHWM") - before, size)
"""


def test_a_model_does_not_take_its_memory_twice_once_its_weights_were_moved(product):
    if not moves(product):
        pytest.skip("weights stay where they are")
    out = subprocess.run([sys.executable, "-c", PREPARED], capture_output=True, text=True, check=True)
    count, grown, grown_meanwhile, size = map(int, out.stdout.split())
    assert count == 40
    assert grown < 0.2 * size
    assert grown_meanwhile < 0.7 * size


def test_packing_never_holds_more_than_one_layer_twice(product, monkeypatch):
    model = tiny_gpt2() if product.keeps_plain else tiny_llama(tie_word_embeddings=False)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | Conv1D)]
    sizes = [layer.weight.nbytes for layer in layers]
    live = []

    def counted(weight):
        # Those given up have no values, though their layers are kept.
        plain = sum(layer.weight.nbytes for layer in layers if not layer.weight.is_meta)
        packed = sum(
            part._packed.nbytes for part in model.modules() if isinstance(part, PackedLinear) and not part._is_shared
        )
        live.append(plain + packed + weight.nbytes)
        return pack(weight)

    pack = product.pack
    monkeypatch.setattr(product, "pack", counted)
    assert prepare(model) == len(sizes)
    assert max(live) <= sum(sizes) + max(sizes)


def test_a_checkpoint_is_let_go_while_it_is_packed(product, tmp_path):
    if product.keeps_plain and huge_pages._LEAST_BYTES > 1:
        pytest.skip("weights stay where they are")
    tiny_llama(hidden_size=512, intermediate_size=1536, num_attention_heads=8).save_pretrained(tmp_path)
    model = load_causal_lm(str(tmp_path))
    size, before = sum(weight.nbytes for weight in model.parameters()), resident_file_bytes()
    assert all(bool(weight.isfinite().all()) for weight in model.parameters())
    if resident_file_bytes() - before < 0.8 * size:
        pytest.skip("checkpoints are not seen as memory here, or lie in memory anyway")
    before_packing = weights(model)
    prepare(model)
    assert resident_file_bytes() - before < 0.2 * size
    assert same(weights(model), before_packing)


def resident_file_bytes():
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssFile"))


@pytest.mark.parametrize("form", ["full", "adapter"])
def test_a_prepared_proxy_writes_the_same_text(form, tmp_path):
    large = tiny_llama(1, hidden_size=32, tie_word_embeddings=False)
    untuned = tiny_llama(2)
    proxy = ProxyModel(large, tiny_llama(3), untuned) if form == "full" else ProxyModel(large, adapted(untuned))
    ids = random_ids(3, 7) % 32
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    before, stored = proxy.generate(ids, **settings), weights(proxy)
    assert proxy.prepare() is proxy
    assert torch.equal(proxy.generate(ids, **settings), before)
    with pytest.raises(ModelError, match="restore"):
        proxy.save_pretrained(tmp_path / "proxy", large_ref="demo:large", untuned_ref="demo:small")
    assert not (tmp_path / "proxy").exists()
    assert same(weights(proxy.restore()), stored)


@pytest.mark.parametrize("form", ["full", "adapter"])
def test_a_proxy_like_a_prepared_one_shares_what_is_packed(form, tmp_path):
    large, untuned = tiny_llama(1, tie_word_embeddings=False), tiny_llama(2)
    for name, model in (("large", large), ("small", untuned)):
        model.save_pretrained(tmp_path / name)
    tuned = tiny_llama(3) if form == "full" else adapted(untuned)
    proxy = ProxyModel(large, tuned, untuned if form == "full" else None)
    refs = {"large_ref": str(tmp_path / "large"), "untuned_ref": str(tmp_path / "small")}
    proxy.save_pretrained(tmp_path / form, **refs)
    ProxyModel(large, tiny_llama(4), untuned if form == "full" else tiny_llama(2)).save_pretrained(
        tmp_path / "first", **refs
    )
    first = ProxyModel.from_pretrained(tmp_path / "first", prepare=True)
    assert all(is_prepared(part) for part in (first.large, first.untuned))
    assert is_prepared(first.tuned) == suits_single_rows(torch.float32)
    second = ProxyModel.from_pretrained(tmp_path / form, like=first, prepare=True)
    assert second.large is first.large
    assert is_prepared(second.tuned) == suits_single_rows(torch.float32)
    assert is_prepared(first.untuned)
    ids = random_ids(2, 5) % 32
    with torch.no_grad():
        torch.testing.assert_close(second(ids).logits, proxy(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("processor", "is_advised"), [("AVX2", True), ("AVX512", True), ("DEFAULT", False)])
def test_a_package_is_advised_where_it_would_help(product, processor, is_advised, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    assert bool(packing.advice()) == (is_advised and not product.keeps_plain)


@pytest.mark.parametrize(
    ("processor", "dtype", "for_loops", "expected"),
    [
        ("AVX2", torch.float32, False, packing._FewRows),
        ("AVX2", torch.bfloat16, False, packing._FewRows),
        ("AVX512", torch.float32, False, packing._FewRows),
        ("AVX512", torch.bfloat16, False, packing._OneDnn),
        ("AVX512", torch.bfloat16, True, packing._FewRows),
        ("AVX512", torch.float16, True, packing._OneDnn),
        ("DEFAULT", torch.float32, True, packing._OneDnn),
    ],
)
def test_processor_and_dtype_decide_how_weights_lie(processor, dtype, for_loops, expected, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    packing._product.cache_clear()
    try:
        assert type(packing._product(dtype, for_loops)) is expected
    finally:
        packing._product.cache_clear()


def joined(layer):
    attention, mlp = layer.self_attn, layer.mlp
    sets = (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)
    return [packing.joined_weights(parts) for parts in sets]


@pytest.mark.parametrize("biases", [False, True])
def test_weights_with_the_same_input_lie_side_by_side_and_apart_again(biases, tmp_path):
    settings = {"attention_bias": biases, "mlp_bias": biases}
    model, plain = make("llama", **settings), make("llama", **settings)
    ids = random_ids(2, 9)
    expected = model(ids).logits
    assert joined(model.model.layers[1]) == [None, None]
    assert [packing.join(model), packing.join(model)] == [6, 0]
    (weight, bias), _ = joined(model.model.layers[1])
    attention = plain.model.layers[1].self_attn
    assert torch.equal(weight, torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]))
    assert (bias is not None) == biases
    assert torch.equal(model(ids).logits, expected)
    with pytest.raises(ModelError, match="not prepared for decoding"):
        check_plain(model)
    packing.restore(model)
    check_plain(model)
    assert joined(model.model.layers[1]) == [None, None]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for one, other in zip(again.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
    assert all(weight.requires_grad for weight in model.parameters())


def test_layers_with_an_adapter_stay_apart():
    assert packing.join(adapted(make("llama"))) == 0
