"""Model spaces for NNI, one file a space."""

from __future__ import annotations

# The workarounds have to be in place before a space imports timm, whoever imports the space.
import nni_cream  # noqa: F401
