"""docs/architecture.md is about this code: its modules, names, imports, and what is in a checkpoint."""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.docs.reading import blocks, code_in, page, resolve, rows, tree_of

TEXT = page("docs/architecture.md")
PACKAGES = ("nni_cream", "search_spaces")


def is_more_than_a_name(path: str) -> bool:
    """Tell whether a module has something in it besides its docstring."""
    return any(not isinstance(node, ast.Expr) for node in tree_of(path).body)


MODULES = sorted(
    path
    for folder in (*PACKAGES, "trials")
    for file in (REPOSITORY / folder).rglob("*.py")
    if is_more_than_a_name(path := file.relative_to(REPOSITORY).as_posix())
)


def path_of(name: str) -> str:
    return name if name.startswith(("search_spaces/", "trials/")) else f"nni_cream/{name}"


# (path, number of its layer), in the order of the page.
PLACES = [
    (path_of(name), int(row["layer"]))
    for row in rows(TEXT, "layer", "modules", "what they do")
    for name in code_in(row["modules"])
]
LAYER = dict(PLACES)
ALLOWED = {
    int(row["layer"].split()[0]): set(code_in(row["packages"])) for row in rows(TEXT, "layer", "what for", "packages")
}


def module_path(dotted: str) -> str | None:
    """Return the file of a module of ours, or None if there is none of that name."""
    for path in (f"{dotted.replace('.', '/')}.py", f"{dotted.replace('.', '/')}/__init__.py"):
        if (REPOSITORY / path).is_file():
            return path
    return None


