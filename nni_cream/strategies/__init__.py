"""One-shot strategies for NNI, also found in ``nni.nas.strategy`` once ``nni_cream`` is imported."""

from __future__ import annotations

from types import ModuleType


def register(strategies: ModuleType) -> None:
    """Add the strategies to ``nni.nas.strategy``; called when that module has been imported.

    NNI has no registry for strategies: its users find them as attributes of this module.
    """
    from nni_cream.strategies.cream import CreamStrategy

    strategies.CreamStrategy = CreamStrategy  # type: ignore[attr-defined]


# NNI's strategies come first, because our modules import them, which calls register(), which imports our modules.
import nni.nas.strategy  # noqa: E402, F401

from nni_cream.strategies.cream import CreamStrategy  # noqa: E402

__all__ = ["CreamStrategy", "register"]
