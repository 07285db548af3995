"""Genotypes: the cells that DARTS finds, as immutable values, and the published rule that reads them off α.

Source: Liu et al., "DARTS: Differentiable Architecture Search", ICLR 2019, section 2.4, and its published code, whose
notation is kept. States of a cell are numbered: 0 is the output of the cell before last, 1 that of the last cell, 2
the first node, and so on.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nni_cream.errors import UserError

CellKind = Literal["normal", "reduce"]
Edge = tuple[str, int]

CELL_KINDS: Final[tuple[CellKind, ...]] = get_args(CellKind)
# States that a cell is given rather than computes, and edges that a node keeps.
CELL_INPUTS: Final = 2
KEPT_EDGES: Final = 2
NONE: Final = "none"
SKIP: Final = "skip_connect"

# Of a text that is no genotype, what an error repeats.
_SHOWN_CHARACTERS: Final = 300
_EXAMPLE: Final = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('skip_connect', 1)], normal_concat=[2], "
    "reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1)], reduce_concat=[2])"
)


def edge_label(kind: CellKind, node: int, state: int) -> str:
    """Return the NNI label of the choice on the edge from ``state`` to ``node``, a state number from 2 upwards."""
    return f"{kind}_node{node}_edge{state}"


def inputs_label(kind: CellKind, node: int) -> str:
    """Return the NNI label of the choice of two among the edges to ``node``."""
    return f"{kind}_node{node}_inputs"


def edges_of(nodes: int) -> list[tuple[int, int]]:
    """List the edges of a cell with ``nodes`` nodes as (node, state), in the order of the rows of α."""
    return [(node, state) for node in range(CELL_INPUTS, CELL_INPUTS + nodes) for state in range(node)]


@dataclass(frozen=True)
class Genotype:
    """A normal and a reduction cell.

    ``normal[2·i]`` and ``normal[2·i + 1]`` are the two edges of node i, each an operation and the state that it is
    applied to; ``normal_concat`` are the states whose concatenation is the cell's output. The text form is the
    published one, ``Genotype(normal=[('sep_conv_3x3', 1), …], normal_concat=[2, 3, 4, 5], reduce=[…], …)``.

    Raises:
        UserError: if a cell has no node, a node has other than two edges, an edge comes from a later state, or the
            concatenation names a state that is no node or none at all.
    """

    normal: tuple[Edge, ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[Edge, ...]
    reduce_concat: tuple[int, ...]

    def __post_init__(self) -> None:
        for kind in CELL_KINDS:
            edges = self.edges(kind)
            if not edges or len(edges) % KEPT_EDGES:
                raise UserError(
                    f"The {kind} cell of the genotype has {len(edges)} edges, but every node has two and there is at "
                    "least one node."
                )
            for position, (operation, state) in enumerate(edges):
                node = CELL_INPUTS + position // KEPT_EDGES
                if not operation.isidentifier():
                    raise UserError(
                        f"The {kind} cell of the genotype names the operation {operation!r}; a name such as "
                        "sep_conv_3x3 is expected."
                    )
                if not 0 <= state < node:
                    raise UserError(
                        f"The {kind} cell of the genotype has an edge from state {state} to node {node}, but an edge "
                        "comes from a state with a smaller number."
                    )
            states = range(CELL_INPUTS, CELL_INPUTS + len(edges) // KEPT_EDGES)
            concat = self.concat(kind)
            if not concat or len(set(concat)) != len(concat) or not set(concat) <= set(states):
                raise UserError(
                    f"The {kind} cell of the genotype concatenates the states {list(concat)}, but its nodes are "
                    f"{list(states)}; name some of them, each once."
                )

    @classmethod
    def of(cls, value: Any) -> Genotype:
        """Build a genotype from a mapping as JSON holds it, with the four fields as lists.

        Raises:
            UserError: if it is none.
        """
        fields = [name for kind in CELL_KINDS for name in (kind, f"{kind}_concat")]
        if not isinstance(value, Mapping):
            raise UserError(f"A genotype has the fields {', '.join(fields)}, but this is a {type(value).__name__}.")
        if odd := sorted({str(name) for name in value} ^ set(fields)):
            raise UserError(
                f"A genotype has the fields {', '.join(fields)} and no others; missing or too many: {', '.join(odd)}."
            )
        for kind in CELL_KINDS:
            edges = value[kind]
            if not _is_list(edges) or not all(
                _is_list(edge) and len(edge) == 2 and isinstance(edge[0], str) and _is_number(edge[1]) for edge in edges
            ):
                raise UserError(
                    f"The field {kind!r} of a genotype is a list of pairs such as ('sep_conv_3x3', 0): an operation "
                    "and the number of a state."
                )
            concat = value[f"{kind}_concat"]
            if not _is_list(concat) or not all(_is_number(state) for state in concat):
                raise UserError(f"The field '{kind}_concat' of a genotype is a list of numbers such as [2, 3, 4, 5].")
        return cls(
            normal=tuple((operation, state) for operation, state in value["normal"]),
            normal_concat=tuple(value["normal_concat"]),
            reduce=tuple((operation, state) for operation, state in value["reduce"]),
            reduce_concat=tuple(value["reduce_concat"]),
        )

    @classmethod
    def parse(cls, text: str) -> Genotype:
        """Read the text form, as printed here or by the published code (``range(2, 6)``); nothing is executed.

        Raises:
            UserError: if the text is not a genotype.
        """
        shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
        hint = f"{shown!r} is not a genotype; write it as in {_EXAMPLE}."
        try:
            call = ast.parse(text.strip(), mode="eval").body
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != "Genotype":
                raise UserError(hint)
            names = [keyword.arg for keyword in call.keywords]
            # Python itself looks for repeated names only later, when it compiles; None stands for `**`.
            if call.args or None in names or len(set(names)) != len(names):
                raise UserError(hint)
            fields = {keyword.arg: _literal(keyword.value) for keyword in call.keywords}
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise UserError(hint) from None
        return cls.of(fields)

    @classmethod
    def from_sample(cls, sample: Mapping[str, Any], concat: int | None = None) -> Genotype:
        """Read an NNI sample of a DARTS space.

        Args:
            sample: a dictionary from :func:`edge_label` to an operation, and from :func:`inputs_label` to two states.
                What it says of edges that no node chose is not part of the genotype.
            concat: number of nodes, the last ones, that make the cell's output; None for all.

        Raises:
            UserError: if it is no such sample.
        """
        cells = {kind: _edges_in(sample, kind) for kind in CELL_KINDS}
        nodes = {kind: len(edges) // KEPT_EDGES for kind, edges in cells.items()}
        return cls(
            normal=tuple(cells["normal"]),
            normal_concat=_last_states(nodes["normal"], concat),
            reduce=tuple(cells["reduce"]),
            reduce_concat=_last_states(nodes["reduce"], concat),
        )

    def to_sample(self, operations: Sequence[str]) -> dict[str, Any]:
        """Return the NNI sample that freezes a DARTS space to this genotype.

        An edge that no node keeps is given ``none``, or the first operation of a space without it: NNI wants a value
        for every label.

        Args:
            operations: those that the space offers.

        Raises:
            UserError: if the space does not offer an operation, or a node takes both its edges from the same state,
                which a choice of two different inputs cannot say.
        """
        sample: dict[str, Any] = {}
        for kind in CELL_KINDS:
            sample |= cell_sample(kind, self.edges(kind), operations)
        return sample

    def edges(self, kind: CellKind) -> tuple[Edge, ...]:
        """Return the edges of one of the cells."""
        return self.normal if kind == "normal" else self.reduce

    def edges_to(self, kind: CellKind, node: int) -> tuple[Edge, ...]:
        """Return the two edges to ``node``, a state number."""
        first = KEPT_EDGES * (node - CELL_INPUTS)
        return self.edges(kind)[first : first + KEPT_EDGES]

    def concat(self, kind: CellKind) -> tuple[int, ...]:
        """Return the states that are the output of one of the cells."""
        return self.normal_concat if kind == "normal" else self.reduce_concat

    def nodes(self, kind: CellKind) -> int:
        """Return the number of nodes of one of the cells."""
        return len(self.edges(kind)) // KEPT_EDGES

    def skip_connections(self, kind: CellKind) -> int:
        """Count the skip connections of one of the cells."""
        return sum(operation == SKIP for operation, _ in self.edges(kind))

    def to_json(self) -> dict[str, Any]:
        """Return the genotype as :meth:`of` reads it, for JSON."""
        return {
            name: value
            for kind in CELL_KINDS
            for name, value in (
                (kind, [list(edge) for edge in self.edges(kind)]),
                (f"{kind}_concat", list(self.concat(kind))),
            )
        }

    def __str__(self) -> str:
        fields = (f"{kind}={list(self.edges(kind))}, {kind}_concat={list(self.concat(kind))}" for kind in CELL_KINDS)
        return f"Genotype({', '.join(fields)})"


def cell_sample(kind: CellKind, edges: Sequence[Edge], operations: Sequence[str]) -> dict[str, Any]:
    """Return what an NNI sample says of one kind of cell; see :meth:`Genotype.to_sample`."""
    filler = NONE if NONE in operations else operations[0]
    sample: dict[str, Any] = {}
    pairs = zip(edges[::KEPT_EDGES], edges[1::KEPT_EDGES], strict=True)
    for node, kept in enumerate(pairs, start=CELL_INPUTS):
        states = [state for _, state in kept]
        if len(set(states)) != len(states):
            raise UserError(
                f"Node {node} of the {kind} cell takes both its edges from state {states[0]}; a DARTS space chooses "
                "two different inputs for every node."
            )
        for operation, _ in kept:
            if operation not in operations:
                raise UserError(f"The genotype names {operation!r}, but the space offers {', '.join(operations)}.")
        chosen = {state: operation for operation, state in kept}
        sample |= {edge_label(kind, node, state): chosen.get(state, filler) for state in range(node)}
        sample[inputs_label(kind, node)] = states
    return sample


def _edges_in(sample: Mapping[str, Any], kind: CellKind) -> list[Edge]:
    edges: list[Edge] = []
    known: set[str] = set()
    for node in itertools.count(CELL_INPUTS):
        inputs = inputs_label(kind, node)
        if inputs not in sample:
            break
        states = sample[inputs]
        if (
            not _is_list(states)
            or not all(_is_number(state) and 0 <= state < node for state in states)
            or len(states) != len(set(states))
            or len(states) != KEPT_EDGES
        ):
            raise UserError(
                f"The sample chooses {inputs!r} = {states!r}, but two different states from 0 to {node - 1} are "
                "expected."
            )
        for state in states:
            label = edge_label(kind, node, state)
            if label not in sample:
                raise UserError(f"The sample chooses {inputs!r} = {states}, but {label!r} is missing.")
            if not isinstance(sample[label], str):
                raise UserError(f"The sample chooses {label!r} = {sample[label]!r}, which is no name of an operation.")
            edges.append((sample[label], state))
        known |= {inputs, *(edge_label(kind, node, state) for state in range(node))}
    if stray := [label for label in sample if label.startswith(f"{kind}_node") and label not in known]:
        raise UserError(f"The sample holds {stray[0]!r}, but its {kind} cell ends before {inputs!r}, which is missing.")
    return edges


def mixing_weights(alphas: ArrayLike) -> NDArray[np.float32]:
    """Return softmax(α) over operations, in single precision, as the published code ranks by it.

    It is torch's softmax on the CPU, because where α are nearly equal the rounding decides.
    """
    # Here, so that a child file can be read and refused without torch.
    import torch

    raw = torch.from_numpy(np.array(alphas, dtype=np.float32))
    weights: NDArray[np.float32] = raw.softmax(-1).numpy()
    return weights


def derive_edges(weights: NDArray[np.float32], operations: Sequence[str], skip_limit: int | None = None) -> list[Edge]:
    """Read the edges of a cell off the mixing weights, by the published rule (section 2.4).

    Every node keeps the two edges whose best operation other than ``none`` weighs most, in that order (of equals, the
    lower-numbered edge first), and each of them its best operation other than ``none`` (of equals, the first).

    Args:
        weights: [edges, operations], the rows in the order of :func:`edges_of`.
        operations: their names.
        skip_limit: keep at most so many skip connections: while there are more, the one that weighs least is ruled
            out (of equals, that of the lower-numbered edge to the earlier node), and the rule applied again (Chen et
            al., "Progressive DARTS", ICCV 2019). None for no limit.

    Raises:
        UserError: if a weight is not a number, because α is not; if there is nothing but ``none`` to choose; or if
            there are more skip connections than the limit and nothing to replace them.
    """
    if not np.isfinite(weights).all():
        row = int(np.argmin(np.isfinite(weights).all(axis=1)))
        node, state = edges_of(len(weights))[row]
        raise UserError(
            f"α is not finite on the edge from state {state} to node {node}, so no genotype can be read off it; a "
            "search that diverges needs a smaller learning rate."
        )
    if not set(operations) - {NONE}:
        raise UserError("A genotype needs an operation other than none, but the space offers no other.")
    allowed = np.array(weights, dtype=np.float64)
    allowed[:, [operation == NONE for operation in operations]] = -np.inf
    while True:
        edges, rows = _strongest(allowed, operations)
        skips = [row for (operation, _), row in zip(edges, rows, strict=True) if operation == SKIP]
        if skip_limit is None or len(skips) <= skip_limit:
            return edges
        if set(operations) <= {NONE, SKIP}:
            raise UserError(
                f"A cell with no other operation than {SKIP} has {len(skips)} of them; at most {skip_limit} cannot be."
            )
        column = list(operations).index(SKIP)
        allowed[min(skips, key=lambda row: allowed[row, column]), column] = -np.inf


def _strongest(allowed: NDArray[np.float64], operations: Sequence[str]) -> tuple[list[Edge], list[int]]:
    edges: list[Edge] = []
    rows: list[int] = []
    first, node = 0, CELL_INPUTS
    while first < len(allowed):
        strength = allowed[first : first + node].max(axis=1)
        for state in sorted(range(node), key=lambda state: -strength[state])[:KEPT_EDGES]:
            rows.append(first + state)
            edges.append((operations[int(allowed[first + state].argmax())], state))
        first, node = first + node, node + 1
    return edges, rows


def derive_genotype(
    alphas: Mapping[CellKind, ArrayLike],
    operations: Sequence[str],
    concat: int | None = None,
    normal_skip_limit: int | None = None,
) -> Genotype:
    """Read a genotype off α, [edges, operations] for each kind of cell, by the published rule.

    Args:
        alphas: the raw values, not their softmax.
        operations: names of the operations.
        concat: number of nodes, the last ones, that make the output of a cell; None for all.
        normal_skip_limit: as ``skip_limit`` of :func:`derive_edges`, for the normal cell.

    Raises:
        UserError: as :func:`derive_edges`, and if the cells have fewer nodes than ``concat``, or it is 0.
    """
    normal = derive_edges(mixing_weights(alphas["normal"]), operations, normal_skip_limit)
    reduce = derive_edges(mixing_weights(alphas["reduce"]), operations)
    return Genotype(
        normal=tuple(normal),
        normal_concat=_last_states(len(normal) // KEPT_EDGES, concat),
        reduce=tuple(reduce),
        reduce_concat=_last_states(len(reduce) // KEPT_EDGES, concat),
    )


def entropy(alphas: ArrayLike) -> float:
    """Return the mean entropy of the mixing weights over edges, in nats: ln(operations) when all weigh the same."""
    weights = mixing_weights(alphas).astype(np.float64)
    return float(-(weights * np.log(np.maximum(weights, np.finfo(np.float64).tiny))).sum(axis=-1).mean())


def _last_states(nodes: int, concat: int | None) -> tuple[int, ...]:
    last = CELL_INPUTS + nodes
    return tuple(range(last - (nodes if concat is None else concat), last))


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _is_number(value: Any) -> bool:
    # Larger ones are no state, and Python refuses to write the largest into a message.
    return type(value) is int and abs(value) < 1_000_000


def _literal(node: ast.expr) -> Any:
    """Return the value of a literal, or of ``range(a, b)`` with whole numbers."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range" and not node.keywords:
        bounds = [ast.literal_eval(argument) for argument in node.args]
        if len(bounds) != 2 or not all(type(bound) is int and 0 <= bound <= 1000 for bound in bounds):
            raise ValueError("not a small range")
        return list(range(*bounds))
    return ast.literal_eval(node)


