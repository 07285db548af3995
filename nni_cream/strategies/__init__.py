"""One-shot strategies for NNI, also found in ``nni.nas.strategy`` once ``nni_cream`` is imported."""

from nni_cream.strategies.cream import CreamStrategy
from nni_cream.strategies.darts import DartsStrategy

__all__ = ["CreamStrategy", "DartsStrategy"]
