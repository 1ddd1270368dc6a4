"""A few rows times a plain weight, float32 or bfloat16, on processors with AVX2 or AVX512.

Judging drafts multiplies two to eight rows by weights that are far larger than any cache, which need not cost more
than to read the weights once. torch's libraries take up to three times as long for that (``benchmarks/products.py``).
The loops below read each weight once for all rows of the input. What they do with a block of weights is written as
instructions of LLVM, because a compiler that is left to find them finds half of the speed; numba compiles them, once
for a machine. :func:`multiply` is for tensors, whoever asks; :func:`loop_for` is for arrays that are laid out as the
loops want them, which ``few_tokens.py`` has.

There are two ways. Few rows are multiplied number by number along a row of the weight, in lanes whose sums are added up
at the end. From :data:`MANY_ROWS` on, lanes are rows of the input: nothing is left to add up, but lanes that no row
fills are wasted.

A weight of bfloat16 is read as it is, and becomes float32 in a register; or it stays what it is where a processor
multiplies pairs of bfloat16, and the input is rounded to that. Sums are of float32 always. Every sum is added up in an
order that depends on nothing but its length, the processor and the way, so results depend neither on the number of
threads nor on what the other rows are.
"""

from __future__ import annotations

import functools
import glob
import threading
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from llvmlite import binding, ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

Array = npt.NDArray[np.float32]

MANY_ROWS = 16
"""From so many on, each lane is a row."""

_GROUP = 8
"""Rows of the input that are multiplied with a weight at once."""

_OPTIONS: dict[str, Any] = {
    "fastmath": {"reassoc", "contract", "nsz"},  # sums may be vectorised; NaN and infinities stay what they are
    "error_model": "numpy",  # so may quotients, that no one asks whether they are of zero
    "nogil": True,
}
_HAS_AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
LANES = 16 if _HAS_AVX512 else 8
_REGISTERS = 32 if _HAS_AVX512 else 16

_FEATURES = binding.get_host_cpu_features()
_IS_FOR_HOST = numba.config.CPU_NAME in (None, "host") and not numba.config.CPU_FEATURES and numba.config.ENABLE_AVX
"""Whether numba compiles for this processor and not, as its settings can say, for another one."""

_HAS_PAIRS = _HAS_AVX512 and bool(_FEATURES.get("avx512bf16")) and bool(_IS_FOR_HOST)
"""Whether the processor multiplies pairs of bfloat16 and adds both products to a float32."""

binding.initialize_native_asmparser()  # the instruction for pairs is written in assembly

_HAS_TILES = bool(_FEATURES.get("amx-bf16"))
"""Whether the processor multiplies whole tiles of bfloat16, for which torch's libraries have loops."""

_MOST_AT_ONCE = 64

MOST_ROWS = {
    torch.float32: _MOST_AT_ONCE,
    torch.bfloat16: _MOST_AT_ONCE if _HAS_PAIRS and not _HAS_TILES else 8,
}
"""What is multiplied at once. More rows are left to torch, whose libraries are made for that, but for these:"""

_TAKES_ALL = (
    _HAS_AVX512
    and torch.backends.mkl.is_available()
    and binding.get_host_cpu_name() not in ("znver4", "")
    and binding.get_host_cpu_name().startswith("znver")
)
"""Whether more rows of float32 are multiplied part by part, on AMD's processors from Zen 5 on: the library for them,
which is Intel's, leaves half of their AVX512 idle. (Zen 4 has but half of it.)"""

_MOST_THREADS_FOR_ALL = 8
"""More threads leave too little for each of a part."""

_TILE = 2, 12 if _HAS_AVX512 else 6
"""Of many rows: vectors of the input times rows of the weight that are multiplied at once, each with a register."""

_SHORT = 6144
"""Numbers of an input that stay in the first cache, 24 KB, while rows of a weight go by."""

_IN_BLOCK = 32
"""How often some rows of a weight go by before the next part of a long input is taken."""

_STEPS = 16
"""Numbers of a row of the weight for which the next ones are asked for at once: 64 bytes, a cache line."""

_MOST_SCRATCH_BYTES = 1 << 24
"""What a thread keeps of what it needs on the way."""

_held = threading.local()
_NOTHING = np.empty(0, np.float32)