# The cells of the paper (first and second order), and two earlier ones in the same notation.
PUBLISHED_GENOTYPES: Final = {
    name: Genotype.parse(text)
    for name, text in (
        (
            "nasnet",
            "Genotype(normal=[('sep_conv_5x5', 1), ('sep_conv_3x3', 0), ('sep_conv_5x5', 0), ('sep_conv_3x3', 0), "
            "('avg_pool_3x3', 1), ('skip_connect', 0), ('avg_pool_3x3', 0), ('avg_pool_3x3', 0), ('sep_conv_3x3', 1), "
            "('skip_connect', 1)], normal_concat=[2, 3, 4, 5, 6], reduce=[('sep_conv_5x5', 1), ('sep_conv_7x7', 0), "
            "('max_pool_3x3', 1), ('sep_conv_7x7', 0), ('avg_pool_3x3', 1), ('sep_conv_5x5', 0), ('skip_connect', 3), "
            "('avg_pool_3x3', 2), ('sep_conv_3x3', 2), ('max_pool_3x3', 1)], reduce_concat=[4, 5, 6])",
        ),
        (
            "amoebanet",
            "Genotype(normal=[('avg_pool_3x3', 0), ('max_pool_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_5x5', 2), "
            "('sep_conv_3x3', 0), ('avg_pool_3x3', 3), ('sep_conv_3x3', 1), ('skip_connect', 1), ('skip_connect', 0), "
            "('avg_pool_3x3', 1)], normal_concat=[4, 5, 6], reduce=[('avg_pool_3x3', 0), ('sep_conv_3x3', 1), "
            "('max_pool_3x3', 0), ('sep_conv_7x7', 2), ('sep_conv_7x7', 0), ('avg_pool_3x3', 1), ('max_pool_3x3', 0), "
            "('max_pool_3x3', 1), ('conv_7x1_1x7', 0), ('sep_conv_3x3', 5)], reduce_concat=[3, 4, 6])",
        ),
        (
            "darts_v1",
            "Genotype(normal=[('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 0), ('sep_conv_3x3', 1), "
            "('skip_connect', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 2)], "
            "normal_concat=[2, 3, 4, 5], reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), "
            "('max_pool_3x3', 0), ('max_pool_3x3', 0), ('skip_connect', 2), ('skip_connect', 2), ('avg_pool_3x3', 0)], "
            "reduce_concat=[2, 3, 4, 5])",
        ),
        (
            "darts_v2",
            "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1), "
            "('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)], "
            "normal_concat=[2, 3, 4, 5], reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), "
            "('max_pool_3x3', 1), ('max_pool_3x3', 0), ('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], "
            "reduce_concat=[2, 3, 4, 5])",
        ),
    )
}
