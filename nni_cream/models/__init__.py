"""Discrete networks, registered with timm: ``timm.create_model("cream_14")`` works once ``nni_cream`` is imported."""