def imported_names(path: str, *, anywhere: bool) -> set[str]:
    """Return the dotted names that a file imports: anywhere in it, or when it is itself imported."""
    names: set[str] = set()
    waiting: list[ast.AST] = [tree_of(path)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif anywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            checking = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            if anywhere or not checking:
                waiting += ast.iter_child_nodes(node)
    return names


def ours_imported_by(path: str) -> set[str]:
    """Return the files of ours that one imports, the package itself apart."""
    found = set()
    for name in imported_names(path, anywhere=True):
        if name.split(".")[0] not in PACKAGES:
            continue
        # The last part may be what is in the module, and then the module is what comes before it.
        file = module_path(name) or module_path(name.rpartition(".")[0])
        assert file is not None, f"{path} imports {name}"
        if file not in ("nni_cream/__init__.py", "search_spaces/__init__.py") and is_more_than_a_name(file):
            found.add(file)
    return found


def test_every_module_is_named_once() -> None:
    assert sorted(path for path, _ in PLACES) == MODULES


def test_layers_are_numbered_and_described_in_their_order() -> None:
    numbers = [number for _, number in PLACES]
    assert numbers == sorted(numbers)
    assert list(ALLOWED) == sorted(set(numbers)) == list(range(1, len(ALLOWED) + 1))


@pytest.mark.parametrize("path", MODULES)
def test_a_module_imports_from_its_layer_and_those_before(path: str) -> None:
    # A module that the page does not name has failed already.
    assert {other: LAYER[other] for other in ours_imported_by(path) if LAYER[other] > LAYER[path]} == {}


def test_imports_are_no_circle() -> None:
    order = list(graphlib.TopologicalSorter({path: ours_imported_by(path) for path in MODULES}).static_order())
    assert order.index("nni_cream/errors.py") < order.index("nni_cream/recipe.py") < order.index("nni_cream/search.py")


@pytest.mark.parametrize("number", ALLOWED)
def test_packages_of_a_layer(number: int) -> None:
    found = {
        name.split(".")[0] for path, layer in PLACES if layer == number for name in imported_names(path, anywhere=False)
    }
    assert found - set(sys.stdlib_module_names) - set(PACKAGES) == ALLOWED[number]


def test_the_checks_of_imports_see_imports() -> None:
    assert {"nni_cream/strategies/cream.py", "search_spaces/cream.py"} <= ours_imported_by("nni_cream/search.py")
    assert ours_imported_by("nni_cream/checkpoints.py") >= {"nni_cream/interruption.py", "nni_cream/randomness.py"}
    assert ours_imported_by("nni_cream/_registration.py") == {
        "nni_cream/strategies/__init__.py",
        "nni_cream/models/cream.py",
        "nni_cream/models/darts_published.py",
    }
    late = "nni_cream/child.py"
    assert "safetensors.safe_open" in imported_names(late, anywhere=True) - imported_names(late, anywhere=False)
    assert "torch.nn" in imported_names(late, anywhere=True) - imported_names(late, anywhere=False)


def test_names_exist() -> None:
    names = {code for code in code_in(TEXT) if re.fullmatch(rf"({'|'.join(PACKAGES)})(\.\w+)+", code)}
    assert len(names) > 30
    for name in names:
        # As many of the words as there is a module for, and in it the rest.
        parts = name.split(".")
        count = max(i for i in range(1, len(parts) + 1) if module_path(".".join(parts[:i])))
        module, rest = ".".join(parts[:count]), ".".join(parts[count:])
        assert (resolve(module, rest) if rest else module_path(module)) is not None


def test_names_in_the_diagram_exist() -> None:
    (diagram,) = (block.text for block in blocks(TEXT) if block.language == "mermaid")
    defined = {
        node.name
        for path in MODULES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    labels = " ".join(re.findall(r'"([^"]*)"', diagram))
    files = set(re.findall(r"\w+\.(?:py|yml|csv|html|json|safetensors)", labels))
    assert all((REPOSITORY / "trials" / file).is_file() for file in files if file.endswith(".py"))
    names = re.findall(r"\b(?:[a-z]+_[a-z_]+|[A-Z][a-z]+[A-Z]\w*)\b", re.sub(r"\w+\.\w+", "", labels))
    assert len(names) > 15
    # Of timm's.
    assert set(names) - defined == {"MobileNetV3"}


def keys_saved_by(path: str, name: str) -> set[str]:
    """Return the keys that an ``on_save_checkpoint`` gives to ``checkpoint[name]``."""
    keys: set[str] = set()
    (function,) = (
        node
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef) and node.name == "on_save_checkpoint"
    )
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            target = ast.unparse(node.targets[0])
            if target == f"checkpoint['{name}']":
                assert isinstance(node.value, ast.Dict)
                keys |= {ast.literal_eval(key) for key in node.value.keys if key is not None}
            elif target.startswith(f"checkpoint['{name}']["):
                keys.add(target.split("'")[3])
    return keys


def test_what_is_in_a_checkpoint() -> None:
    stated: dict[str, set[str]] = {}
    for row in rows(TEXT, "state", "who has it", "in a checkpoint under", "as"):
        for key in code_in(row["in a checkpoint under"]):
            stated.setdefault(key, set()).update(code_in(row["as"]))
    assert stated["cream"] == keys_saved_by("nni_cream/strategies/cream_module.py", "cream")
    assert stated["darts"] == keys_saved_by("nni_cream/strategies/darts_module.py", "darts")
    (ours,) = (
        ast.literal_eval(node.targets[0].slice)
        for node in ast.walk(tree_of("nni_cream/checkpoints.py"))
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Subscript)
        and ast.unparse(node.targets[0].value) == "checkpoint"
    )
    of_lightning = {"state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks"}
    assert set(stated) == {*of_lightning, "cream", "darts", ours}


def test_folders_beside_the_package_exist() -> None:
    folders = {code for code in code_in(TEXT) if re.fullmatch(r"[a-z_]+(/[a-z_]+)?/", code)} - {"checkpoints/"}
    assert {"experiments/", "benchmarks/", "tests/", "trials/"} <= folders
    assert all((Path(REPOSITORY) / folder).is_dir() for folder in folders)
