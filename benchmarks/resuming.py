"""What it costs that a run can be gone on with: the seeding of images, and the look at loss and gradient in a step.

    python benchmarks/resuming.py

Processor time, the least of several rounds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch import nn

import nni_cream  # noqa: F401
from nni_cream.architecture import CreamPath
from nni_cream.data import LabelledImages, load_data
from nni_cream.models.cream import build_child
from nni_cream.shards import Shuffled
from nni_cream.soundness import first_not_finite

BATCH = 64
ROUNDS = 15


def least(task: Callable[[], object]) -> float:
    """Return the least processor time of a round, in microseconds."""
    times = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        task()
        times.append(time.process_time() - begin)
    return 1e6 * min(times)


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    for name, resolution in (("digits", 8), ("mnist5k", 32)):
        images: LabelledImages = load_data(name, resolution=resolution).weights
        draws = list(Shuffled(len(images)))[:BATCH]
        plain = list(map(int, draws))
        without, seeded = (least(partial(images.__getitems__, some)) / BATCH for some in (plain, draws))
        print(f"{name} at {resolution} pixels, an image: {without:.0f} µs, seeded {seeded:.0f} µs")

    network = build_child(CreamPath.of([[0], [0], [3], [4, 0], [2], [3], [0]]), num_classes=10).train()
    inputs, targets = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))

    def step() -> None:
        network.zero_grad()
        nn.functional.cross_entropy(network(inputs), targets).backward()

    loss = torch.ones(())
    whole = least(step)
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    check = least(lambda: first_not_finite({"loss": [loss], "gradient": gradients}))
    print(
        f"a step of a path, {len(gradients)} gradients, {BATCH} images: {whole / 1e3:.1f} ms, "
        f"the look at loss and gradient {check / 1e3:.2f} ms ({check / whole:.1%})"
    )


if __name__ == "__main__":
    main()
