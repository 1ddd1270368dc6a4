"""Products of few rows with plain weights, against torch's own."""

import math
import os
import re
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F

few_rows = pytest.importorskip("fedpt_flwr.few_rows", reason="compiled loops need the extra fast")

SIZES = [(24, 16), (7, 5), (1, 1), (130, 257), (7, 1000), (7, 2050), (130, 2060)]


def case(num_rows, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    num_out, num_in = size
    return [torch.randn(shape, generator=generator) for shape in ((num_rows, num_in), (num_out, num_in), (num_out,))]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_rows", [*range(1, 11), 15, 16, 27, 32, 33, 48, 63, 64, 65])
def test_products_are_those_of_torch(num_rows, size):
    x, weight, bias = case(num_rows, size)
    for added in (bias, None):
        expected = F.linear(x.double(), weight.double(), None if added is None else added.double())
        torch.testing.assert_close(few_rows.multiply(x, weight, added).double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("all_by_loops", [False, True])
@pytest.mark.parametrize("num_rows", [3, 64, 65, 70, 150, 200])
def test_products_are_written_where_they_are_to_be(num_rows, all_by_loops, monkeypatch):
    monkeypatch.setattr(few_rows, "_TAKES_ALL", all_by_loops)
    x, weight, bias = case(num_rows, (130, 257))
    for added in (bias, None):
        out = torch.full((num_rows, 130), torch.nan)
        assert few_rows.multiply(x, weight, added, out) is out
        assert not out.requires_grad
        expected = F.linear(x.double(), weight.double(), None if added is None else added.double())
        torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(few_rows.multiply(x, weight, added), out, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_rows", [*range(1, 10), 15, 16, 17, 32, 33, 48, 64, 65])
def test_products_of_bfloat16_are_rounded_once(num_rows, size):
    x, weight, bias = (part.bfloat16() for part in case(num_rows, size))
    for added in (bias, None):
        exact = F.linear(x.double(), weight.double(), None if added is None else added.double())
        found = few_rows.multiply(x, weight, added)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=1.01 * 2**-8)


def test_a_row_that_begins_between_two_pairs_is_read():
    _, weight, _ = case(1, (24, 16))
    x = torch.randn(1 + 20 * 16).bfloat16()[1:].view(20, 16)
    found = few_rows.multiply(x, weight.bfloat16(), None)
    assert torch.equal(found, few_rows.multiply(x.clone(), weight.bfloat16(), None))


@pytest.mark.parametrize("num_rows", [2, 4, 8, 12, 20, 40])
@pytest.mark.parametrize("size", [(130, 257), (31, 2050), (40, 256)])
def test_the_number_of_threads_changes_no_bit(size, num_rows):
    x, weight, bias = case(num_rows, size)
    whole, most = size[1] // 2 * 2, few_rows.MOST_ROWS[torch.bfloat16]
    even = x[:most, :whole], weight[:, :whole]  # all others of bfloat16 are torch's
    alone = [few_rows.multiply(x, weight, bias), sums_of_bfloat16(*even)]
    try:
        torch.set_num_threads(2)
        assert torch.equal(few_rows.multiply(x, weight, bias), alone[0])
        assert torch.equal(sums_of_bfloat16(*even), alone[1])
    finally:
        torch.set_num_threads(1)


def sums_of_bfloat16(x, weight):
    """What the loop for weights of bfloat16 adds up, before it is rounded."""
    found = torch.full((len(x), len(weight)), torch.nan)
    loop = few_rows.loop_for(torch.bfloat16, len(x))
    scratch = few_rows.scratch(len(x), *weight.shape)
    loop(few_rows.bits_of(weight.bfloat16()), x.contiguous().numpy(), found.numpy(), scratch)
    return found


@pytest.mark.parametrize("size", SIZES)
def test_a_row_times_bfloat16_gives_the_same_bits_whatever_stands_beside_it(size):
    x, weight, _ = case(9, size)
    x = x.bfloat16().float()  # else some processors round it
    together = sums_of_bfloat16(x, weight)
    torch.testing.assert_close(
        together.double(), F.linear(x.double(), weight.bfloat16().double()), atol=1e-4, rtol=1e-5
    )
    for number in range(1, 9):
        assert torch.equal(sums_of_bfloat16(x[:number], weight), together[:number])
        assert torch.equal(sums_of_bfloat16(x[-number:], weight), together[-number:])


@pytest.mark.parametrize("size", [(130, 257), (5, 2050), (130, 2060), (2, 60592)])
@pytest.mark.parametrize(("fewest", "most"), [(1, few_rows.MANY_ROWS - 1), (few_rows.MANY_ROWS, 64)])
def test_a_row_gives_the_same_bits_whatever_stands_beside_it(fewest, most, size):
    x, weight, bias = case(most, size)
    together = few_rows.multiply(x, weight, bias)
    for number in range(fewest, most):
        assert torch.equal(few_rows.multiply(x[:number], weight, bias), together[:number])
        assert torch.equal(few_rows.multiply(x[-number:], weight, bias), together[-number:])


@pytest.mark.skipif(few_rows.MOST_ROWS[torch.bfloat16] < 64, reason="this processor leaves many rows to torch")
@pytest.mark.parametrize("size", [(130, 256), (5, 2050), (30, 2064)])
@pytest.mark.parametrize(("fewest", "most"), [(9, few_rows.MANY_ROWS - 1), (few_rows.MANY_ROWS, 64)])
def test_a_row_of_bfloat16_gives_the_same_bits_whatever_stands_beside_it(fewest, most, size):
    x, weight, _ = case(most, size)
    together = sums_of_bfloat16(x, weight)
    for number in range(fewest, most):
        assert torch.equal(sums_of_bfloat16(x[:number], weight), together[:number])
        assert torch.equal(sums_of_bfloat16(x[-number:], weight), together[-number:])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_rows", [3, 17, 32])
def test_a_product_stays_what_it_is_when_the_next_one_is_made(num_rows, size):
    x, weight, bias = case(num_rows, size)
    found = few_rows.multiply(x, weight, bias)
    before = found.clone()
    few_rows.multiply(x.neg(), weight, bias)
    assert torch.equal(found, before)


def test_a_thread_goes_on_after_inference_mode_and_after_another_default_device(monkeypatch):
    monkeypatch.setattr(few_rows, "_held", threading.local())
    x, weight, bias = case(17, (40, 30))
    expected = F.linear(x, weight, bias)
    with torch.inference_mode(), torch.device("meta"):
        torch.testing.assert_close(few_rows.multiply(x, weight, bias), expected, check_device=True)
    torch.testing.assert_close(few_rows.multiply(x, weight, bias), expected)


def test_what_a_thread_keeps_is_bounded(monkeypatch):
    monkeypatch.setattr(few_rows, "_held", threading.local())
    monkeypatch.setattr(few_rows, "_MOST_SCRATCH_BYTES", 4 * 64 * 64)
    for size in ((10, 200), (200, 10)):
        x, weight, bias = case(33, size)
        torch.testing.assert_close(few_rows.multiply(x, weight, bias), F.linear(x, weight, bias), atol=1e-4, rtol=1e-5)
    assert sum(held.nbytes for held in vars(few_rows._held).values()) <= 4 * 64 * 64


@pytest.mark.parametrize("shape", [(1, 1), (7, 40), (16, 16), (37, 129), (64, 64), (8, 33)])
def test_a_matrix_is_turned_and_nothing_beside_it_written(shape):
    matrix = torch.arange(float(shape[0] * shape[1])).view(shape)
    wide = torch.cat([matrix, torch.full((shape[0], 5), -1.0)], 1)
    turned = torch.full((shape[1] + 2, shape[0] + 3), -2.0)
    few_rows._turn(wide.numpy(), turned.numpy(), *shape)
    assert torch.equal(turned[: shape[1], : shape[0]], matrix.t())
    assert bool((turned[shape[1] :] == -2).all())
    assert bool((turned[:, shape[0] :] == -2).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [3, 17])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value, num_rows, dtype):
    x, weight, _ = (part.to(dtype) for part in case(num_rows, (24, 64)))
    x[1, 5] = value
    found = few_rows.multiply(x, weight, None).isfinite().all(-1)
    assert found.tolist() == [row != 1 for row in range(num_rows)]


def test_numbers_are_stored_as_bfloat16_as_torch_does_it():
    numbers = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 3.4e38, 1e-40])])
    numbers = torch.cat([numbers, torch.arange(0x3F800000, 0x3F830000, 0x4000, dtype=torch.int32).view(torch.float32)])

    @few_rows.numba.njit
    def store(values, held):
        for place in range(len(values)):
            held[place] = few_rows.as_stored(values[place], held[place])

    held = torch.zeros(len(numbers), dtype=torch.int16)
    store(numbers.numpy(), held.numpy())
    torch.testing.assert_close(held.view(torch.bfloat16), numbers.bfloat16(), atol=0, rtol=0, equal_nan=True)


