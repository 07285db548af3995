"""One-shot strategies for NNI, also found in ``nni.nas.strategy`` once ``nni_cream`` is imported."""

# First: NNI's own one-shot strategies fail to import where nni.nas.oneshot.pytorch.strategy is imported before this.
import nni.nas.strategy  # noqa: F401

from nni_cream.strategies.cream import CreamStrategy
from nni_cream.strategies.darts import DartsStrategy

__all__ = ["CreamStrategy", "DartsStrategy"]
