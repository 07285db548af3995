"""The child of a search: the architecture that was found, as a file that retraining reads.

``child.json`` holds the architecture, what was measured, and the data it was found with; ``child.safetensors`` beside
it the weights inherited from the supernet. Neither can execute code when read.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nni_cream.architecture import CreamPath
from nni_cream.errors import UserError
from nni_cream.runs import read_json, write_atomically, write_json

if TYPE_CHECKING:
    from torch import nn

FORMAT: Final = "nni_cream.child/1"

_TYPES: Final[dict[str, type | tuple[type, ...]]] = {
    "num_classes": int,
    "accuracy": (int, float),
    "flops": int,
    "params": int,
    "data": dict,
    "search": dict,
    "runners_up": list,
}


@dataclass(frozen=True)
class Child:
    """What a search found.

    Attributes:
        path: the architecture.
        num_classes: number of classes it was searched for.
        accuracy: of the path with shared weights, on held-out images, in [0, 1].
        flops: multiply-accumulates for one image at the search resolution.
        params: number of parameters.
        data: the data settings of the search (``name``, ``folder``, ``resolution``, …).
        search: name and seed of the search.
        runners_up: the other paths of the board, the best first.
    """

    path: CreamPath
    num_classes: int
    accuracy: float
    flops: int
    params: int
    data: dict[str, Any]
    search: dict[str, Any]
    runners_up: list[dict[str, Any]] = field(default_factory=list)

    def save(self, file: Path, network: nn.Module) -> None:
        """Write ``file`` and, first, the weights of ``network`` beside it, each atomically."""
        from safetensors.torch import save_file

        content = {"format": FORMAT, **asdict(self), "path": self.path.to_lists()}
        weights = {name: tensor.detach().contiguous().clone() for name, tensor in network.state_dict().items()}
        notes = {"architecture": str(self.path), "num_classes": str(self.num_classes), "format": FORMAT}
        write_atomically(
            file.with_suffix(".safetensors"), lambda temporary: save_file(weights, temporary, metadata=notes)
        )
        write_json(file, content)

    @classmethod
    def load(cls, file: Path) -> Child:
        """Read a child file.

        Raises:
            UserError: if it is not one.
        """
        content = read_json(file, "child of a search")
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise UserError(f"{file} is not a child of a search: its 'format' should be {FORMAT!r}.")
        content.setdefault("runners_up", [])
        known = [item.name for item in fields(cls)]
        for name in [*known, *content]:
            if name not in content:
                raise UserError(f"{file} is not a complete child of a search: {name!r} is missing.")
            if name not in known:
                raise UserError(f"{file} is not a child of a search: {name!r} is not part of one.")
            if name in _TYPES and not isinstance(content[name], _TYPES[name]):
                raise UserError(f"{file} is not a child of a search: {name!r} cannot be {content[name]!r}.")
        try:
            path = CreamPath.of(content["path"])
        except TypeError:
            raise UserError(f"{file} is not a child of a search: 'path' should be a list of lists.") from None
        except UserError as error:
            raise UserError(f"{file} is not a child of a search: {error}") from None
        return cls(**{**content, "path": path})

    def build(self, *, num_classes: int | None = None, drop_rate: float = 0.0) -> nn.Module:
        """Build the network, [N, 3, R, R] to logits, with new weights."""
        from nni_cream.models.cream import build_child

        return build_child(self.path, num_classes=num_classes or self.num_classes, drop_rate=drop_rate)


def load_weights(network: nn.Module, file: Path) -> None:
    """Load the weights beside a child file into ``network``.

    Raises:
        UserError: if the file is missing, is no safetensors file, or does not fit the network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights_file = file.with_suffix(".safetensors")
    try:
        weights = load_file(weights_file)
    except FileNotFoundError:
        raise UserError(f"There are no weights {weights_file} beside {file}.") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights_file} is not a safetensors file: {error}.") from None
    expected = network.state_dict()
    if weights.keys() != expected.keys():
        odd = sorted(weights.keys() ^ expected.keys())
        raise UserError(
            f"{weights_file} does not fit the network of {file}: {len(odd)} entries are only in one of them, "
            f"such as {odd[0]!r}."
        )
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"{weights_file} does not fit: {name!r} has shape {list(tensor.shape)}, but the network needs "
                f"{list(expected[name].shape)}."
            )
    network.load_state_dict(weights)
