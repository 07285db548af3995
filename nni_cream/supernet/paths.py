"""Paths through a single-path supernet, for any NNI model space of layer choices and input choices."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nni.mutable import Categorical, CategoricalMultiple
from nni.nas.nn.pytorch import InputChoice, LayerChoice, ModelSpace
from nni.nas.oneshot.pytorch.supermodule.base import BaseSuperNetModule

from nni_cream.errors import UserError
from nni_cream.sampling import Path, Prior


class PathSpace:
    """The choices of a model space in a fixed order, and the translation between paths and NNI samples.

    Args:
        space: the model space.

    Raises:
        UserError: for a mutable that is neither a layer choice nor an input choice with a fixed number of inputs.
    """

    def __init__(self, space: ModelSpace) -> None:
        self.values: dict[str, tuple[Any, ...]] = {}
        # Of layer choices, as NNI's own sampling has them.
        self.weights: dict[str, Sequence[float]] = {}
        searched = {module.label for module in space.modules() if isinstance(module, LayerChoice | InputChoice)}
        for label, mutable in space.simplify().items():
            if label in searched and isinstance(mutable, Categorical):
                self.values[label] = tuple(mutable.values)
                self.weights[label] = mutable.weights
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


def read_prior(given: str | Sequence[float] | Mapping[str, Sequence[float]], space: PathSpace) -> Prior:
    """Return the prior that is described, with probabilities that add up to 1 at every choice.

    Args:
        given: the probabilities of the candidates, which apply to every choice with as many candidates; or, by label,
            the probabilities of each choice's candidates; or a word, for no probabilities. What none apply to has the
            ``weights`` that the layer choice was made with, which are even unless given.
        space: the choices.

    Raises:
        UserError: if it fits no choice, names one that there is not, or has probabilities that are none.
    """
    if isinstance(given, str):
        given = {}
    elif not isinstance(given, Mapping):
        fitting = {label: given for label, values in space.values.items() if len(values) == len(given)}
        if not fitting:
            raise UserError(
                f"The prior has {len(given)} probabilities, but the choices of this space have "
                f"{sorted(set(space.sizes))} candidates."
            )
        given = fitting
    for label, probabilities in given.items():
        size = len(space.values.get(label, ()))
        if len(probabilities) != size:
            raise UserError(
                f"The prior of the choice {label!r} has {len(probabilities)} probabilities, but "
                + (f"it has {size} candidates." if size else "there is no such choice in this space.")
            )
        if min(probabilities) < 0 or not sum(probabilities) > 0:
            raise UserError(
                f"The prior of the choice {label!r} is {list(probabilities)}, but probabilities are not negative "
                "and not all 0."
            )
    own = {label: space.weights.get(label, [1.0] * len(values)) for label, values in space.values.items()}
    rows = [given.get(label, own[label]) for label in space.labels]
    return [[p / sum(row) for p in row] for row in rows]


def activate(modules: Iterable[BaseSuperNetModule], sample: Mapping[str, Any]) -> None:
    """Make the supernet run the network that ``sample`` describes."""
    for module in modules:
        module.resample(memo=dict(sample))
