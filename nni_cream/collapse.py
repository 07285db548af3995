"""Signs that a DARTS search collapses, as values and rules without torch.

Sources: Liang et al., "DARTS+", 2019 (number of skip connections); Zela et al., "Understanding and Robustifying
Differentiable Architecture Search", ICLR 2020 (dominant eigenvalue).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

WINDOW: Final = 5
RISE: Final = 4 / 3


def rises_sharply(values: Sequence[float], window: int = WINDOW, rise: float = RISE) -> bool:
    """Tell whether the newest of ``values``, one an epoch, are far above those a window ago.

    The mean over the last ``window`` epochs is compared with the mean over the ``window`` epochs before them: the
    published rule stops a search when the older mean is below 0.75 of the newer one. It says nothing while there are
    fewer than two windows, or the older mean is not positive.

    Args:
        values: the dominant eigenvalue after every epoch.
        window: number of epochs that are averaged.
        rise: factor that counts as sharp.
    """
    if len(values) < 2 * window:
        return False
    before = sum(values[-2 * window : -window]) / window
    now = sum(values[-window:]) / window
    return before > 0 and now > rise * before
