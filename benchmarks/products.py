"""What a few rows times a weight cost: plain torch, oneDNN's layout, and loops for few rows, also in large pages.

    OMP_NUM_THREADS=1 python benchmarks/products.py

Prints for each number of rows how fast the weights are read, in GB/s, best of several turns. There are so many weights
of each size that no cache holds them. ``prepare()`` takes oneDNN's layout or large pages (``fedpt_flwr/packing.py``,
``huge_pages.py``; where the system has none of these, the last column is the one before it once more).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fedpt_flwr import packing
from fedpt_flwr.huge_pages import Room, rounded_up

Product = Callable[[Tensor, int], object]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["2048x2048", "2048x5632", "960x2560", "640x1728"], metavar="OxI")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--megabytes", type=int, default=200, help="weights of each size, together")
    asked = parser.parse_args()
    dtype = getattr(torch, asked.dtype)
    print(f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, {asked.dtype}")
    for size in asked.sizes:
        num_out, num_in = map(int, size.split("x"))
        num_bytes = dtype.itemsize * num_out * num_in
        weights = [torch.randn(num_out, num_in).to(dtype) for _ in range(max(2, asked.megabytes * 10**6 // num_bytes))]
        laid_out = {"torch": lambda x, number, weights=weights: F.linear(x, weights[number])}
        room = Room(sum(rounded_up(weight.nbytes) for weight in weights), 0)
        in_pages = [room.moved(weight) for weight in weights]
        for name, layout, held in (
            ("oneDNN", packing._OneDnn(), weights),
            ("few rows", packing._FewRows(), weights),
            ("in pages of 2 MB", packing._FewRows(), in_pages),
        ):
            if not packing._has_kernel(dtype, layout):
                continue
            packed = [layout.pack(weight) for weight in held]
            laid_out[name] = lambda x, number, packed=packed, layout=layout: layout.multiply(x, packed[number], None)
        for num_rows in asked.rows:
            x = torch.randn(num_rows, num_in).to(dtype)
            speeds = read_speeds(laid_out, x, num_weights=len(weights), turns=asked.turns)
            size_gb = 1e-9 * num_bytes * len(weights)
            print(f"{size:>10} {num_rows:3} rows", *(f"{name} {size_gb / took:5.1f}" for name, took in speeds.items()))


@torch.inference_mode()
def read_speeds(products: dict[str, Product], x: Tensor, *, num_weights: int, turns: int) -> dict[str, float]:
    """Seconds to multiply with all weights, the best of several turns, by name."""
    best = dict.fromkeys(products, float("inf"))
    for _ in range(turns):
        for name, product in products.items():
            begun = time.perf_counter()
            for number in range(num_weights):
                product(x, number)
            best[name] = min(best[name], time.perf_counter() - begun)
    return best


if __name__ == "__main__":
    main()
