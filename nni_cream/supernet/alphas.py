"""The architecture parameters α of a differentiable search.

Source: Liu et al., "DARTS: Differentiable Architecture Search", ICLR 2019, section 2.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

_INITIAL_SCALE: Final = 1e-3


class Alphas(nn.Module):
    """Tables of α, each shared by the choices that asked for it under one name, in the order of asking.

    A table has the candidates of a choice in its last dimension, whose softmax are the mixing weights. It starts as
    1e-3·N(0, 1). Supernet modules hold no parameter: they ask for the mixing weights when they run, so that the
    parameters of the network are the weights w alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ParameterList()
        self._names: list[str] = []

    def share(self, name: str, *shape: int) -> Callable[[], Tensor]:
        """Return what gives the mixing weights of the table ``name``, which is made where it does not exist yet.

        Raises:
            ValueError: if it exists with another shape.
        """
        if name not in self._names:
            self._names.append(name)
            self.tables.append(nn.Parameter(_INITIAL_SCALE * torch.randn(shape)))
        if self[name].shape != shape:
            raise ValueError(f"The table {name!r} of α has shape {list(self[name].shape)}, not {list(shape)}.")
        return partial(self.mixing_weights, name)

    def mixing_weights(self, name: str) -> Tensor:
        """Return softmax(α) of a table, over its last dimension."""
        return self[name].softmax(-1)

    def __getitem__(self, name: str) -> nn.Parameter:
        table: nn.Parameter = self.tables[self._names.index(name)]
        return table

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
