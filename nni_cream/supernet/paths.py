"""Paths through a single-path supernet, for any NNI model space of layer choices and input choices."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from nni.mutable import Categorical, CategoricalMultiple
from nni.nas.nn.pytorch import InputChoice, LayerChoice, ModelSpace
from nni.nas.oneshot.pytorch.supermodule.base import BaseSuperNetModule

from nni_cream.errors import UserError
from nni_cream.sampling import Path


class PathSpace:
    """The choices of a model space in a fixed order, and the translation between paths and NNI samples.

    Args:
        space: the model space.

    Raises:
        UserError: for a mutable that is neither a layer choice nor an input choice with a fixed number of inputs.
    """

    def __init__(self, space: ModelSpace) -> None:
        self.values: dict[str, tuple[Any, ...]] = {}
        searched = {module.label for module in space.modules() if isinstance(module, LayerChoice | InputChoice)}
        for label, mutable in space.simplify().items():
            if label in searched and isinstance(mutable, Categorical):
                self.values[label] = tuple(mutable.values)
            elif label in searched and isinstance(mutable, CategoricalMultiple) and mutable.n_chosen is not None:
                self.values[label] = tuple(
                    list(chosen) for chosen in itertools.combinations(mutable.values, mutable.n_chosen)
                )
            else:
                raise UserError(
                    f"The choice {label!r} ({type(mutable).__name__}) cannot be searched by CreamStrategy, which takes "
                    "LayerChoice, and InputChoice with n_chosen given."
                )

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of a path."""
        return tuple(self.values)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of candidates of every choice."""
        return tuple(len(values) for values in self.values.values())

    def to_sample(self, path: Path) -> dict[str, Any]:
        """Return the NNI sample of ``path``."""
        return {label: values[i] for (label, values), i in zip(self.values.items(), path, strict=True)}

    def to_path(self, sample: Mapping[str, Any]) -> Path:
        """Return the path of an NNI sample."""
        return tuple(values.index(sample[label]) for label, values in self.values.items())


def activate(modules: Iterable[BaseSuperNetModule], sample: Mapping[str, Any]) -> None:
    """Make the supernet run the network that ``sample`` describes."""
    for module in modules:
        module.resample(memo=dict(sample))
