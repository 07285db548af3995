"""One-shot strategies for NNI, also found in ``nni.nas.strategy`` once ``nni_cream`` is imported."""

from nni_cream.strategies.cream import CreamStrategy

__all__ = ["CreamStrategy"]
