"""What the tests of the documentation read off it."""

from __future__ import annotations

import ast
import importlib
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from tests.conftest import REPOSITORY


def page(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    language: str
    text: str


def blocks(text: str) -> list[Block]:
    found = [Block(language, body) for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)]
    assert text.count("```") == 2 * len(found)
    return found


def without_blocks(text: str) -> str:
    return re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.M | re.S)


def code_in(text: str) -> list[str]:
    """Return what stands between single backticks."""
    return re.findall(r"`([^`\n]+)`", without_blocks(text))


def rows(text: str, *columns: str) -> list[dict[str, str]]:
    """Return the rows of all tables that have exactly these columns."""
    found = []
    header: list[str] | None = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else None
        if cells is None:
            header = None
        elif header is None:
            header = cells
        elif header == list(columns) and not set(line) <= set("|- "):
            found.append(dict(zip(columns, cells, strict=True)))
    assert found, columns
    return found


def resolve(module: str, qualified: str) -> Any:
    """Return what a module calls so."""
    value: Any = importlib.import_module(module)
    for name in qualified.split("."):
        value = getattr(value, name)
    return value


@cache
def tree_of(path: str) -> ast.Module:
    return ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))


def names_of_tests(path: str) -> set[str]:
    """Return the names by which pytest knows the tests of a file, without their parameters."""
    names = set()
    for node in tree_of(path).body:
        parts = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        names |= {
            prefix + part.name for part in parts if isinstance(part, ast.FunctionDef) and part.name.startswith("test_")
        }
    return names