_AT_MOST = 1024
"""Numbers of all rows, or pairs of them, that are multiplied before the next ones: what is read of the input then stays
in a cache, and long sums of float32 would lose digits."""


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """What ``torch.nn.functional.linear`` gives, up to the rounding of sums.

    Args:
        x: ``(..., in_features)`` on the CPU.
        weight: ``(out_features, in_features)``, the same, with rows one behind the other in memory.
        bias: ``(out_features,)`` or None.
        out: Where it is to be written, if both are matrices, with rows one behind the other; None: in new memory.

    Returns:
        ``(..., out_features)``, of the dtype of both.

    Raises:
        RuntimeError: Dtypes or sizes do not fit, as torch says it.
    """
    num_out, num_in = weight.shape
    num_rows = x.numel() // num_in if num_in else 0
    if not num_rows or x.shape[-1] != num_in or x.dtype != weight.dtype or not _takes(num_rows, num_in, x.dtype):
        if out is None:
            return F.linear(x, weight, bias)
        return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)
    found = x.new_empty((*x.shape[:-1], num_out)) if out is None else out
    rows, written, bits = x.reshape(num_rows, num_in), found.view(num_rows, num_out), bits_of(weight)
    num_parts = -(-num_rows // _MOST_AT_ONCE)  # alike, so that none is of few rows
    for given, kept in zip(rows.tensor_split(num_parts), written.tensor_split(num_parts), strict=True):
        product = kept if x.dtype == torch.float32 else torch.empty(kept.shape, dtype=torch.float32, device="cpu")
        loop = loop_for(weight.dtype, len(given))
        loop(bits, given.float().contiguous().numpy(), product.numpy(), scratch(len(given), num_in, num_out))
        if bias is not None:
            product += bias.detach()
        if product is not kept:
            kept.copy_(product)
    return found


def _takes(num_rows: int, num_in: int, dtype: torch.dtype) -> bool:
    """Whether the loops are for so many rows of numbers of a dtype."""
    most = MOST_ROWS.get(dtype, 0)
    if dtype == torch.bfloat16 and num_in % 2:  # many rows are multiplied pair by pair
        most = min(most, MANY_ROWS - 1)
    takes_all = _TAKES_ALL and dtype == torch.float32 and torch.get_num_threads() <= _MOST_THREADS_FOR_ALL
    return num_rows <= most or takes_all


def scratch(num_rows: int, num_in: int, num_out: int) -> Array:
    """What a loop needs on the way for so many rows of the input and a weight of these sizes, or of smaller ones.

    It is the thread's own until it asks again: memory that comes and goes is cleared by the system each time, which can
    take as long as a product.
    """
    size = -(-num_rows // LANES) * LANES * (num_in + num_out) + 2 * LANES
    if 4 * size > _MOST_SCRATCH_BYTES:
        return np.empty(size, np.float32)
    held: Array = getattr(_held, "scratch", _NOTHING)
    if len(held) < size:
        held = _held.scratch = np.empty(size, np.float32)
    return held


def loop_for(dtype: torch.dtype, num_rows: int) -> Callable[[npt.NDArray[Any], Array, Array, Array], None]:
    """The loop for a number of rows.

    Args:
        dtype: Of the weights.
        num_rows: Of the input, at most :data:`MOST_ROWS`; of bfloat16 up to 15 anyway, and more only of an even size.

    Returns:
        A function of a weight ``(out_features, in_features)``, float32 or the bits of bfloat16 (:func:`bits_of`); the
        input ``(rows, in_features)``, which some processors round to bfloat16 if weights are; the product
        ``(rows, out_features)``, which it writes; and what :func:`scratch` gives. It must be called by the thread
        that asked, before that asks for another: numba has been told how many threads this one takes.
    """
    loop: Callable[[npt.NDArray[Any], Array, Array, Array], None]
    bits = "int16" if dtype == torch.bfloat16 else "float32"
    loop = _ready(_kernel(bits, min(num_rows, MANY_ROWS), torch.get_num_threads() > 1))
    return loop


@cache
def address_of(loop: Any) -> int:
    """Where a compiled loop lies in memory, for other loops to call (:func:`call`).

    It can be handed to them, too; but that takes longer than some of them.

    Raises:
        RuntimeError: numba does not say it.
    """
    (code,) = loop.overloads.values()
    address: int = code.library.get_pointer_to_function(code.fndesc.llvm_func_name)
    if not address:
        raise RuntimeError(f"numba has no code of {loop.__name__}")
    return address


@intrinsic  # type: ignore[untyped-decorator]
def call(_context: Any, address: Any, arguments: Any) -> Any:
    """Machine code that calls the loop at an address; it takes these arguments and returns nothing."""

    def emit(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        kinds = tuple(arguments)
        kind = context.call_conv.get_function_type(types.none, kinds)
        loop = builder.inttoptr(given[0], kind.as_pointer())
        status, _ = context.call_conv.call_function(
            builder, loop, types.none, kinds, cgutils.unpack_tuple(builder, given[1])
        )
        with cgutils.if_unlikely(builder, status.is_error):  # there was no memory
            context.call_conv.return_status_propagate(builder, status)
        return context.get_dummy_value()

    return types.void(address, arguments), emit


def bits_of(held: Tensor) -> npt.NDArray[Any]:
    """A tensor as numpy sees it where it lies: bfloat16, which numpy does not know, as int16."""
    array: npt.NDArray[Any] = (held.view(torch.int16) if held.dtype == torch.bfloat16 else held).numpy()
    return array


def part_of_loops(function: Any, **options: Any) -> Any:
    """A function that is compiled with every loop that calls it, and kept on disk as part of these only.

    Args:
        function: The function.
        options: For ``numba.njit``.
    """
    return numba.njit(function, **_OPTIONS, **options)


def compiled(loop: Any, signature: Any, *, variant: str = "", **options: Any) -> Any:
    """A loop for machine code, kept on disk for the next process if there is a place where it may be written.

    What numba keeps of one name, for other types and enclosed values, is one list, which lacks the options; and of two
    processes that write to it at once, one can be left with the other's code. So each variant has a name of its own;
    and each state of all files with loops, because of what a loop calls numba does not know whether it has changed.

    Args:
        loop: The function.
        signature: Of what it is for.
        variant: What tells it from others of that name.
        options: For ``numba.njit``.
    """
    twin = FunctionType(loop.__code__, loop.__globals__, loop.__name__, loop.__defaults__, loop.__closure__)
    twin.__module__, twin.__qualname__ = loop.__module__, f"{loop.__qualname__}{variant}_{_sources()}"
    try:
        made = numba.njit([signature], cache=True, **_OPTIONS, **options)(twin)
    except RuntimeError:  # neither beside this file nor in the user's cache
        return numba.njit([signature], **_OPTIONS, **options)(twin)
    if made.stats.cache_misses:  # so those of earlier states of the files are of no use
        name = f"{loop.__module__.rpartition('.')[2]}.{loop.__qualname__}{variant}".translate({60: None, 62: None})
        for file in Path(made.stats.cache_path).glob(f"{glob.escape(name)}_????????-*.nb[ic]"):
            if not file.name.startswith(f"{name}_{_sources()}-"):
                file.unlink(missing_ok=True)
    return made


@cache
def _sources() -> str:
    files = sorted(Path(__file__).parent.glob("few_*.py"))
    return f"{zlib.crc32(b''.join(file.read_bytes() for file in files)):08x}"


@cache
def _kernel(dtype: str, num_rows: int, in_threads: bool) -> Any:
    """The compiled loop for so many rows, or :data:`MANY_ROWS` and more, and weights of a dtype."""
    loop = _loop_of_tiles(dtype) if num_rows == MANY_ROWS else _loop(num_rows, dtype)
    return _in_threads(loop, dtype, num_rows, in_threads)


def _in_threads(loop: Any, dtype: str, num_rows: int, in_threads: bool) -> Any:
    """A loop compiled for weights of a dtype; if wanted and possible for as many threads as torch has."""
    weights, matrix = (types.Array(kind, 2, "C", readonly=True) for kind in (getattr(types, dtype), types.float32))
    signature = types.void(weights, matrix, types.float32[:, ::1], types.float32[::1])
    variant = f"_{num_rows}_{dtype}_{LANES}{'_in_threads' if in_threads else ''}"
    kernel = compiled(loop, signature, variant=variant, parallel=in_threads)
    if in_threads:
        numba.config.THREADING_LAYER = (
            "threadsafe"  # the one that is left otherwise ends the process if two threads ask
        )
        example = np.zeros((num_rows, 2), np.float32)
        try:
            _ready(kernel)(np.zeros((2, 2), dtype), example, np.empty_like(example), scratch(num_rows, 2, 2))
        except ValueError:  # there is none here
            return _in_threads(loop, dtype, num_rows, in_threads=False)
    return kernel


def is_in_threads(loop: Any) -> bool:
    """Whether a compiled loop takes several threads."""
    return bool(loop.targetoptions.get("parallel"))


def _ready(kernel: Any) -> Any:
    """A compiled loop, which will take as many threads as torch does, if it takes several."""
    if is_in_threads(kernel):
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    return kernel


def _loop(num_rows: int, dtype: str) -> Any:
    """The loop for so many rows and weights of a dtype.

    It takes some rows of the weight at once: what is read of x serves for all of them. A short input of few rows is
    multiplied with one after the other, which the processor guesses best.

    Many rows of x would drive each other out of the first cache. So no more columns are taken than stay there, in the
    order in which they are read, until some dozen rows of the weight have gone by; then the next ones.
    """
    of_group = min(num_rows, _GROUP)
    of_rest = num_rows - of_group
    lanes, in_block, at_once = LANES, _IN_BLOCK, _num_weights(of_group)
    are_pairs = _HAS_PAIRS and dtype == "int16"
    wide, packed_as = (2 * lanes, np.int16) if are_pairs else (lanes, np.float32)
    # What is narrow has to be widened: from fewer rows on, that takes longer than reading it, and reading x does not.
    is_widened, are_few = dtype == "int16" and not are_pairs, num_rows <= 2
    most_alone = 6 if are_pairs else 4 if not is_widened else 2 if lanes == 16 else 0  # a sum waits for itself
    piece, longer = _SHORT, _SHORT * 3 // 2
    alone = (2 if are_pairs else 1) * (longer if are_few else piece)
    short = alone if num_rows <= most_alone else -1
    most_whole = longer if is_widened or are_pairs else piece

    def loop(weight: Any, x: Any, product: Any, scratch: Any) -> None:
        num_out, whole = weight.shape[0], x.shape[1] // wide * wide
        none = scratch[:0]
        packed = scratch[_before_line(scratch) :].view(packed_as)
        _pack(x, 0, of_group, whole, wide, packed)
        _pack(x, of_group, of_rest, whole, wide, packed)
        if x.size <= short:
            for i in prange(num_out):
                _dots(weight, i, x, 0, packed, product, 0, whole, none, 0, of_group, 1)
            return
        size = whole
        if not are_few and whole * of_group > most_whole:  # of one or two, little is read beside the weight
            size = -(-whole // (-(-whole * of_group // piece) * wide)) * wide
        most_at_once = in_block * at_once
        for block in prange(-(-num_out // most_at_once)):
            first, last = block * most_at_once, min((block + 1) * most_at_once, num_out)
            end = last - (last - first) % at_once
            sums = np.empty((last - first) * num_rows * lanes, np.float32) if size < whole else none
            for start in range(0, max(1, whole), max(1, size)):
                stop, place = min(start + size, whole), 0
                for i in range(first, end, at_once):
                    _dots(weight, i, x, 0, packed, product, start, stop, sums, place, of_group, at_once)
                    place += of_group * at_once
                for i in range(end, last):
                    _dots(weight, i, x, 0, packed, product, start, stop, sums, place, of_group, 1)
                    place += of_group
                if of_rest:
                    for i in range(first, end, at_once):
                        _dots(weight, i, x, of_group, packed, product, start, stop, sums, place, of_rest, at_once)
                        place += of_rest * at_once
                    for i in range(end, last):
                        _dots(weight, i, x, of_group, packed, product, start, stop, sums, place, of_rest, 1)
                        place += of_rest

    return loop


@part_of_loops
def _pack(x: Any, first: int, num_rows: int, whole: int, wide: int, packed: Any) -> None:
    """Copies some rows: the first numbers of each, as many as are taken at once, then the next ones, and so on."""
    place = first * whole
    for k in range(0, whole, wide):
        for row in range(first, first + num_rows):
            for at in range(wide):
                packed[place + at] = as_stored(x[row, k + at], packed[place + at])
            place += wide


@intrinsic  # type: ignore[untyped-decorator]
def _before_line(_context: Any, array: Any) -> Any:
    """How many numbers of an array come before the first cache line that is whole."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        held = context.make_array(signature.args[0])(context, builder, arguments[0])
        size = ir.IntType(64)
        before = builder.and_(builder.neg(builder.ptrtoint(held.data, size)), size(63))
        return builder.udiv(before, held.itemsize)

    return types.int64(array), emit


def _num_weights(num_rows: int) -> int:
    """Rows of the weight at once: each takes a register for every row of x and one for itself, x another one."""
    most = 4 if num_rows <= 4 else 3  # of more rows that are read at once the processor guesses fewer
    return max(2, min(most, (_REGISTERS - 1) // (num_rows + 1)))  # one alone is slower than two that lack registers


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _dots(
    _context: Any,
    weight: Any,
    i: Any,
    x: Any,
    row: Any,
    packed: Any,
    product: Any,
    start: Any,
    stop: Any,
    sums: Any,
    place: Any,
    num_rows: Any,
    num_weights: Any,
) -> Any:
    """Machine code for so many rows of x times so many rows of a weight, each from a given one on.

    It adds up what is between two columns; ``packed`` has x as :func:`_pack` lays it. Sums that do not begin or end
    there are kept, a vector each, from a given place on of ``sums``.
    """
    emit = functools.partial(_emit, num_rows=num_rows.literal_value, num_weights=num_weights.literal_value)
    taken = (weight, i, x, row, packed, product, start, stop, sums, place, num_rows, num_weights)
    return types.void(*taken), emit


def widened(builder: Any, bits: Any) -> Any:
    """Numbers of bfloat16, one or a vector, as float32, of which they are the upper half."""
    count = getattr(bits.type, "count", 0)
    integer, number = (ir.VectorType(kind, count) if count else kind for kind in (ir.IntType(32), ir.FloatType()))
    upper = builder.shl(builder.zext(bits, integer), ir.Constant(integer, [16] * count if count else 16))
    return builder.bitcast(upper, number)


@intrinsic  # type: ignore[untyped-decorator]
def as_stored(_context: Any, number: Any, like: Any) -> Any:
    """A float32 as it is stored beside another number: as it is, or rounded to the nearest bfloat16, ties to even."""

    def emit(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        value, whole = arguments[0], ir.IntType(32)
        if like == types.float32:
            return value
        bits = builder.bitcast(value, whole)
        is_odd = builder.and_(builder.lshr(bits, whole(16)), whole(1))
        rounded = builder.lshr(builder.add(builder.add(bits, whole(0x7FFF)), is_odd), whole(16))
        is_nan = builder.fcmp_unordered("uno", value, value)  # rounding could make it infinite, or 0
        return builder.trunc(builder.select(is_nan, whole(0x7FC0), rounded), ir.IntType(16))

    return like(number, like), emit


def _prefetch(builder: Any, address: Any) -> None:
    """Ask for what lies there, if anything does."""
    byte, whole = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, whole, whole, whole])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    to_read, into_second_cache, data = whole(0), whole(2), whole(1)
    builder.call(prefetch, [builder.bitcast(address, byte), to_read, into_second_cache, data])


def _in_order(builder: Any) -> None:
    """Let the compiler move nothing that is read from behind this place to before it.

    Left to itself it reads so far ahead, for some processors, that sums have to leave the registers: eight rows then
    take twice the time on AMD's Zen 5. The processor itself still reads ahead.
    """
    builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], side_effect=True)


def in_all_lanes(builder: Any, number: Any, lanes: int) -> Any:
    """A number in each lane of a vector."""
    undefined = ir.Constant(ir.VectorType(number.type, lanes), ir.Undefined)
    alone = builder.insert_element(undefined, number, ir.IntType(32)(0))
    return builder.shuffle_vector(alone, undefined, ir.Constant(ir.VectorType(ir.IntType(32), lanes), None))


def exchanged(builder: Any, first: Any, second: Any, digit: int) -> tuple[Any, Any]:
    """Two vectors after what they have across the diagonal of a square has changed places.

    Lanes are numbered in binary; those of the first vector that have this digit change places with those of the second
    one that lack it.
    """
    count = first.type.count
    # Lanes of two vectors are counted through: those of the second one follow upon those of the first.
    upper = [lane if not lane & digit else count + lane - digit for lane in range(count)]
    lower = [lane + digit if not lane & digit else count + lane for lane in range(count)]
    masks = [ir.Constant(ir.VectorType(ir.IntType(32), count), chosen) for chosen in (upper, lower)]
    one, other = (builder.shuffle_vector(first, second, mask) for mask in masks)
    return one, other


def _dots_of_pairs(builder: Any, sums: Any, one: Any, other: Any) -> Any:
    """Adds to each lane of float32 the products of two pairs of bfloat16, which lie in a lane of each factor."""
    kind = ir.FunctionType(sums.type, [sums.type, one.type, other.type])
    return builder.asm(kind, "vdpbf16ps $3, $2, $0", "=v,0,v,v", [sums, one, other], side_effect=False)


def _dots_with_one_pair(builder: Any, sums: Any, pairs: Any, address: Any) -> Any:
    """The same with the one pair that lies at an address, which the processor spreads over all lanes as it reads it.

    Spread by an instruction before it, for each pair another one, there are too few of those. The compiler is not told
    that memory is read: nothing that is compiled with this writes to weights.
    """
    kind = ir.FunctionType(sums.type, [sums.type, pairs.type, address.type])
    return builder.asm(kind, "vdpbf16ps ($3){1to16}, $2, $0", "=v,0,v,r", [sums, pairs, address], side_effect=False)


def _emit(context: Any, builder: Any, signature: Any, arguments: Any, *, num_rows: int, num_weights: int) -> Any:
    """The instructions of :func:`_dots`: sums of lanes, kept in registers, over the length of the rows."""
    number, lanes = ir.FloatType(), ir.VectorType(ir.FloatType(), LANES)
    short = ir.IntType(16)
    is_narrow = signature.args[0].dtype == types.int16
    pairs = ir.VectorType(ir.IntType(32), LANES) if is_narrow and _HAS_PAIRS else None
    wide = LANES if pairs is None else 2 * LANES
    weight, x, packed, product, kept = (
        context.make_array(signature.args[place])(context, builder, arguments[place]) for place in (0, 2, 4, 5, 8)
    )
    i, first_row, start, stop, first_kept = (
        context.cast(builder, arguments[place], signature.args[place], types.int64) for place in (1, 3, 6, 7, 9)
    )
    _, length = cgutils.unpack_tuple(builder, weight.shape)
    _, width = cgutils.unpack_tuple(builder, product.shape)
    size = length.type
    places = [builder.add(i, size(place)) for place in range(num_weights)]
    at_rows = [builder.add(first_row, size(row)) for row in range(num_rows)]
    rows = [builder.gep(x.data, [builder.mul(length, row)]) for row in at_rows]
    whole = builder.and_(length, size(-wide))
    rows_in_lanes = builder.gep(packed.data, [builder.mul(whole, first_row)])
    weights = [builder.gep(weight.data, [builder.mul(length, place)]) for place in places]

    def function(name: str, result: Any, *taken: Any) -> Any:
        return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, taken), name)

    def load(begin: Any, k: Any, kind: Any, num_bytes: int = 4) -> Any:
        address = builder.bitcast(builder.gep(begin, [k]), kind.as_pointer())
        return builder.load(address, align=num_bytes)  # of one number: rows may have any length

    def load_weight(begin: Any, k: Any, kind: Any) -> Any:
        if not is_narrow:
            return load(begin, k, kind)
        return widened(builder, load(begin, k, short if kind is number else ir.VectorType(short, LANES), 2))

    def add_pairs(k: Any) -> None:
        loaded = [load(begin, k, pairs, 2) for begin in weights]
        in_lanes = builder.mul(k, size(num_rows))
        for row, sums in enumerate(all_sums):
            _in_order(builder)
            value = load(rows_in_lanes, builder.add(in_lanes, size(row * wide)), pairs, 2)
            for held, factor in zip(sums, loaded, strict=True):
                builder.store(_dots_of_pairs(builder, builder.load(held), value, factor), held)

    def add(sums: Any, k: Any, kind: Any) -> None:
        fma = function("llvm.fma.f32" if kind is number else f"llvm.fma.v{LANES}f32", kind, kind, kind, kind)
        loaded = [load_weight(begin, k, kind) for begin in weights]
        in_lanes = builder.mul(k, size(num_rows))
        for row, begin in enumerate(rows):
            _in_order(builder)
            if kind is number:
                value = load(begin, k, kind)
            else:
                value = load(rows_in_lanes, builder.add(in_lanes, size(row * LANES)), kind)
            for held, factor in zip(sums[row], loaded, strict=True):
                builder.store(builder.call(fma, [factor, value, builder.load(held)]), held)

    def zeros(kind: Any) -> list[list[Any]]:
        made = [[cgutils.alloca_once(builder, kind) for _ in places] for _ in rows]
        for held in (held for of_row in made for held in of_row):
            builder.store(ir.Constant(kind, None), held)
        return made

    def where_kept(number_of_sum: int) -> Any:
        at = builder.mul(builder.add(first_kept, size(number_of_sum)), size(LANES))
        return builder.bitcast(builder.gep(kept.data, [at]), lanes.as_pointer())

    all_sums = zeros(lanes)
    all_in_lanes = [held for of_row in all_sums for held in of_row]
    with builder.if_then(builder.icmp_signed(">", start, size(0))):
        for number_of_sum, held in enumerate(all_in_lanes):
            builder.store(builder.load(where_kept(number_of_sum), align=4), held)
    later = builder.mul(length, size(2 * num_weights))  # the processor guesses within a row only
    with cgutils.for_range_slice(builder, start, stop, size(wide), size) as (k, _):
        for begin in weights:
            _prefetch(builder, builder.gep(begin, [builder.add(k, later)]))
        if pairs is None:
            add(all_sums, k, lanes)
        else:
            add_pairs(k)
    with builder.if_else(builder.icmp_signed("<", stop, whole)) as (is_not_over, is_over):
        with is_not_over:
            for number_of_sum, held in enumerate(all_in_lanes):
                builder.store(builder.load(held), where_kept(number_of_sum), align=4)
        with is_over:
            behind = zeros(number)
            with cgutils.for_range_slice(builder, whole, length, size(1), size) as (k, _):
                add(behind, k, number)
            add_up = function(f"llvm.vector.reduce.fadd.v{LANES}f32", number, number, lanes)
            for row, sums, rests in zip(at_rows, all_sums, behind, strict=True):
                for held, rest, place in zip(sums, rests, places, strict=True):
                    total = builder.call(add_up, [builder.load(rest), builder.load(held)], fastmath=("reassoc",))
                    builder.store(total, builder.gep(product.data, [builder.add(builder.mul(width, row), place)]))
    return context.get_dummy_value()


# --- many rows -------------------------------------------------------------------------------------------------------


def _loop_of_tiles(dtype: str) -> Any:
    """The loop for many rows and weights of a dtype.

    Its sizes are its own and not this module's: numba looks at what a function encloses when it looks for what it has
    kept, and torch can be told to do without instructions that the processor has.
    """
    num_vectors, num_weights = _TILE
    lanes, at_most, in_pair = LANES, _AT_MOST, 2 if dtype == "int16" else 1
    num_rows_of_tile = num_vectors * lanes

    def loop(weight: Any, x: Any, product: Any, scratch: Any) -> None:
        (num_rows, num_in), num_out = x.shape, weight.shape[0]
        num_columns, depth = -(-num_rows // lanes) * lanes, num_in // in_pair
        begin_of_turned = num_rows * depth if in_pair == 2 else 0
        begin_of_found = begin_of_turned + depth * num_columns
        turned = scratch[begin_of_turned:begin_of_found].reshape(depth, num_columns)
        found = scratch[begin_of_found : begin_of_found + num_out * num_columns].reshape(num_out, num_columns)
        if in_pair == 2:
            bits = scratch[: num_rows * depth].view(np.int16).reshape(num_rows, num_in)
            for row in range(num_rows):
                for k in range(num_in):
                    bits[row, k] = as_stored(x[row, k], bits[row, k])
            _turn(scratch[: num_rows * depth].reshape(num_rows, depth), turned, num_rows, depth)
        else:
            _turn(x, turned, num_rows, depth)
        for k in range(depth):
            for column in range(num_rows, num_columns):
                turned[k, column] = 0.0
        num_tiles = num_columns // num_rows_of_tile
        begin = num_tiles * num_rows_of_tile
        num_blocks = num_out // num_weights
        for start in range(0, depth, at_most):
            for block in prange(num_blocks):
                i = block * num_weights
                for tile in range(num_tiles):
                    first, last = num_weights * tile // num_tiles, num_weights * (tile + 1) // num_tiles
                    column = tile * num_rows_of_tile
                    _sums(weight, i, turned, column, found, start, first, last, num_vectors, num_weights)
                if begin < num_columns:
                    _sums(weight, i, turned, begin, found, start, 0, num_weights, 1, num_weights)
            for i in range(num_blocks * num_weights, num_out):
                for column in range(0, num_columns, lanes):
                    _sums(weight, i, turned, column, found, start, 0, 1, 1, 1)
        _turn(found, product, num_out, num_rows)

    return loop


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _sums(
    _context: Any,
    weight: Any,
    i: Any,
    x: Any,
    column: Any,
    product: Any,
    start: Any,
    first: Any,
    last: Any,
    num_vectors: Any,
    num_weights: Any,
) -> Any:
    """Machine code for so many vectors of rows of x times so many rows of a weight, each from a given one on.

    It adds up :data:`_AT_MOST` numbers of each, or as many as there are, from a given one on. Of as many rows of the
    weight behind these it asks for those from the ``first`` to before the ``last``: all tiles have a share in that, or
    one would wait for the memory and the others leave it idle.
    """
    emit = functools.partial(_emit_sums, num_vectors=num_vectors.literal_value, num_weights=num_weights.literal_value)
    return types.void(weight, i, x, column, product, start, first, last, num_vectors, num_weights), emit


def _emit_sums(
    context: Any, builder: Any, signature: Any, arguments: Any, *, num_vectors: int, num_weights: int
) -> Any:
    """The instructions of :func:`_sums`: one number of the weight in all lanes times a row's number in each."""
    whole, lanes = ir.IntType(32), ir.VectorType(ir.FloatType(), LANES)
    are_pairs = signature.args[0].dtype == types.int16
    of_factors = ir.VectorType(whole, LANES) if are_pairs else lanes
    weight, x, product = (
        context.make_array(signature.args[place])(context, builder, arguments[place]) for place in (0, 2, 4)
    )
    i, column, start = arguments[1], arguments[3], arguments[5]
    asked_from, asked_to = (
        context.cast(builder, arguments[place], signature.args[place], types.int64) for place in (6, 7)
    )
    length, width = cgutils.unpack_tuple(builder, x.shape)
    size = length.type
    places = [builder.add(i, size(place)) for place in range(num_weights)]
    begin = builder.bitcast(weight.data, of_factors.element.as_pointer())
    weights = [builder.gep(begin, [builder.mul(length, place)]) for place in places]
    first = builder.gep(x.data, [column])
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(lanes, [lanes] * 3), f"llvm.fma.v{LANES}f32")
    sums = [[cgutils.alloca_once(builder, lanes) for _ in range(num_vectors)] for _ in places]

    def vector(begin: Any, number: int, kind: Any = lanes) -> Any:
        return builder.bitcast(builder.gep(begin, [size(number * LANES)]), kind.as_pointer())

    def step(k: Any) -> None:
        begin = builder.gep(first, [builder.mul(k, width)])
        values = [builder.load(vector(begin, number, of_factors), align=4) for number in range(num_vectors)]
        for row, held in zip(weights, sums, strict=True):
            address = builder.gep(row, [k])
            if are_pairs and num_vectors == 1:
                builder.store(_dots_with_one_pair(builder, builder.load(held[0]), values[0], address), held[0])
                continue
            factor = in_all_lanes(builder, builder.load(address, align=2 if are_pairs else 4), LANES)
            for value, place in zip(values, held, strict=True):
                total = builder.load(place)
                dots = _dots_of_pairs(builder, total, value, factor) if are_pairs else None
                builder.store(dots or builder.call(fma, [factor, value, total]), place)

    behind_these = builder.gep(weights[0], [builder.mul(length, size(num_weights))])
    for total in (total for held in sums for total in held):
        builder.store(ir.Constant(lanes, None), total)
    beyond = builder.add(start, size(_AT_MOST))
    stop = builder.select(builder.icmp_signed("<", beyond, length), beyond, length)
    end = builder.sub(stop, builder.and_(builder.sub(stop, start), size(_STEPS - 1)))
    with cgutils.for_range_slice(builder, start, end, size(_STEPS), size) as (k, _):
        with cgutils.for_range_slice(builder, asked_from, asked_to, size(1), size) as (place, _):
            _prefetch(builder, builder.gep(behind_these, [builder.add(k, builder.mul(place, length))]))
        # More at once, and LLVM keeps so many of them that sums have to leave the registers.
        at_once = 4 if num_vectors == 1 else 1
        with cgutils.for_range_slice(builder, k, builder.add(k, size(_STEPS)), size(at_once), size) as (first_of, _):
            for number in range(at_once):
                step(builder.add(first_of, size(number)))
    with cgutils.for_range_slice(builder, end, stop, size(1), size) as (k, _):
        step(k)
    is_first = builder.icmp_signed("==", start, size(0))  # nothing was written yet
    for place, held in zip(places, sums, strict=True):
        begin = builder.gep(product.data, [builder.add(builder.mul(width, place), column)])
        for number, total in enumerate(held):
            address = vector(begin, number)
            before = builder.select(is_first, ir.Constant(lanes, None), builder.load(address, align=4))
            builder.store(builder.fadd(before, builder.load(total)), address, align=4)
    return context.get_dummy_value()


def _loop_of_squares() -> Any:
    """The loop that turns a matrix, square by square. Its sizes are its own, too."""
    lanes = LANES

    def loop(matrix: Any, turned: Any, num_rows: int, num_columns: int) -> None:
        """Writes the first rows and columns of ``matrix`` to the first columns and rows of ``turned``."""
        whole_rows, whole_columns = num_rows // lanes * lanes, num_columns // lanes * lanes
        for column in range(0, whole_columns, lanes):
            for row in range(0, whole_rows, lanes):
                _square(matrix, row, turned, column)
        for row in range(num_rows):
            for column in range(whole_columns if row < whole_rows else 0, num_columns):
                turned[column, row] = matrix[row, column]

    return loop


@intrinsic  # type: ignore[untyped-decorator]
def _square(_context: Any, matrix: Any, row: Any, turned: Any, column: Any) -> Any:
    """Machine code that turns a square of as many rows and columns as there are lanes, from a given place on."""
    return types.void(matrix, row, turned, column), _emit_square


def _emit_square(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """The instructions of :func:`_square`: numbers change places with those across the diagonal.

    First neighbours do, then pairs of them, and so on: lanes are numbered in binary, and each step is a digit.
    """
    lanes = ir.VectorType(ir.FloatType(), LANES)
    matrix, turned = (context.make_array(signature.args[place])(context, builder, arguments[place]) for place in (0, 2))
    row, column = arguments[1], arguments[3]

    def places(array: Any, first_row: Any, first_column: Any) -> list[Any]:
        _, width = cgutils.unpack_tuple(builder, array.shape)
        begin = builder.gep(array.data, [builder.add(builder.mul(width, first_row), first_column)])
        beginnings = [builder.gep(begin, [builder.mul(width, width.type(number))]) for number in range(LANES)]
        return [builder.bitcast(address, lanes.as_pointer()) for address in beginnings]

    held = [builder.load(address, align=4) for address in places(matrix, row, column)]
    digit = 1
    while digit < LANES:
        for first in (number for number in range(LANES) if not number & digit):
            held[first], held[first + digit] = exchanged(builder, held[first], held[first + digit], digit)
        digit *= 2
    for vector, address in zip(held, places(turned, column, row), strict=True):
        builder.store(vector, address, align=4)
    return context.get_dummy_value()


_turn = part_of_loops(_loop_of_squares())
