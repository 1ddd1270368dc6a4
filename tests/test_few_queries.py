"""Attention of few tokens in compiled loops, against its formula in double precision."""

import math

import numpy as np
import pytest
import torch

few_rows = pytest.importorskip("fedpt_flwr.few_rows", reason="compiled loops need the extra fast")
few_queries = pytest.importorskip("fedpt_flwr.few_queries", reason="compiled loops need the extra fast")

NONE = np.empty(0, np.float32)
ANYTHING = 2**62


def attended(queries, keys, values, stored, starts, *, window=ANYTHING, norms=None, angles=None, in_threads=False):
    """What the loop makes of ``(rows, new, heads, size)``, and of keys and values before them; stored is written to."""
    rows, new, heads, size = queries.shape
    flat = [part.reshape(rows * new, -1).clone() for part in (queries, keys, values)]
    query_norm, key_norm = (NONE, NONE) if norms is None else (norm.numpy() for norm in norms)
    cos, sin = angles or (torch.empty(rows * new, 0), torch.empty(rows * new, 0))
    loop = few_queries.attention_for(stored[0].dtype, size, in_threads)
    bits = (few_rows.bits_of(part) for part in stored)
    eps, scale = np.float32(1e-6), np.float32(size**-0.5)
    taken = (query_norm, key_norm, eps, cos.numpy(), sin.numpy(), *bits, np.array(starts), new, window, scale)
    loop(*(part.numpy() for part in flat), *taken)
    return flat[0].view(rows, new, heads, size)


def expected(queries, stored, starts, window=ANYTHING):
    """The same by the formula, once the new keys and values are stored."""
    rows, new, heads, size = queries.shape
    shared = heads // stored[0].shape[1]
    keys, values = (part.double().repeat_interleave(shared, dim=1) for part in stored)
    found = torch.empty(queries.shape, dtype=torch.float64)
    for row in range(rows):
        for place in range(new):
            end = starts[row] + place + 1
            seen = slice(max(0, end - window), end)
            scores = torch.einsum("hk,hck->hc", queries[row, place].double(), keys[row, :, seen]) * size**-0.5
            found[row, place] = torch.einsum("hc,hck->hk", scores.softmax(-1), values[row, :, seen])
    return found


def case(rows, new, heads, key_heads, size, columns, dtype=torch.float32):
    torch.manual_seed(0)
    queries = torch.randn(rows, new, heads, size)
    keys, values = (torch.randn(rows, new, key_heads, size).to(dtype).float() for _ in range(2))
    stored = [torch.randn(rows, key_heads, columns, size).to(dtype) for _ in range(2)]
    return queries, keys, values, stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 8, 24, 64, 80, 128])
@pytest.mark.parametrize(("new", "starts"), [(1, [0]), (1, [5, 40]), (3, [0, 14]), (8, [13]), (2, [70, 1, 30])])
def test_it_is_attention(dtype, size, new, starts):
    for heads, key_heads, window in ((4, 4, ANYTHING), (4, 2, ANYTHING), (6, 1, 7), (2, 2, 20)):
        queries, keys, values, stored = case(len(starts), new, heads, key_heads, size, 90, dtype)
        found = attended(queries, keys, values, stored, starts, window=window)
        for row, start in enumerate(starts):
            for part, written in zip((keys, values), stored, strict=True):
                assert torch.equal(written[row, :, start : start + new], part[row].transpose(0, 1).to(dtype))
        right = expected(queries, stored, starts, window)
        torch.testing.assert_close(found.double(), right, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [ANYTHING, 100])
def test_a_long_text_is_taken_in_parts(window, monkeypatch):
    monkeypatch.setattr(few_queries, "_IN_CACHE", 512)  # 32 columns at once
    few_queries.attention_for.cache_clear()
    monkeypatch.setattr(few_queries, "compiled", lambda loop, signature, **_: few_rows.numba.njit(signature)(loop))
    try:
        queries, keys, values, stored = case(2, 5, 4, 2, 16, 400)
        for starts in ([300, 29], [395, 63], [0, 27]):
            found = attended(queries, keys, values, stored, starts, window=window)
            right = expected(queries, stored, starts, window)
            torch.testing.assert_close(found.double(), right, atol=3e-6, rtol=1e-5)
    finally:
        few_queries.attention_for.cache_clear()


