"""nni_cream: Cream and DARTS for Microsoft NNI.

Importing the package is cheap. What it adds to other packages (workarounds, strategies in ``nni.nas.strategy``,
networks in timm's registry) is added when *they* are imported, before or after this one.
"""

from __future__ import annotations

import wrapt

from nni_cream import compat

__version__ = "0.1.0"

compat.install()
wrapt.register_post_import_hook("nni_cream._registration:offer_strategies", "nni.nas.strategy")
wrapt.register_post_import_hook("nni_cream._registration:offer_networks", "timm.models")

__all__ = ["__version__"]
