"""Discrete networks, registered with timm: ``timm.create_model("cream_14")`` works once ``nni_cream`` is imported."""

from __future__ import annotations

from types import ModuleType


def register(_timm_models: ModuleType) -> None:
    """Add the published networks to timm's registry; called when ``timm.models`` has been imported."""
    from nni_cream.models import cream  # noqa: F401 (registers on import)
