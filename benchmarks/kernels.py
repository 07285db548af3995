"""Time the kernels for GPUs against what torch has, at the sizes of DARTS's paper (16 channels, batch 64, 32×32).

    python benchmarks/kernels.py

needs a CUDA device. Each is called a few times within one CUDA graph, so that launching it from Python does not count;
in float32, without TF32. Writes ``benchmarks/results/kernels_cuda.json``.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from common import save_result
from torch import Tensor

from nni_cream.supernet import depthwise_forms, matrices
from nni_cream.supernet.depthwise_forms import Geometry
from nni_cream.tf32 import without_tf32

CALLS, REPEATS = 10, 5
BATCH = 64
# Channels and size of feature maps, of all edges of a state or of one; kernel and dilation.
MAPS = ((128, 32), (16, 32), (256, 16), (64, 16), (512, 8), (64, 8))
TAPS = ((3, 1), (5, 1), (3, 2), (5, 2))
# Groups, columns of each on the left and on the right, and rows.
PRODUCTS = ((8, 16, 16, 65536), (4, 32, 16, 65536), (8, 32, 32, 16384), (4, 64, 32, 16384), (8, 64, 64, 4096))
FORMS = {
    "convolution": depthwise_forms.convolve,
    "gradient of its input": depthwise_forms.input_gradient,
    "gradient of its weight": depthwise_forms.weight_gradient,
}


def microseconds(work: Callable[[], Any]) -> float:
    """Return the median time of a call."""
    for _ in range(3):
        work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            work()
    times = []
    for _ in range(REPEATS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * begin.elapsed_time(end) / CALLS)
    return statistics.median(times[1:])


def works() -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name."""
    found: dict[str, Callable[[], Any]] = {}

    def maps(channels: int, size: int) -> Tensor:
        return torch.randn(BATCH, channels, size, size, device="cuda").to(memory_format=torch.channels_last)

    for channels, size in MAPS:
        features, grad = maps(channels, size), maps(channels, size)
        for kernel, dilation in TAPS:
            weight = torch.randn(channels, 1, kernel, kernel, device="cuda")
            padding = (dilation * (kernel // 2),) * 2
            geometry = Geometry((1, 1), padding, (dilation, dilation), (size, size), (kernel, kernel))
            given = ((features, weight), (grad, weight), (features, grad))
            for (form, compute), pair in zip(FORMS.items(), given, strict=True):
                name = f"{form}, {kernel}×{kernel}, dilation {dilation}, {channels} × {size} × {size}"
                found[name] = lambda compute=compute, pair=pair, own=geometry: compute(*pair, own)
    for groups, left, right, rows in PRODUCTS:
        first, second = (torch.randn(rows, groups * width, device="cuda") for width in (left, right))
        name = f"cross product, {groups} of {left} × {rows} × {right}"
        found[name] = lambda first=first, second=second, own=groups: matrices.cross_product(first, second, own)
    columns = torch.randn(65536, 128, device="cuda")
    found["sums of columns, 65536 × 128"] = lambda: matrices.column_sums(columns)
    return found


def main() -> None:
    """Measure, save the result, and print it."""
    if not torch.cuda.is_available():
        sys.exit("error: torch sees no CUDA device here.")
    ours_of = depthwise_forms.kernels_for
    table: dict[str, dict[str, float]] = {}
    with without_tf32():
        for name, work in works().items():
            row = {}
            for whose, kernels_for in (("torch", lambda *_: None), ("ours", ours_of)):
                depthwise_forms.kernels_for = matrices.kernels_for = kernels_for
                row[whose] = microseconds(work)
            table[name] = row
            print(f"{name}: torch {row['torch']:.1f} µs, ours {row['ours']:.1f} µs", flush=True)
    print(f"written to {save_result('kernels', {'microseconds': table}, 'cuda')}")


if __name__ == "__main__":
    main()
