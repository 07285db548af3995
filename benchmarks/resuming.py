"""What it costs that a run can be gone on with: the seeding of images, and the look at loss and gradient in a step.

    python benchmarks/resuming.py

Processor time of one thread, the least of several rounds. The step is one of training a typical network of the space
that ``make search`` goes through.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import make_parser, save_result
from torch import nn

import nni_cream  # noqa: F401
from nni_cream.architecture import CreamPath
from nni_cream.data import LabelledImages, load_data
from nni_cream.models.cream import build_child
from nni_cream.shards import Shuffled
from nni_cream.soundness import first_not_finite

BATCH = 64
ROUNDS = 15
DATA_SETS = (("digits", 8), ("mnist5k", 32))
PATH = [[0], [0], [3], [4, 0, 3], [2], [3], [0]]


def least(task: Callable[[], object]) -> float:
    """Return the least processor time of a round, in microseconds."""
    times = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        task()
        times.append(time.process_time() - begin)
    return 1e6 * min(times)


def of_an_image(name: str, resolution: int) -> dict[str, float]:
    """Return the microseconds that an image of a data set takes, and those of its seeding among them."""
    images: LabelledImages = load_data(name, resolution=resolution).weights
    draws = list(Shuffled(len(images)))[:BATCH]
    plain = list(map(int, draws))
    without, seeded = (least(partial(images.__getitems__, some)) / BATCH for some in (plain, draws))
    return {"pixels": resolution, "without": without, "seeded": seeded, "seeding": seeded - without}


def of_a_step() -> dict[str, float]:
    """Return the microseconds of forward and backward of a network, and those of the look at loss and gradient."""
    network = build_child(CreamPath.of(PATH), num_classes=10).train()
    inputs, targets = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))

    def step() -> None:
        network.zero_grad()
        nn.functional.cross_entropy(network(inputs), targets).backward()

    loss = torch.ones(())
    whole = least(step)
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    look = least(lambda: first_not_finite({"loss": [loss], "gradient": gradients}))
    return {"gradients": len(gradients), "step": whole, "look": look, "share": look / whole}


def main() -> None:
    """Measure, save the result, and print it."""
    parser = make_parser(__doc__)
    if parser.parse_args().device != "cpu":
        parser.error("it measures processor time, which a GPU takes none of")
    torch.set_num_threads(1)
    images = {name: of_an_image(name, resolution) for name, resolution in DATA_SETS}
    for name, found in images.items():
        print(
            f"{name} at {found['pixels']} pixels, an image: {found['without']:.0f} µs, seeded {found['seeded']:.0f} µs"
        )
    step = of_a_step()
    print(
        f"a step of a path, {step['gradients']} gradients, {BATCH} images: {step['step'] / 1e3:.1f} ms, "
        f"the look at loss and gradient {step['look'] / 1e3:.2f} ms ({step['share']:.1%})"
    )
    content: dict[str, Any] = {
        "what": "least processor time in microseconds: of an image, and of a step",
        "threads": torch.get_num_threads(),
        "rounds": ROUNDS,
        "batch": BATCH,
        "images": images,
        "path": PATH,
        "step": step,
    }
    print(f"written to {save_result('resuming', content)}")


if __name__ == "__main__":
    main()
