"""The child of a search: the architecture that was found, as a file that retraining reads.

``child.json`` holds the architecture, what was measured, and the data it was found with; ``child.safetensors`` beside
it the weights inherited from the supernet. Neither can execute code when read. A safetensors file of ours, be it beside
a child or of a training, says by itself what network it is of and which data that is for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nni_cream.architecture import CreamPath
from nni_cream.errors import UserError
from nni_cream.runs import read_json, write_atomically, write_json

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMAT: Final = "nni_cream.child/1"
NETWORK_FORMAT: Final = "nni_cream.network/1"

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
        save_network(
            file.with_suffix(".safetensors"),
            network,
            architecture=str(self.path),
            num_classes=self.num_classes,
            data=self.data,
        )
        write_json(file, {"format": FORMAT, **asdict(self), "path": self.path.to_lists()})

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


def save_network(
    file: Path, network: nn.Module, *, architecture: str, num_classes: int, data: Mapping[str, Any]
) -> None:
    """Write the weights of ``network``, and what they are of, as a safetensors file, atomically.

    Args:
        file: the file.
        network: the network.
        architecture: the text of its :class:`CreamPath`, or timm's name of it.
        num_classes: number of classes that it tells apart.
        data: settings of the data that they are classes of (``name``, ``folder``, ``resolution``, …).
    """
    from safetensors.torch import save_file

    weights = {name: tensor.detach().contiguous().clone() for name, tensor in network.state_dict().items()}
    notes = {
        "format": NETWORK_FORMAT,
        "architecture": architecture,
        "num_classes": str(num_classes),
        "data": json.dumps(data, ensure_ascii=False),
    }
    write_atomically(file, lambda temporary: save_file(weights, temporary, metadata=notes))


def read_network(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its weights, and the notes in it.

    Raises:
        UserError: if it is none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as content:
            names = content.keys()
            return {name: content.get_tensor(name) for name in names}, content.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is not a safetensors file: {error}.") from None


def load_weights(network: nn.Module, file: Path) -> None:
    """Load the weights beside a child file into ``network``.

    Raises:
        UserError: if the file is missing, is no safetensors file, or does not fit the network.
    """
    weights_file = weights_beside(file)
    weights, _ = read_network(weights_file)
    fit_weights(network, weights, weights_file, f"the network of {file}")


def weights_beside(file: Path) -> Path:
    """Return the file of the weights that belong to a child file.

    Raises:
        UserError: if it is missing.
    """
    weights_file = file.with_suffix(".safetensors")
    if not weights_file.exists():
        raise UserError(f"There are no weights {weights_file} beside {file}.")
    return weights_file


def fit_weights(network: nn.Module, weights: Mapping[str, Any], file: Path, name: str) -> None:
    """Load ``weights`` into ``network``.

    Args:
        network: the network.
        weights: what should be its state dict.
        file: where they come from, for the error.
        name: what the network is called there.

    Raises:
        UserError: if an entry is missing, surplus or of another shape; the network is as before then.
    """
    expected = network.state_dict()
    if odd := sorted(weights.keys() ^ expected.keys()):
        holder = "the file" if odd[0] in weights else "the network"
        raise UserError(
            f"{file} does not fit {name}: {len(odd)} entries are only in one of them, such as {odd[0]!r} of {holder}."
        )
    for key, value in weights.items():
        shape = getattr(value, "shape", None)
        if shape != expected[key].shape:
            found = f"is a {type(value).__name__}" if shape is None else f"has shape {list(shape)}"
            raise UserError(
                f"{file} does not fit {name}: {key!r} {found}, but the network needs {list(expected[key].shape)}."
            )
    network.load_state_dict(weights)
