"""The child of a search: the architecture that was found, as a file that retraining reads.

``child.json`` holds the architecture, what was measured, and the data it was found with; ``child.safetensors`` beside
it the weights inherited from the supernet. Neither can execute code when read. A safetensors file of ours, be it beside
a child or of a training, says by itself what network it is of and which data that is for.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nni_cream.architecture import CreamPath
from nni_cream.errors import UserError
from nni_cream.genotype import Genotype
from nni_cream.runs import read_json, to_json, write_atomically, write_json

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMAT: Final = "nni_cream.child/1"
NETWORK_FORMAT: Final = "nni_cream.network/1"
# What the notes in a file say of averaged weights.
AVERAGED: Final = "ema"
PUBLISHED_FALLBACK: Final = "cream_14"

# The key under which a child file has its architecture.
_KEYS: Final[dict[type[CreamPath] | type[Genotype], str]] = {CreamPath: "path", Genotype: "genotype"}

# Of each field, what it has to be.
_FIELDS: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    "num_classes": (lambda value: type(value) is int and value >= 1, "a whole number above 0"),
    "accuracy": (lambda value: type(value) in (int, float) and 0 <= value <= 1, "a number from 0 to 1"),
    "flops": (lambda value: type(value) is int and value >= 0, "a whole number"),
    "params": (lambda value: type(value) is int and value >= 0, "a whole number"),
    "data": (lambda value: isinstance(value, dict), "a group of data settings"),
    "search": (lambda value: isinstance(value, dict), "a group with the search's name and seed"),
    "runners_up": (lambda value: isinstance(value, list), "a list"),
    "space": (lambda value: isinstance(value, dict), "a group of the space's arguments"),
    "latency": (
        lambda value: value is None or (type(value) in (int, float) and 0 <= value < math.inf),
        "a number of milliseconds",
    ),
}
_SHOWN_CHARACTERS: Final = 100
_UNTRACKED: Final = ".num_batches_tracked"


@dataclass(frozen=True)
class Description:
    """What a file of ours says of the network in it.

    Attributes:
        architecture: as of :func:`build_network`.
        num_classes: number of classes that it tells apart.
        data: settings of the data that they are classes of (``name``, ``folder``, ``resolution``, …).
        size: as of :func:`build_network`.
    """

    architecture: str
    num_classes: int
    data: Mapping[str, Any]
    size: Mapping[str, Any]

    @classmethod
    def of_notes(cls, notes: Mapping[str, str], file: Path) -> Description:
        """Read the notes that :func:`save_network` has left in ``file``.

        Raises:
            UserError: if they are damaged.
        """
        try:
            return cls(
                notes["architecture"],
                int(notes["num_classes"]),
                dict(json.loads(notes["data"])),
                dict(json.loads(notes.get("size", "{}"))),
            )
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"The notes in {file} are damaged: {error!r}; copy it once more.") from None


@dataclass(frozen=True)
class Child:
    """What a search found.

    Attributes:
        architecture: a path of Cream, or a genotype of DARTS.
        num_classes: number of classes it was searched for.
        accuracy: of the child with shared weights, on held-out images, in [0, 1].
        flops: multiply-accumulates for one image at the search resolution (of DARTS, at the size of the search).
        params: number of parameters.
        data: the data settings of the search (``name``, ``folder``, ``resolution``, …).
        search: name and seed of the search.
        runners_up: the other paths of the board, the best first; none in DARTS.
        space: arguments of the DARTS space that it was found in; empty in Cream, where the path says all.
        latency: predicted time in milliseconds for a batch, by the latency table of a search whose budget was one of
            time; None of any other search.
    """

    architecture: CreamPath | Genotype
    num_classes: int
    accuracy: float
    flops: int
    params: int
    data: dict[str, Any]
    search: dict[str, Any]
    runners_up: list[dict[str, Any]] = field(default_factory=list)
    space: dict[str, Any] = field(default_factory=dict)
    latency: float | None = None

    @property
    def cost(self) -> float:
        """What the budget of a Cream search counts: multiply-accumulates, or predicted time."""
        return self.flops if self.latency is None else self.latency

    def description(self) -> Description:
        """Describe the network that the search has left."""
        size = {"kind": "search", **self.space} if self.space else {}
        return Description(str(self.architecture), self.num_classes, self.data, size)

    def save(self, file: Path, network: nn.Module) -> None:
        """Write ``file`` and, first, the weights of ``network`` beside it, each atomically."""
        described = self.description()
        save_network(
            file.with_suffix(".safetensors"),
            network,
            architecture=described.architecture,
            num_classes=described.num_classes,
            data=described.data,
            size=described.size,
        )
        content = asdict(self)
        del content["architecture"]
        if not self.space:
            del content["space"]
        if self.latency is None:
            del content["latency"]
        key = _KEYS[type(self.architecture)]
        write_json(file, {"format": FORMAT, key: self.architecture.to_json(), **content})

    def ranked(self, rank: int) -> Child:
        """Return what was found with this ``rank``, 1 being the best.

        Raises:
            UserError: if not so many were found, or a runner-up is damaged.
        """
        if rank == 1:
            return self
        if rank > 1 + len(self.runners_up):
            raise UserError(f"rank is {rank}, but the search found {1 + len(self.runners_up)}: make it at most that.")
        other = self.runners_up[rank - 2]
        try:
            path = CreamPath.of(other["path"])
            accuracy, flops, params = float(other["accuracy"]), int(other["flops"]), int(other["params"])
            latency = None if self.latency is None else float(other["latency"])
        except (KeyError, TypeError, ValueError):
            names = "'path', 'accuracy', 'flops' and 'params'"
            more = "" if self.latency is None else ", and, as the best path has it, 'latency'"
            raise UserError(f"The runner-up {other!r} should have {names}{more}.") from None
        return replace(self, architecture=path, accuracy=accuracy, flops=flops, params=params, latency=latency)

    @classmethod
    def load(cls, file: Path) -> Child:
        """Read a child file.

        Raises:
            UserError: if it is not one.
        """
        if os.path.isdir(file):
            advice = f"give {held}" if (held := file / "child.json").is_file() else "give the child.json of a search"
            raise UserError(f"{file} is not a child of a search, but a folder; {advice}.")
        try:
            return cls._of(read_json(file, "child of a search"))
        except _NoChild as error:
            raise UserError(
                f"{file} is not a child of a search: {error}; copy the child.json once more that the search has made."
            ) from None

    @classmethod
    def _of(cls, content: Any) -> Child:
        if not isinstance(content, dict):
            raise _NoChild(f"it holds a {type(content).__name__} instead of a group of fields")
        if (form := content.pop("format", None)) != FORMAT:
            raise _NoChild(f"its 'format' is {_shown(form)}, but should be {FORMAT!r}")
        content.setdefault("runners_up", [])
        content.setdefault("space", {})
        content.setdefault("latency", None)
        found = [(kind, key) for kind, key in _KEYS.items() if key in content]
        if len(found) != 1:
            raise _NoChild(f"it should have either 'path' or 'genotype', and has {'both' if found else 'neither'}")
        ((kind, key),) = found
        architecture = content.pop(key)
        if kind is Genotype and not content["space"]:
            raise _NoChild("'space' is missing, which a genotype needs")
        known = [item.name for item in fields(cls) if item.name != "architecture"]
        for name in [*known, *content]:
            if name not in content:
                raise _NoChild(f"{name!r} is missing")
            if name not in known:
                raise _NoChild(f"{name!r} is not part of one")
            fits, expected = _FIELDS[name]
            if not fits(content[name]):
                raise _NoChild(f"{name!r} is {_shown(content[name])}, but should be {expected}")
        try:
            return cls(architecture=kind.of(architecture), **content)
        except TypeError:
            raise _NoChild(f"{key!r} is {_shown(architecture)}, but should be a list of lists") from None
        except UserError as error:
            raise _NoChild(str(error).rstrip(".")) from None


class _NoChild(Exception):
    """Says in half a sentence why a file is not a child."""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


@dataclass(frozen=True)
class Candidate:
    """What is trained: a child file, or where there is none the network that ``name`` describes.

    Attributes:
        file: the child file.
        name: the text of a path or a genotype, or timm's name of a network.
    """

    file: Path | None
    name: str = PUBLISHED_FALLBACK

    def load(self, rank: int = 1) -> Child | None:
        """Read the child file, and choose what was found with this ``rank``.

        Raises:
            UserError: if it is not one, or not so many were found.
        """
        if self.file is None:
            if rank > 1:
                raise UserError(f"rank is {rank}, but only a --child of a search has networks of several ranks.")
            return None
        child = Child.load(self.file)
        try:
            return child.ranked(rank)
        except UserError as error:
            raise UserError(f"{self.file}: {error}") from None


def build_network(
    architecture: str,
    num_classes: int,
    size: Mapping[str, Any],
    *,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> nn.Module:
    """Build a network from its description, [N, 3, R, R] to logits, with new weights.

    Args:
        architecture: the text of a :class:`CreamPath` or a :class:`Genotype`, or timm's name of a network.
        num_classes: number of classes.
        size: of a genotype, what it leaves open: ``{"kind": "search"}`` with the arguments of
            :class:`search_spaces.darts.DartsSpace`, or ``{"kind": "trained"}`` with those of
            :class:`nni_cream.models.darts.DartsNetwork`.
        drop_rate: of the features before the classifier, in training.
        drop_path_rate: of the paths, in training.

    Raises:
        UserError: if the description is not one.
    """
    rates = {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
    if is_timm_name(architecture):
        # Not every network of timm's can drop something.
        network: nn.Module = create_timm_model(
            architecture, num_classes=num_classes, **{name: rate for name, rate in rates.items() if rate > 0}
        )
        return network
    builder = network_builder(architecture, size)
    try:
        network = builder(num_classes=num_classes, **rates)
    except TypeError as error:
        raise UserError(f"The size of the network, {dict(size)}, is not one of a genotype: {error}.") from None
    return network


def is_timm_name(architecture: str) -> bool:
    """Tell whether ``architecture`` is neither the text of a path nor of a genotype."""
    return not architecture.startswith(("[", "Genotype("))


def network_builder(architecture: str, size: Mapping[str, Any]) -> partial[Any]:
    """Return what builds the network of a path or a genotype, called with ``num_classes`` and further arguments.

    These are those of timm's ``MobileNetV3`` or :class:`nni_cream.models.darts.DartsNetwork`.

    Args:
        architecture: the text of a path or a genotype.
        size: as of :func:`build_network`.

    Raises:
        UserError: as :func:`build_network`.
    """
    if architecture.startswith("["):
        from nni_cream.models.cream import build_child

        return partial(build_child, CreamPath.parse(architecture))
    from nni_cream.models.darts import build_darts, searched_size

    genotype = Genotype.parse(architecture)
    arguments = {key: value for key, value in size.items() if key != "kind"}
    if size.get("kind") not in ("search", "trained"):
        raise UserError(
            f"The size of the network, {dict(size)}, is not one of a genotype: its 'kind' is search or trained."
        )
    if size["kind"] == "search":
        try:
            arguments = searched_size(genotype, **arguments)
        except TypeError as error:
            raise UserError(f"The size of the network, {dict(size)}, is not one of a genotype: {error}.") from None
    return partial(build_darts, genotype, **arguments)


def create_timm_model(name: str, **arguments: Any) -> Any:
    """Build a network of timm's.

    Raises:
        UserError: if timm has none of that name, or it has no such argument.
    """
    import timm

    try:
        # Asked first, because timm would fetch what a name such as hf-hub:… stands for.
        if timm.is_model(name):
            return timm.create_model(name, **arguments)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"timm cannot build {name!r}: {str(error).rstrip('.')}.") from None
    near = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0)[0]
    raise UserError(f"timm has no network {name!r}; did you mean {near!r}?")


def save_network(
    file: Path,
    network: nn.Module,
    *,
    architecture: str,
    num_classes: int,
    data: Mapping[str, Any],
    size: Mapping[str, Any],
    averaged: bool = False,
) -> None:
    """Write the weights of ``network``, and what they are of, as a safetensors file, atomically.

    Args:
        file: the file.
        network: the network.
        architecture: as of :func:`build_network`.
        num_classes: number of classes that it tells apart.
        data: settings of the data that they are classes of (``name``, ``folder``, ``resolution``, …).
        size: as of :func:`build_network`.
        averaged: whether they are averages of weights, and the plain ones are beside them.
    """
    from safetensors.torch import save

    weights = {name: tensor.detach().contiguous().clone() for name, tensor in network.state_dict().items()}
    notes = {
        "format": NETWORK_FORMAT,
        "architecture": architecture,
        "num_classes": str(num_classes),
        "data": to_json(data),
    }
    if size:
        notes["size"] = json.dumps(size)
    if averaged:
        notes["weights"] = AVERAGED
    # Not save_file: what it makes nobody but its owner may read, and a full disk is no OSError of it.
    content = _with_notes_in_order(save(weights, metadata=notes))
    write_atomically(file, lambda temporary: temporary.write_bytes(content))


def _with_notes_in_order(content: bytes) -> bytes:
    """Sort the notes in a safetensors file, so that the same weights are the same bytes; the library's order varies."""
    length = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + length])
    head["__metadata__"] = dict(sorted(head["__metadata__"].items()))
    text = json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode()
    # The format wants the weights aligned.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def read_network(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its weights, and the notes in it.

    Raises:
        UserError: if it is none.
    """
    with _opened(file) as content:
        names = content.keys()
        return {name: content.get_tensor(name) for name in names}, content.metadata() or {}


def read_notes(file: Path) -> dict[str, str]:
    """Read the notes in a safetensors file alone.

    Raises:
        UserError: if it is none.
    """
    with _opened(file) as content:
        return content.metadata() or {}


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        # safetensors says of every file that cannot be opened that there is none.
        with file.open("rb"):
            pass
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from None
    try:
        with safe_open(file, "pt") as content:
            yield content
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file} is not a safetensors file: {str(error).rstrip('.')}; it is damaged or of another kind, so copy it "
            "once more."
        ) from None


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
        raise UserError(f"There are no weights {weights_file} beside {file}; copy both from the search.")
    return weights_file


def plain_beside(file: Path) -> Path:
    """Return the file of the plain weights that belong to one of averaged weights, whether or not it exists."""
    return file.with_stem(f"{file.stem}_plain")


def fit_weights(network: nn.Module, weights: Mapping[str, Any], file: Path, name: str) -> None:
    """Load ``weights`` into ``network``.

    Args:
        network: the network.
        weights: what should be its state dict.
        file: where they come from, for the error.
        name: what the network is called there.

    Raises:
        UserError: as :func:`refuse_misfit`; the network is as before then.
    """
    refuse_misfit(network.state_dict(), weights, file, name)
    network.load_state_dict(dict(weights))


def refuse_misfit(expected: Mapping[str, Any], weights: Mapping[str, Any], file: Path, name: str) -> None:
    """Make sure that ``weights`` have the entries and shapes of the state dict ``expected``.

    Args:
        expected: of the network.
        weights: what should be its state dict. Files that are older than PyTorch 0.4.1 do not count the batches that
            their batch norms have seen; in evaluation nobody asks for that.
        file: where they come from, for the error.
        name: what the network is called there.

    Raises:
        UserError: if an entry is missing, surplus or of another shape.
    """
    untracked = {key for key in expected.keys() - weights.keys() if key.endswith(_UNTRACKED)}
    if odd := sorted((weights.keys() ^ expected.keys()) - untracked):
        holder = "the file" if odd[0] in weights else "the network"
        raise UserError(
            f"{file} does not fit {name}: {len(odd)} entries are only in one of them, such as {odd[0]!r} of {holder}; "
            "give the file of this network, or the network of this file."
        )
    for key, value in weights.items():
        shape = getattr(value, "shape", None)
        if shape != expected[key].shape:
            found = f"is a {type(value).__name__}" if shape is None else f"has shape {list(shape)}"
            raise UserError(
                f"{file} does not fit {name}: {key!r} {found}, but the network needs {list(expected[key].shape)}; give "
                "the file of this network, or the network of this file."
            )
