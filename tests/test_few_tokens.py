"""A few tokens through compiled layers, against the lean pass through torch's own operations."""

import copy

import pytest
import torch
from peft import LoraConfig
from test_lean import TAKEN
from test_packing import adapted
from test_ragged import make, random_ids
from torch import nn

from fedpt_flwr import huge_pages, lean, packing
from fedpt_flwr.builds import build_of, is_plain_lora
from fedpt_flwr.lean import step_function
from fedpt_flwr.packing import prepare, restore
from fedpt_flwr.proxy import ProxyModel

few_rows = pytest.importorskip("fedpt_flwr.few_rows", reason="compiled loops need the extra fast")
few_tokens = pytest.importorskip("fedpt_flwr.few_tokens", reason="compiled loops need the extra fast")


@pytest.fixture(autouse=True)
def _few_rows_without_gradients(monkeypatch):
    monkeypatch.setattr(packing, "_product", lambda *_: packing._FewRows())  # whatever this processor likes best
    with torch.no_grad():
        yield


@pytest.fixture
def calls(monkeypatch):
    """How many tokens went through the compiled layers, call by call."""
    seen = []
    run = few_tokens.Layers.run

    def watched(layers, cache, x, *rest, **named):
        seen.append(x.shape[0] * x.shape[1])
        return run(layers, cache, x, *rest, **named)

    monkeypatch.setattr(few_tokens.Layers, "run", watched)
    return seen


def steps(stepper, shapes, *, kept=()):
    """Scores of some passes, one after the other; before some of them rows are cut to lengths of their own."""
    cache = stepper.new_cache()
    cache.add_rows(shapes[0][0])
    found = []
    for number, (rows, new) in enumerate(shapes):
        if number in dict(kept):
            cache.cut(dict(kept)[number])
        found.append(stepper(cache, random_ids(rows, new, seed=number), keep=0))
    return found


def taken(shapes, dtype=torch.float32):
    """How many tokens go through compiled layers, of passes that are asked for."""
    return [rows * new for rows, new in shapes if rows * new <= few_rows.MOST_ROWS[dtype]]