def test_weights_that_nobody_may_write_to_are_read():
    x, weight, _ = case(3, (24, 16))
    with torch.inference_mode():
        frozen = weight.clone()
        torch.testing.assert_close(few_rows.multiply(x.clone(), frozen, None), x @ weight.T)


@pytest.fixture
def _fresh():
    few_rows._kernel.cache_clear()
    yield
    few_rows._kernel.cache_clear()


@pytest.mark.usefixtures("_fresh")
def test_where_nothing_can_be_kept_on_disk_loops_are_compiled_all_the_same(monkeypatch):
    jit = few_rows.numba.njit

    def nowhere(*arguments, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return jit(*arguments, **options)

    monkeypatch.setattr(few_rows.numba, "njit", nowhere)
    x, weight, _ = case(3, (24, 16))
    torch.testing.assert_close(few_rows.multiply(x, weight, None), x @ weight.T)


@pytest.mark.slow
def test_whatever_is_kept_on_disk_has_a_list_of_its_own(tmp_path):
    # Two processes that compile at once would overwrite each other's entries in one list.
    compiling = """
import torch
from fedpt_flwr import few_rows, few_tokens
for num_rows, dtype, num_threads in CASES:
    torch.set_num_threads(num_threads)
    few_rows.multiply(torch.randn(num_rows, 20).to(dtype), torch.randn(4, 20).to(dtype), None)
"""
    of_each = "(1, torch.float32, 1), (2, torch.float32, 1), (2, torch.bfloat16, 1), (16, torch.float32, 1)"

    def compile_in_a_process(cases, settings=None):
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "2"} | (settings or {})
        subprocess.run([sys.executable, "-c", compiling.replace("CASES", cases)], env=environment, check=True)

    compile_in_a_process(of_each)
    compile_in_a_process("(2, torch.float32, 2),")
    compile_in_a_process(of_each, {"ATEN_CPU_CAPABILITY": "avx2"})
    lists, codes = (sorted(tmp_path.rglob(f"*.{ending}")) for ending in ("nbi", "nbc"))
    assert len(lists) == len(codes) > 7
    assert sum("in_threads" in name.name for name in lists) >= 1

    for file in lists + codes:  # as if of another state of the files
        file.rename(file.with_name(re.sub("_[0-9a-f]{8}-", "_00000000-", file.name)))
    compile_in_a_process("(2, torch.float32, 1),")
    kept = [file.name for file in tmp_path.rglob("*_00000000-*.nbi")]
    assert len(kept) < len(lists)
    for_two_rows = re.compile(r"few_rows\._loop\.locals\.loop_2_float32_\d+_00000000")
    assert any(map(for_two_rows.match, kept)) == (few_rows.LANES != 8)  # those of the other lanes
    assert any("_loop_2_int16" in name or "loop_1_" in name for name in kept)


def test_without_threads_that_are_safe_there_are_none(monkeypatch):
    def refuse(number):
        raise ValueError("No threading layer could be loaded.")

    monkeypatch.setattr(few_rows.numba, "set_num_threads", refuse)
    x, weight, _ = case(3, (24, 16))
    try:
        torch.set_num_threads(2)
        torch.testing.assert_close(few_rows.multiply(x, weight, None), x @ weight.T)
    finally:
        torch.set_num_threads(1)
