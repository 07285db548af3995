"""nni_cream: Cream and DARTS for Microsoft NNI.

Importing the package is cheap. What it adds to other packages (workarounds, strategies in ``nni.nas.strategy``,
networks in timm's registry) is added when *they* are imported, before or after this one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import wrapt

from nni_cream import compat

if TYPE_CHECKING:
    from nni_cream.create import create_child

__version__ = "0.1.0"

compat.install()
wrapt.register_post_import_hook("nni_cream._registration:offer_strategies", "nni.nas.strategy")
wrapt.register_post_import_hook("nni_cream._registration:offer_networks", "timm.models")


def list_strategies() -> list[str]:
    """List the names of the search strategies in ``nni.nas.strategy``: NNI's own and ours."""
    import inspect

    import nni.nas.strategy as strategies

    kinds = inspect.getmembers(strategies, inspect.isclass)
    return [name for name, kind in kinds if issubclass(kind, strategies.Strategy) and kind is not strategies.Strategy]


def __getattr__(name: str) -> Any:
    # It needs torch and timm, which importing the package does not.
    if name == "create_child":
        from nni_cream.create import create_child

        return create_child
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["__version__", "create_child", "list_strategies"]