SHAPES = {
    "one row": [(1, 12), (1, 1), (1, 4), (1, 3), (1, 8), (1, 2), (1, 7), (1, 1)],
    "rows": [(2, 12), (2, 1), (2, 4), (2, 3), (2, 2), (2, 1)],
    "beyond the loops": [(4, 4), (4, 20), (4, 3), (4, 17), (4, 2), (4, 1)],
    "many": [(4, 9), (4, 4), (4, 16), (4, 1), (4, 5), (4, 3)],
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", TAKEN)
def test_the_scores_are_those_of_torch(name, shapes, calls, monkeypatch):
    family, settings = TAKEN[name]
    model = make(family, **settings)
    prepare(model)
    stepper = step_function(model)
    calls.clear()
    kept = [(3, [10, 7, 9, 8][: shapes[0][0]]), (5, [11] * shapes[0][0])]
    found = steps(stepper, shapes, kept=kept)
    assert calls == taken(shapes)
    monkeypatch.setattr(lean, "_few_tokens", lambda: None)
    for ours, expected in zip(found, steps(stepper, shapes, kept=kept), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt-neox"])
def test_bfloat16_is_rounded_no_more_than_by_torch(family, shapes, calls, monkeypatch):
    model = make(family).bfloat16()
    exact = copy.deepcopy(model).float()
    prepare(model)
    stepper = step_function(model)
    calls.clear()
    found = steps(stepper, shapes)
    assert calls == taken(shapes, torch.bfloat16)
    assert all(scores.dtype == torch.bfloat16 for scores in found)
    monkeypatch.setattr(lean, "_few_tokens", lambda: None)
    right, by_torch = steps(step_function(exact), shapes), steps(stepper, shapes)

    def error(scores):
        return torch.cat([(ours.float() - others).flatten() for ours, others in zip(scores, right, strict=True)]).norm()

    assert 0 < error(found) < 1.1 * error(by_torch)


def test_a_row_gives_the_same_bits_whatever_stands_beside_it(calls):
    model = make("qwen3")
    prepare(model)
    stepper = step_function(model)
    calls.clear()
    caches = [stepper.new_cache(), stepper.new_cache()]
    for cache, rows in zip(caches, (3, 2), strict=True):
        cache.add_rows(rows)
    for number in range(4):
        ids = random_ids(3, 1, seed=number)
        three, two = stepper(caches[0], ids, keep=0), stepper(caches[1], ids[:2], keep=0)
        assert torch.equal(three[:2], two)
    assert calls == [3, 2] * 4


def test_what_was_written_in_inference_mode_can_be_read_and_gone_on_with(calls):
    model = make("llama")
    prepare(model)
    stepper = step_function(model)
    calls.clear()
    with torch.inference_mode():
        inside = steps(stepper, [(1, 4), (1, 1), (1, 2)])
    assert calls == [4, 1, 2]
    for ours, expected in zip(inside, steps(stepper, [(1, 4), (1, 1), (1, 2)]), strict=True):
        assert torch.equal(ours, expected)


def test_only_plain_prepared_weights_are_taken(calls):
    model = make("llama")
    stepper = step_function(model)
    steps(stepper, [(1, 2)])
    assert calls == []  # not prepared
    prepare(model)
    steps(stepper, [(1, 2)])
    assert calls == [2]
    restore(model)
    steps(stepper, [(1, 2)])
    assert calls == [2]


@pytest.mark.parametrize("name", TAKEN)
def test_rough_scores_are_nearly_those_of_the_model_and_leave_a_usable_cache(name, calls):
    family, settings = TAKEN[name]
    model = make(family, **settings)
    prepare(model)
    stepper = step_function(model)
    cache, ids = stepper.new_cache(), random_ids(1, 12, seed=3)
    cache.add_rows(1)
    stepper(cache, ids)
    exact = stepper(cache, ids[:, :6], keep=0)
    cache.cut([12])
    calls.clear()
    rough = torch.cat([stepper.rough(cache, ids[:, place : place + 1]) for place in range(6)], 1)
    assert calls == [1] * 6
    assert rough.dtype == exact.dtype
    assert 0.0 < (rough - exact).abs().max() < 0.1 * exact.abs().max()
    cache.cut([12])
    assert torch.equal(stepper(cache, ids[:, :6], keep=0), exact)


def test_rounded_copies_lie_in_large_pages(monkeypatch):
    if not huge_pages._page_bytes():
        pytest.skip("this system has no huge pages")
    monkeypatch.setattr(huge_pages, "_LEAST_BYTES", 1)
    model = make("llama")
    prepare(model)
    rough = step_function(model).rough
    *_, layers = rough._known
    weights = [held for held in layers._held if isinstance(held, torch.Tensor)]
    assert len(weights) == 7 * len(model.model.layers) + 1
    assert all(map(huge_pages.lies_in_room, weights))


def test_there_are_rough_scores_where_weights_are_plain_prepared_ones():
    model = make("llama")
    stepper = step_function(model)
    assert stepper.rough is None
    prepare(model)
    first = stepper.rough
    assert stepper.rough is first is not None
    pair = adapted(make("llama"))  # which is to need the memory of one model
    prepare(pair)
    assert step_function(pair).rough is None
    restore(model)
    assert stepper.rough is None
    with torch.no_grad():
        model.lm_head.weight.neg_()
    prepare(model)
    cache = stepper.new_cache()
    cache.add_rows(1)
    exact = stepper(cache, random_ids(1, 4), keep=0)
    cache.cut([0])
    assert (stepper.rough(cache, random_ids(1, 4), keep=0) - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt-neox"])
def test_an_adapter_is_added_switched_and_changed_as_by_torch(family, shapes, calls, monkeypatch):
    is_turned, has_bias = family == "gpt2", family != "llama"
    tuned = adapted(make(family), fan_in_fan_out=is_turned)
    proxy = ProxyModel(make("llama"), tuned)
    proxy.prepare()
    steppers = proxy.steppers()

    def check():
        calls.clear()
        found = [steps(steppers[name], shapes) for name in ("tuned", "untuned")]
        assert calls == taken(shapes) * 2
        with monkeypatch.context() as patched:
            patched.setattr(lean, "_few_tokens", lambda: None)
            expected = [steps(steppers[name], shapes) for name in ("tuned", "untuned")]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        return [torch.cat([scores.flatten() for scores in of_one]) for of_one in found]

    with_adapter, without = check()
    assert (with_adapter - without).norm() > 0.01 * without.norm()
    layers = [part for part in tuned.modules() if is_plain_lora(part)]
    with torch.inference_mode():  # where torch does not count changes
        for layer in layers:
            layer.lora_B["default"].weight.mul_(-1)
    changed, still_without = check()
    assert torch.equal(still_without, without)
    assert (changed - with_adapter).norm() > 0.01 * without.norm()
    for layer in layers:
        layer.scaling["default"] *= -1
    torch.testing.assert_close(check()[0], with_adapter, atol=1e-4, rtol=1e-4)
    targets = ["q_proj", "c_fc", "dense"]
    tuned.add_adapter("other", LoraConfig(r=17, target_modules=targets, lora_bias=has_bias, fan_in_fan_out=is_turned))
    for layer in layers:
        if "other" in layer.lora_B:
            for weight in layer.lora_B["other"].parameters():
                nn.init.normal_(weight, std=0.05)
    tuned.base_model.set_adapter(["default", "other"])
    tuned.requires_grad_(False).eval()
    both, _ = check()
    assert (both - with_adapter).norm() > 0.01 * without.norm()
    tuned.set_adapter("other")
    assert (check()[0] - both).norm() > 0.01 * without.norm()


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [(torch.float32, torch.float64), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_an_adapter_of_any_dtype_is_as_near_as_torchs(dtype, adapter_dtype, calls, monkeypatch):
    model = adapted(make("llama").to(dtype))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.to(adapter_dtype)
    exact = copy.deepcopy(model).float()
    prepare(model)
    stepper = step_function(model)
    calls.clear()
    found = steps(stepper, SHAPES["one row"])
    assert calls == taken(SHAPES["one row"], dtype)
    monkeypatch.setattr(lean, "_few_tokens", lambda: None)
    right, by_torch = steps(step_function(exact), SHAPES["one row"]), steps(stepper, SHAPES["one row"])

    def error(scores):
        return max((ours.float() - others).abs().max() for ours, others in zip(scores, right, strict=True))

    assert error(found) < 1.1 * error(by_torch) + 1e-5


def test_norms_of_another_dtype_go_through_torch():
    model = make("llama")
    prepare(model)
    build = build_of(model)
    assert few_tokens.layers_of(build.blocks(), build.norm, build.head()) is not None
    model.model.layers[1].input_layernorm.double()
    assert few_tokens.layers_of(build.blocks(), build.norm, build.head()) is None


def test_a_head_that_is_not_prepared_is_torchs(calls, monkeypatch):
    model = make("llama")
    prepare(model)
    model.lm_head = model.lm_head.unpack()
    found = steps(step_function(model), SHAPES["rows"])
    assert calls
    monkeypatch.setattr(lean, "_few_tokens", lambda: None)
    for ours, expected in zip(found, steps(step_function(model), SHAPES["rows"]), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_rows_that_are_not_those_of_the_cache_are_refused():
    model = make("llama")
    prepare(model)
    stepper = step_function(model)
    cache = stepper.new_cache()
    cache.add_rows(2)
    with pytest.raises(ValueError, match="1 rows of tokens are given for a cache of 2"):
        stepper(cache, random_ids(1, 3))


def test_a_layer_that_was_exchanged_is_found_by_the_next_text(calls):
    model, other = make("llama"), make("llama")
    for weight in other.model.layers[0].mlp.parameters():
        weight.mul_(-1)
    for one in (model, other):
        prepare(one)
    stepper = step_function(model)
    before = steps(stepper, [(1, 4)])[0]
    model.model.layers[0].mlp = other.model.layers[0].mlp
    calls.clear()
    assert (steps(stepper, [(1, 4)])[0] - before).norm() > 0.01 * before.norm()
    assert calls == [4]


@pytest.mark.parametrize("num_tokens", [1, 4, 8, 20])
def test_the_number_of_threads_changes_no_bit(num_tokens, calls):
    model = make("llama")
    prepare(model)
    stepper = step_function(model)
    alone = steps(stepper, [(1, num_tokens)])
    try:
        torch.set_num_threads(2)
        assert torch.equal(steps(stepper, [(1, num_tokens)])[0], alone[0])
    finally:
        torch.set_num_threads(1)
    assert calls[-2:] == [num_tokens, num_tokens]


def test_what_is_not_finite_stays_so(calls):
    model = make("llama")
    prepare(model)
    stepper = step_function(model)
    cache = stepper.new_cache()
    cache.add_rows(2)
    stepper(cache, random_ids(2, 2))
    calls.clear()
    cache.layers[0].values[1, 0, 1, 0] = torch.nan
    found = stepper(cache, random_ids(2, 1), keep=0).isfinite().all(-1).all(-1)
    assert (calls, found.tolist()) == ([2], [True, False])