def test_queries_and_keys_are_normed_and_turned_before():
    queries, keys, values, stored = case(1, 2, 4, 2, 16, 40)
    norms = torch.rand(16) + 0.5, torch.rand(16) + 0.5
    cos, sin = torch.randn(2, 8), torch.randn(2, 8)

    def turned(x, weight):
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
        low, high = x.chunk(2, dim=-1)
        turns = (part.view(1, 2, 1, 8) for part in (cos, sin))
        cosines, sines = turns
        return torch.cat([low * cosines - high * sines, high * cosines + low * sines], -1)

    found = attended(queries, keys, values, stored, [20], norms=norms, angles=(cos, sin))
    new_keys = turned(keys, norms[1])
    torch.testing.assert_close(stored[0][0, :, 20:22], new_keys[0].transpose(0, 1), atol=1e-6, rtol=1e-5)
    right = expected(turned(queries, norms[0]), stored, [20])
    torch.testing.assert_close(found.double(), right, atol=3e-6, rtol=1e-5)


def test_threads_change_no_bit():
    queries, keys, values, stored = case(3, 4, 6, 2, 64, 90)
    alone = attended(queries, keys, values, [part.clone() for part in stored], [30, 50, 41])
    try:
        torch.set_num_threads(2)
        loop = few_rows.loop_for(torch.float32, 1)
        if not few_rows.is_in_threads(loop):
            pytest.skip("numba has no threads here that are safe")
        assert torch.equal(attended(queries, keys, values, stored, [30, 50, 41], in_threads=True), alone)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("starts", [[3, 9, 1], [30, 50, 41]])
def test_a_query_gives_the_same_bits_whatever_stands_beside_it(starts):
    queries, keys, values, stored = case(3, 4, 6, 2, 64, 90)
    together = attended(queries, keys, values, [part.clone() for part in stored], starts)
    for row, start in enumerate(starts):
        own = [part[row : row + 1].clone() for part in stored]
        parts = [part[row : row + 1] for part in (queries, keys, values)]
        assert torch.equal(attended(*parts, [part.clone() for part in own], [start]), together[row : row + 1])
        for new in range(4):
            one = attended(*(part[:, new : new + 1] for part in parts), own, [start + new])
            assert torch.equal(one, together[row : row + 1, new : new + 1])


@pytest.mark.parametrize("start", [4, 40])
def test_columns_that_are_not_seen_are_not_read(start):
    queries, keys, values, stored = case(1, 2, 4, 2, 16, 90)
    for part in stored:
        part[:, :, : start - 3] = math.nan
        part[:, :, start + 2 :] = math.nan
    assert attended(queries, keys, values, stored, [start], window=4).isfinite().all()
    keys[0, 1] = math.nan  # the last one sees itself
    assert attended(queries, keys, values, stored, [start], window=4).isnan().all((-1, -2)).tolist() == [[False, True]]


def test_the_exponential_is_right_to_a_few_units_of_the_last_digit():
    @few_rows.part_of_loops  # with the flags with which it is used
    def all_of(given, out):
        for place in range(len(given)):
            out[place] = few_queries.exponential(given[place])

    x = np.linspace(-87, 88, 1_000_001).astype(np.float32)
    found = np.empty_like(x)
    all_of(x, found)
    right = np.exp(x.astype(np.float64))
    assert np.abs(found / right - 1).max() < 5 * 2**-23
    beyond = np.array([-np.inf, -1000, 0, 1000, np.inf, np.nan], np.float32)
    found = np.empty_like(beyond)
    all_of(beyond, found)
    assert 0 < found[0] == found[1] < 2e-38
    assert found[2] == 1
    assert 1e38 < found[3] == found[4] < np.inf
    assert np.isnan(found[5])
