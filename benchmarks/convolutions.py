"""What convolutions with derivatives of our own are worth in networks of Cream, against torch's.

    python benchmarks/convolutions.py

Both run in one process, in turns: gradients of single depthwise weights, by the size of the planes; and forward and
backward of whole networks, as a search trains them. A ratio is the median of those of all turns.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import keep_compiled_convolutions, make_parser, save_result, seconds_of
from torch import Tensor, nn

from nni_cream.architecture import CreamPath
from nni_cream.models.cream import build_child
from nni_cream.supernet.depthwise import DepthwiseConv2d, with_explicit_derivatives
from nni_cream.supernet.depthwise_forms import Geometry, weight_gradient

# Channels, size (pixels) and stride of depthwise convolutions in the choice stages, for images of 64 pixels.
LAYERS = ((96, 32, 2), (144, 16, 1), (240, 8, 1), (480, 4, 1), (576, 4, 2), (1152, 2, 1))
KERNELS = (3, 5, 7)
BATCH = 64
# Between them the paths have all six choices.
PATHS = ("[0] [3] [3,1] [3,1] [3,3] [3] [0]", "[0] [0] [1,4] [2,5] [5,0] [2] [0]")
# (batch, pixels): of experiments/recipes/cream_mnist5k.yml; at 64 pixels, with the published batch; and large images.
SIZES = ((64, 32), (16, 64), (128, 64), (16, 224))


def in_turns(works: dict[str, Callable[[], Any]], repetitions: int, device: str) -> dict[str, Any]:
    """Return the median times (ms) of "torch" and "ours", and their ratio."""
    for work in works.values():
        work()
    turns = [{kind: seconds_of(work, device) for kind, work in works.items()} for _ in range(repetitions)]
    found: dict[str, Any] = {kind: 1e3 * statistics.median(turn[kind] for turn in turns) for kind in works}
    ratios = [turn["torch"] / turn["ours"] for turn in turns]
    return {**found, "ratio": statistics.median(ratios), "all ratios": ratios}


def weight_gradients(channels: int, size: int, stride: int, kernel: int, device: str) -> dict[str, Callable[[], Any]]:
    """Return the two ways to the weight gradient of one depthwise convolution."""
    pair, padding = (stride, stride), (kernel // 2, kernel // 2)
    features = torch.randn(BATCH, channels, size, size, device=device).to(memory_format=torch.channels_last)
    layer = DepthwiseConv2d(channels, kernel, stride, kernel // 2).to(device)
    slopes = torch.randn_like(layer(features))
    geometry = Geometry(pair, padding, (1, 1), (size, size), (kernel, kernel))

    def by_torch() -> Tensor:
        found: Tensor = torch.ops.aten.convolution_backward.default(
            slopes, features, layer.weight, None, pair, padding, (1, 1), False, (0, 0), channels, (False, True, False)
        )[1]
        return found

    return {"torch": by_torch, "ours": lambda: weight_gradient(features, slopes, geometry)}


def networks(path: str, batch: int, resolution: int, device: str) -> dict[str, Callable[[], Any]]:
    """Return forward and backward of the network of a path, with both kinds of convolutions."""
    network: nn.Module = build_child(CreamPath.parse(path), num_classes=100)
    network.to(device, memory_format=torch.channels_last).train()
    images = torch.randn(batch, 3, resolution, resolution, device=device).to(memory_format=torch.channels_last)

    def both_ways(network: nn.Module) -> Callable[[], None]:
        def work() -> None:
            network.zero_grad()
            network(images).square().mean().backward()

        return work

    return {"torch": both_ways(network), "ours": both_ways(with_explicit_derivatives(copy.deepcopy(network)))}


def main() -> None:
    """Measure, save the result, and print it as tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--repetitions", type=int, default=15, help="of each measurement (default: %(default)s)")
    arguments = parser.parse_args()
    repetitions, device = arguments.repetitions, arguments.device
    if repetitions < 1:
        parser.error(f"--repetitions is {repetitions}; it has to be at least 1")
    keep_compiled_convolutions()
    torch.manual_seed(0)
    gradients = {}
    print(f"| weight gradient, batch {BATCH} | " + " | ".join(f"{kernel}×{kernel}" for kernel in KERNELS) + " |")
    print("|---|" + "---|" * len(KERNELS))
    for channels, size, stride in LAYERS:
        name = f"{channels} channels, {size}×{size}, stride {stride}"
        found = {k: in_turns(weight_gradients(channels, size, stride, k, device), repetitions, device) for k in KERNELS}
        gradients[name] = {f"{k}×{k}": times for k, times in found.items()}
        cells = [f"{times['torch']:.1f} → {times['ours']:.1f}" for times in found.values()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    whole = {}
    paths = [f"path {number}" for number, _ in enumerate(PATHS, 1)]
    print(f"\n| forward and backward, torch's / ours | {' | '.join(paths)} |")
    print("|---|" + "---|" * len(PATHS))
    for batch, resolution in SIZES:
        name = f"batch {batch}, {resolution} px"
        whole[name] = {p: in_turns(networks(p, batch, resolution, device), repetitions, device) for p in PATHS}
        ratios = [f"{times['ratio']:.2f}" for times in whole[name].values()]
        print(f"| {name} | {' | '.join(ratios)} |", flush=True)
    content = {"threads": torch.get_num_threads(), "repetitions": repetitions, "milliseconds of gradients": gradients}
    file = save_result("convolutions", {**content, "milliseconds of networks": whole}, device)
    print(f"\nwritten to {file}")


if __name__ == "__main__":
    main()
