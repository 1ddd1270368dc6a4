"""Triton's kernels against plain formulas, and passes through them against the ordinary ones.

On a GPU they run as they are. Without one Triton's interpreter runs them, if Triton is there: it must be switched on
before Triton is imported, and would slow down others' kernels, so these tests then run in a process of their own.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from test_packing import adapted
from test_ragged import make, random_ids, read
from torch import nn

from fedpt_flwr import lean, packing
from fedpt_flwr.builds import build_of
from fedpt_flwr.graphs import GraphedStepper, graphed
from fedpt_flwr.lean import LeanStepper, step_function
from fedpt_flwr.proxy import ProxyModel

HAS_TRITON = importlib.util.find_spec("triton") is not None
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu"
RUNS = HAS_TRITON and (IS_INTERPRETED or DEVICE == "cuda")

if RUNS:
    from fedpt_flwr import fused

needs_kernels = pytest.mark.skipif(not RUNS, reason="run in a process of their own, if Triton is there")
needs_gpu = pytest.mark.skipif(not (RUNS and DEVICE == "cuda"), reason="needs a GPU")

if RUNS and IS_INTERPRETED:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def _index(number):
        return number if isinstance(number, int) else int(number.handle.data.item())

    def _dot(self, one, other, *rest, dot=interpreter.InterpreterBuilder.create_dot):
        return dot(self, _widened(one), _widened(other), *rest)

    def _widened(handle):
        if handle.dtype != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    # Some versions cannot count with NumPy's later ones, and all multiply the bits of bfloat16 as if they were numbers.
    fused.range = lambda *bounds: range(*map(_index, bounds))
    interpreter.InterpreterBuilder.create_dot = _dot

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
if DEVICE == "cpu":
    TOLERANCES[torch.bfloat16] = 6e-2  # the interpreter cuts off instead of rounding

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # of the interpreter


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON or RUNS, reason="no Triton, or they run here")
def test_under_the_interpreter():
    outcome = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stdout[-5000:]
    assert " passed" in outcome.stdout


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(found, expected, dtype):
    assert found.dtype == dtype
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(found.float(), expected.float(), atol=tolerance, rtol=tolerance)


def norm_of(size, dtype, seed=9):
    norm = nn.Module()
    norm.weight, norm.variance_epsilon = numbers(size, dtype=dtype, seed=seed) + 1, 1e-5
    return norm


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [1, 40, 512, 1000])
def test_a_sum_is_normed(size, dtype):
    x, change, norm = numbers(3, size, dtype=dtype), numbers(3, size, dtype=dtype, seed=1), norm_of(size, dtype)
    before = x.clone()
    total, normed = fused.add_rms_norm(x, change, norm)
    close(total, x + change, dtype)
    close(normed, F.rms_norm(x + change, (size,), norm.weight, 1e-5), dtype)
    total, normed = fused.add_rms_norm(x, None, norm)
    assert torch.equal(total, before)
    close(normed, F.rms_norm(x, (size,), norm.weight, 1e-5), dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [1, 100, 1024, 1500])
def test_a_gate_lets_through(size, dtype):
    both = numbers(3, 2 * size, dtype=dtype) * 4
    both[0, 0], both[0, -1] = -200.0, 200.0
    gate, up = both[:, :size], both[:, size:]  # parts of longer rows
    close(fused.silu_and_mul(gate, up), F.silu(gate) * up, dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize(("size", "num_heads", "num_key_heads"), [(8, 4, 2), (64, 2, 2), (80, 3, 1), (96, 2, 1)])
def test_queries_and_keys_are_turned_and_stored(size, num_heads, num_key_heads, has_norms, dtype):
    starts, num_new = torch.tensor([5, 0, 2], device=DEVICE), 3
    positions = starts[:, None] + torch.arange(num_new, device=DEVICE)
    parts = [num_heads * size, num_key_heads * size, num_key_heads * size]
    queries, keys, values = numbers(9, sum(parts), dtype=dtype).split(parts, 1)
    angles = numbers(3, num_new, size // 2, seed=1)
    angles = torch.cat([angles, angles], -1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    stored = [numbers(4, num_key_heads, 11, size, dtype=dtype, seed=seed) for seed in (2, 3)]
    expected = [one.clone() for one in stored]
    norms = (norm_of(size, dtype, 4), norm_of(size, dtype, 5)) if has_norms else None

    shaped = [part.reshape(3, num_new, -1, size) for part in (queries, keys, values)]
    if norms:
        shaped[:2] = [
            F.rms_norm(part, (size,), norm.weight, 1e-5) for part, norm in zip(shaped[:2], norms, strict=True)
        ]
    half = size // 2
    rotation = lean._rotation(cos.view(-1, size)[:, :half], sin.view(-1, size)[:, :half], 3)
    shaped[:2] = [lean._rotated(part, rotation, lambda shape, x: x.new_empty(shape)) for part in shaped[:2]]
    for one, part in zip(expected, shaped[1:], strict=True):
        one[torch.arange(3, device=DEVICE)[:, None], :, positions] = part

    views = [one[:3, :, :9] for one in stored]
    turned = fused.rotate_and_store(queries, keys, values, *views, positions, (cos, sin), norms)
    close(turned.view(shaped[0].shape), shaped[0], dtype)
    close(stored[0], expected[0], dtype)
    assert torch.equal(stored[1], expected[1])


def attention(queries, keys, values, starts, window, scale):
    """Row by row, over what each may see and nothing else."""
    num_rows, num_key_heads, _, size = keys.shape
    queries = queries.view(num_rows, -1, queries.shape[1] // size, size).float()
    groups = queries.shape[2] // num_key_heads
    rows = []
    for row, start in enumerate(starts):
        for new in range(queries.shape[1]):
            seen = slice(0 if window is None else max(0, start + new + 1 - window), start + new + 1)
            key, value = (part[row, :, seen].float().repeat_interleave(groups, 0) for part in (keys, values))
            weights = (torch.einsum("hd,hcd->hc", queries[row, new], key) * scale).softmax(-1)
            rows.append(torch.einsum("hc,hcd->hd", weights, value).flatten())
    return torch.stack(rows)


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize(
    ("size", "num_heads", "num_key_heads", "num_new", "window"),
    [
        (64, 2, 2, 1, None),
        (64, 2, 2, 1, 20),
        (8, 4, 2, 3, None),
        (80, 3, 1, 5, 7),
        (128, 4, 1, 8, None),
        (128, 2, 2, 2, 300),
        (96, 2, 1, 8, 1),
        (256, 2, 2, 4, 70),
    ],
)
def test_new_tokens_attend_to_their_own_row(
    size, num_heads, num_key_heads, num_new, window, num_splits, dtype, monkeypatch
):
    monkeypatch.setattr(fused, "_num_splits", lambda *_: num_splits)
    lengths = [0, 3, 150, 63]
    columns = max(lengths) + num_new
    queries = numbers(4 * num_new, num_heads * size, dtype=dtype)
    stored = [numbers(5, num_key_heads, columns + 9, size, dtype=dtype, seed=seed) for seed in (1, 2)]
    for row, length in enumerate(lengths):
        for one in stored:
            one[row, :, length + num_new :] = torch.nan  # must not be looked at
    keys, values = (one[:4, :, :columns] for one in stored)
    positions = torch.tensor(lengths, device=DEVICE)[:, None] + torch.arange(num_new, device=DEVICE)
    found = fused.attend(queries, keys, values, positions, window, size**-0.5)
    close(found, attention(queries, keys, values, lengths, window, size**-0.5), dtype)


@needs_kernels
def test_columns_are_split_where_there_are_many_and_few_programs():
    assert [fused._num_splits(columns, 4) for columns in (1, 512, 513, 2048, 10**6)] == [1, 1, 4, 8, 16]
    assert [fused._num_splits(2048, programs) for programs in (64, 128, 512, 1000)] == [8, 4, 1, 1]


WINDOWS = {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1}
MODELS = {
    "llama": ("llama", {}),
    "llama, one key per head, biases": ("llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "llama, other sizes": ("llama", {"hidden_size": 60, "head_dim": 20, "num_attention_heads": 6}),
    "mistral, window": ("mistral, window", {}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows and not": ("qwen2", WINDOWS),
    "qwen3": ("qwen3", {}),
    "qwen3, windows and not": ("qwen3", WINDOWS),
}


@pytest.fixture
def passes(monkeypatch):
    """Numbers of tokens that went through the kernels, wherever they run."""
    taken = []
    run = fused.run

    def watched(blocks, cache, x, *args):
        taken.append(len(x))
        return run(blocks, cache, x, *args)

    monkeypatch.setattr(fused, "run", watched)
    monkeypatch.setattr(lean, "_fused", lambda kind: fused)
    return taken


def without_kernels(model):
    step = LeanStepper(model, build_of(model))
    step.fuses = False
    return step


def scores_of(step, num_rows=3):
    """Rows that begin with unequal lengths, get several tokens or one, are cut, and one of which leaves."""
    prompts = [random_ids(length, seed=length) for length in (5, 21, 3)]
    cache, after = read(step, prompts)
    scores = [torch.stack(after)]
    for turn, num_new in enumerate((1, 3, 8, 1, 2)):
        scores.append(step(cache, random_ids(cache.num_rows, num_new, seed=50 + turn), keep=0))
        if turn == 1:
            cache.cut([length - 2 * (row == 1) for row, length in enumerate(cache.lengths)])
        if turn == 2:
            cache.remove(0)
    return scores


def alike(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        share = 1e-4 if one.dtype == torch.float32 else 0.1
        assert (one - other).abs().max() <= share * other.abs().max()


@needs_kernels
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for dtype in FLOATS for name in MODELS if dtype == torch.float32 or name in ("llama", "qwen3")],
)
def test_a_pass_scores_as_without_the_kernels(name, dtype, passes):
    family, settings = MODELS[name]
    model = make(family, **settings).to(DEVICE, dtype)
    step = step_function(model)
    assert type(step) is LeanStepper
    assert step.fuses
    del passes[:]
    found = scores_of(step)
    assert passes == [3, 9, 24, 2, 4]
    expected = scores_of(without_kernels(model))
    assert len(passes) == 5
    alike(found, expected)


@needs_kernels
def test_an_adapter_is_on_or_off_as_the_context_says(passes):
    proxy = ProxyModel(make("llama"), adapted(make("llama")))
    proxy.to(DEVICE)
    steps = {
        "on": (step_function(proxy.tuned), without_kernels(proxy.tuned)),
        "off": (
            step_function(proxy.tuned, proxy.without_adapter),
            LeanStepper(proxy.tuned, build_of(proxy.tuned), proxy.without_adapter),
        ),
    }
    steps["off"][1].fuses = False
    found = {}
    for _ in range(2):
        for name, (step, plain) in steps.items():
            del passes[:]
            found[name], expected = scores_of(step), scores_of(plain)
            assert len(passes) == 5
            alike(found[name], expected)
    assert (found["on"][1] - found["off"][1]).abs().max() > 0.01


@needs_kernels
@pytest.mark.parametrize(
    ("settings", "dtype", "num_rows", "num_new"),
    [
        ({}, torch.float32, 1, 9),
        ({}, torch.float32, 33, 8),
        ({}, torch.float64, 1, 1),
        ({"hidden_act": "gelu"}, torch.float32, 1, 1),
        ({"head_dim": 272}, torch.float32, 1, 1),
        ({"head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 1}, torch.float32, 1, 8),
    ],
)
def test_what_is_not_for_the_kernels_goes_the_other_way(settings, dtype, num_rows, num_new, passes):
    model = make("llama", **settings).to(DEVICE, dtype)
    for step in (LeanStepper(model, build_of(model)), without_kernels(model)):
        cache = step.new_cache()
        cache.add_rows(num_rows)
        step(cache, random_ids(num_rows, num_new))
    assert not passes


@needs_kernels
def test_kernels_that_score_otherwise_are_not_used(passes, monkeypatch):
    monkeypatch.setattr(fused, "silu_and_mul", lambda gate, up: gate * up)
    step = step_function(make("llama").to(DEVICE))
    assert type(step) is LeanStepper
    assert not step.fuses


@needs_kernels
def test_kernels_that_fail_are_not_used(passes, monkeypatch):
    monkeypatch.setattr(fused, "attend", lambda *_: 1 / 0)
    step = step_function(make("llama").to(DEVICE))
    assert type(step) is LeanStepper
    assert not step.fuses


@needs_kernels
def test_recorded_passes_read_lengths_when_they_are_run(passes):
    from test_graphs import Again

    model = make("mistral, window").to(DEVICE)
    record = Again()
    step = GraphedStepper(step_function(model), record)
    del passes[:]
    found, expected = scores_of(step), scores_of(without_kernels(model))
    assert record.num_replays == 5
    assert set(passes) == {4, 16, 32, 2}  # rows that are not there, and tokens, fill up
    alike(found, expected)


@needs_kernels
@pytest.mark.parametrize("name", ["llama", "llama, one key per head, biases", "qwen2"])
def test_weights_that_lie_side_by_side_are_one_product(name, passes, monkeypatch):
    family, settings = MODELS[name]
    model, plain = (make(family, **settings).to(DEVICE) for _ in range(2))
    num_memories = len({weight.untyped_storage().data_ptr() for weight in model.parameters()})
    num_linear = []

    def counted(*args):
        num_linear.append(args)
        return product(*args)

    product = F.linear
    monkeypatch.setattr(F, "linear", counted)
    step = step_function(model)
    counts = []
    for change in (lambda model: None, packing.join, packing.join, packing.restore):
        changed = change(model)
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(one, other)
        del num_linear[:], passes[:]
        cache = step.new_cache()
        cache.add_rows(3)
        found = [step(cache, random_ids(3, 3, seed=1), keep=0)]
        counts.append((changed, len(num_linear)))
        cache = step.new_cache()
        cache.add_rows(3)
        alike(found, [without_kernels(plain)(cache, random_ids(3, 3, seed=1), keep=0)])
    assert counts == [(None, 15), (6, 9), (0, 9), (None, 15)]
    assert passes
    assert num_memories == len({weight.untyped_storage().data_ptr() for weight in model.parameters()})


@needs_kernels
def test_weights_that_were_side_by_side_and_moved_are_several_products_again(passes):
    model, plain = make("llama").to(DEVICE), make("llama").to(DEVICE, torch.float16)
    assert packing.join(model) == 6
    assert len({weight.untyped_storage().data_ptr() for weight in model.parameters()}) == 15
    model.to(torch.float16)
    attention = model.model.layers[0].self_attn
    assert packing.joined_weights([attention.q_proj, attention.k_proj, attention.v_proj]) is None
    alike(scores_of(step_function(model)), scores_of(without_kernels(plain)))


@needs_kernels
def test_layers_with_an_adapter_stay_apart(passes):
    tuned = adapted(make("llama")).to(DEVICE)
    assert packing.join(tuned) == 0


@needs_gpu
def test_they_work_here():
    assert fused.is_available()


@needs_gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", MODELS)
def test_graphs_of_passes_score_as_without_the_kernels(name, dtype):
    family, settings = MODELS[name]
    model = make(family, **settings).to(DEVICE, dtype)
    step = graphed(step_function(model))
    assert type(step) is GraphedStepper
    assert step._step.fuses
    alike(scores_of(step), scores_of(without_kernels(model)))


def test_without_a_gpu_there_are_none():
    assert lean._fused("cpu") is None
