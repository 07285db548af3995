"""A latency table in which nothing was measured: every time is another, and none follows from MACs."""

from __future__ import annotations

import random
from typing import Any

from nni_cream.latency import Calibration, Conditions, LatencyTable, StageTimes, Times, Validation, WholeNetwork

CONDITIONS = Conditions(
    device="cpu", name="Abacus 3000", threads=2, batch_size=1, precision="32-true", torch="2.13.0+cpu"
)
# Their factor is (1.5 + 4.5 + 1.44) / 6.
CALIBRATION = Calibration.of(
    [
        WholeNetwork(path="[[0], [3], [0], [0], [0], [0], [0]]", predicted=1.0, measured=1.5),
        WholeNetwork(path="[[0], [4], [0], [0], [0], [0], [0]]", predicted=2.0, measured=2.25),
        WholeNetwork(path="[[0], [5], [0], [0], [0], [0], [0]]", predicted=1.0, measured=1.44),
    ]
)
VALIDATION = Validation.of(
    [
        WholeNetwork(path="[[0], [0], [0], [0], [0], [0], [0]]", predicted=1.0, measured=1.25),
        WholeNetwork(path="[[0], [1], [0], [0], [0], [0], [0]]", predicted=2.0, measured=2.0),
        WholeNetwork(path="[[0], [2], [0], [0], [0], [0], [0]]", predicted=3.0, measured=2.5),
    ]
)


def made_up(operations: tuple[int, ...] = tuple(range(6)), **changes: Any) -> LatencyTable:
    """A table in which blocks take 0.02 to 0.3 ms."""
    draw = random.Random(0)

    def times() -> tuple[float, ...]:
        return tuple(draw.randrange(200, 3000) / 10_000 for _ in operations)

    fields = {
        "resolution": 32,
        "num_classes": 10,
        "operations": operations,
        "conditions": CONDITIONS,
        "milliseconds": Times(
            stem=0.0517,
            first_stage=0.0311,
            stages=tuple(StageTimes(first=times(), further=times()) for _ in range(5)),
            last_stage=0.0703,
            head=0.1109,
        ),
        "calibration": CALIBRATION,
        "validation": VALIDATION,
    }
    return LatencyTable(**{**fields, **changes})
