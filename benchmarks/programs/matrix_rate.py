"""GFLOP/s of fp32 torch.mm for [2048, columns] x [columns, rows] matrices, as JSON.

usage: matrix_rate.py ROWSxCOLUMNS ...
"""

import json
import sys
import time

import torch

TOKENS, SECONDS, GIGA = 2048, 1.0, 1e9


def rate(rows: int, columns: int) -> float:
    """Return the best rate of one second of products with a weight of this shape."""
    left, weight = torch.randn(TOKENS, columns), torch.randn(rows, columns)
    out = torch.empty(TOKENS, rows)
    times, end = [], time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        began = time.perf_counter()
        torch.mm(left, weight.t(), out=out)
        times.append(time.perf_counter() - began)
    return 2 * TOKENS * rows * columns / min(times) / GIGA


print(json.dumps({shape: rate(*map(int, shape.split("x"))) for shape in sys.argv[1:]}))
