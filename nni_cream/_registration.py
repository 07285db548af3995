"""What other packages offer of ours once they are imported; light, because it runs in the middle of their imports."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Final

STRATEGIES: Final = ("CreamStrategy", "DartsStrategy")


def offer_strategies(nni_strategies: ModuleType) -> None:
    """Make ``from nni.nas.strategy import CreamStrategy`` work; called with that module.

    NNI has no registry for strategies: its users find them as attributes of this module. Ours are imported when
    somebody asks for one, since this may be called while NNI's module is still being imported: it imports torch, and
    torch imports us.
    """

    def find(name: str) -> Any:
        if name not in STRATEGIES:
            raise AttributeError(f"module {nni_strategies.__name__!r} has no attribute {name!r}")
        from nni_cream import strategies

        return getattr(strategies, name)

    def listed() -> list[str]:
        return sorted({*vars(nni_strategies), *STRATEGIES})

    nni_strategies.__getattr__ = find  # type: ignore[method-assign]
    nni_strategies.__dir__ = listed  # type: ignore[method-assign]


def offer_networks(_timm_models: ModuleType) -> None:
    """Add the published networks to timm's registry; called when ``timm.models`` has been imported."""
    from nni_cream.models import cream, darts_published  # noqa: F401 (they register on import)
