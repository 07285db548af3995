"""What a search leaves for those who want to see how its result came about: the file ``history.json``.

While a search runs, its checkpoints hold the same; see :class:`nni_cream.board.BoardHistory` and
:class:`nni_cream.strategies.darts_module.Epoch`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from nni_cream.errors import UserError
from nni_cream.runs import read_json, write_json

FORMAT: Final = "nni_cream.history/1"


@dataclass(frozen=True)
class Seen:
    """A path on the board after an epoch.

    Attributes:
        path: its text, as of :class:`nni_cream.architecture.CreamPath`.
        score: accuracy in percent on held-out images, with the statistics of their batch.
        macs: multiply-accumulates for one image.
        latency: predicted time in milliseconds for a batch, where the budget is one of time.
    """

    path: str
    score: float
    macs: int
    latency: float | None = None

    @property
    def cost(self) -> float:
        """What the budget counts."""
        return self.macs if self.latency is None else self.latency


@dataclass(frozen=True)
class History:
    """What was measured after every epoch.

    Attributes:
        images: how many the accuracy in ``child.json`` was measured on.
        board: of Cream, the board after every epoch, the best path first; by the number of the epoch, from 1.
        alphas: of DARTS, the table of α, [edges, operations], of each kind of cell after every epoch.
    """

    images: int
    board: Mapping[int, Sequence[Seen]] = field(default_factory=dict)
    alphas: Mapping[str, Sequence[Sequence[Sequence[float]]]] = field(default_factory=dict)

    @property
    def epochs(self) -> int:
        """How many there were."""
        return max(map(len, (self.board, *self.alphas.values())))

    def save(self, file: Path) -> None:
        """Write it as JSON, atomically."""
        board = {epoch: [_given(seen) for seen in places] for epoch, places in self.board.items()}
        write_json(file, {"format": FORMAT, **asdict(self), "board": board})

    @classmethod
    def load(cls, file: Path) -> History:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: if it is something else.
        """
        content = read_json(file, "history of a search")
        try:
            if content.pop("format") != FORMAT:
                raise ValueError
            board = {int(epoch): [Seen(**seen) for seen in places] for epoch, places in content["board"].items()}
            return cls(int(content["images"]), board, content["alphas"])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"{file} is not a history of a search.") from None


def _given(seen: Seen) -> dict[str, Any]:
    return {name: value for name, value in asdict(seen).items() if value is not None}
