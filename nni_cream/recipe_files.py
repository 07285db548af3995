"""Recipes as YAML files: how they are read and written, and how what is wrong in them is said.

Nothing heavy is imported here, so that a wrong setting is named at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from nni_cream.errors import UserError

# Of a value that is not what it should be, what an error repeats.
_SHOWN_CHARACTERS = 200
# How YAML writes nothing.
_NULLS = ("", "null", "Null", "NULL", "~")
# One text in quotation marks, unlike 'a' and 'b'.
_QUOTED = re.compile(r"""'([^']|'')*'|"([^"\\]|\\.)*\"""", re.DOTALL)
# Where pydantic's own words are about Python.
_EXPECTED = {
    "model_type": "be a group of settings",
    "path_type": "be a path",
    "tuple_type": "be a list",
    "bool_parsing": "be true or false",
    "bool_type": "be true or false",
}

AnyRecipe = TypeVar("AnyRecipe", bound=BaseModel)


def load_recipe(kind: type[AnyRecipe], path: Path, overrides: Mapping[str, Any]) -> AnyRecipe:
    """Read a recipe.

    Args:
        kind: which kind of recipe it has to be.
        path: the YAML file.
        overrides: values for dotted keys, such as ``{"optimizer.lr": 0.2}``, from the command line or NNI's tuner.

    Raises:
        UserError: if the file cannot be read, or a key or value is not what the recipe declares.
    """
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no recipe {path}; those shipped are in experiments/recipes/.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The recipe {path} cannot be read: {error}.") from None
    except ValueError as error:
        raise UserError(f"The recipe {path} is not valid YAML: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"The recipe {path} should be a YAML mapping of settings, such as 'epochs: 10'.")
    for key, value in overrides.items():
        _set(content, key, value, known=dotted_keys(kind))
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {complaint(error, kind)}") from None


def parse_override(text: str, texts: Mapping[str, bool] = MappingProxyType({})) -> tuple[str, Any]:
    """Split ``key=value`` from the command line; the value is read as YAML, or as it stands where it has to be text.

    Args:
        text: ``key=value``.
        texts: the keys of such text, as :func:`text_keys` lists them. Of it, quotation marks of YAML around the whole
            come off. Where the setting may be None, it is by nothing, ``null`` or ``~``.

    Raises:
        UserError: if there is no ``=``, or the value is not YAML.
    """
    key, separator, value = text.partition("=")
    key = key.strip()
    if not separator or not key:
        raise UserError(f"{text!r} sets nothing; write key=value, as in --set optimizer.lr=0.2.")
    if key in texts:
        value = value.strip()
        return key, None if texts[key] and value in _NULLS else _unquoted(value)
    try:
        return key, read_yaml(value)
    except ValueError as error:
        raise UserError(f"The value in {_shown(text)} is not valid YAML: {error}.") from None


def _unquoted(text: str) -> str:
    """Return ``text`` without the quotation marks of YAML, if such stand around all of it."""
    if not _QUOTED.fullmatch(text):
        return text
    try:
        return str(read_yaml(text))
    # An escape that there is not.
    except ValueError:
        return text


class _Loader(yaml.SafeLoader):
    """YAML without code, and without a key that stands twice in a mapping, of which PyYAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise ValueError(f"'{key.value}' stands in lines {lines[key.value]} and {line}; leave one out")
                lines[key.value] = line
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """Read YAML; nothing in it is executed.

    Raises:
        ValueError: if it is none, or names a key of a mapping twice; its text says where, on one line.
    """
    try:
        return yaml.load(text, _Loader)
    # Of thousands of brackets PyYAML makes a RecursionError.
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split()).rstrip(".")) from None


def text_keys(kind: type[BaseModel]) -> dict[str, bool]:
    """List the keys of a kind of recipe that take a path or any text, and nothing else but None.

    Returns:
        By the dotted key, whether it takes None.
    """
    keys: dict[str, bool] = {}
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys |= {f"{name}.{key}": optional for key, optional in text_keys(field.annotation).items()}
            continue
        members = _members(field.annotation)
        if members - {NoneType} and members <= {str, Path, NoneType}:
            keys[name] = NoneType in members
    return keys


def _members(annotation: Any) -> set[Any]:
    """Return the types that an annotation is a union of, without what further is said of them."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*map(_members, get_args(annotation)))
    return {annotation}


def dotted_keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """List the keys of a kind of recipe, groups and their members, as ``group.member``."""
    keys = []
    for name, field in kind.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += dotted_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _set(content: dict[str, Any], key: str, value: Any, known: list[str]) -> None:
    if key not in known:
        raise UserError(_unknown(key, known))
    *groups, last = key.split(".")
    for depth, group in enumerate(groups, start=1):
        content = content.setdefault(group, {})
        if not isinstance(content, dict):
            name = ".".join(groups[:depth])
            raise UserError(f"'{key}' cannot be set because '{name}' is not a group of settings in the recipe.")
    content[last] = value


def _unknown(key: str, known: Iterable[str]) -> str:
    def likeness(other: str) -> float:
        # Counting the last word once more lets 'lr' find 'optimizer.lr'.
        (group, _, last), (other_group, _, other_last) = key.rpartition("."), other.rpartition(".")
        pairs = (key, other), (last, other_last)
        # Whoever names a group that there is means a setting in it.
        return (group != "" and group == other_group) + sum(
            difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs
        )

    return f"'{key}' is not a setting; did you mean '{max(known, key=likeness)}'?"


def complaint(error: ValidationError, kind: type[BaseModel]) -> str:
    """Turn one of pydantic's complaints about a ``kind`` into a sentence."""
    # An unknown key is the likelier mistake when a required one is missing too. Of the complaints about a union, the
    # one that goes deepest is about the member that was meant.
    first = min(error.errors(), key=lambda complaint: (complaint["type"] != "extra_forbidden", -len(complaint["loc"])))
    known = dotted_keys(kind)
    key = ""
    for part in first["loc"]:
        longer = f"{key}.{part}" if key else str(part)
        if longer in known or first["type"] == "extra_forbidden":
            key = longer
        elif isinstance(part, int):
            key += f"[{part}]"
        # Else it is the name of a union's member.
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return _unknown(key, known)
    if first["type"] == "missing":
        return f"the setting '{key}' is missing."
    if first["type"] == "value_error":
        return f"{key}: {message}." if key else f"{message}."
    if first["type"] == "invalid_key":
        return f"the key {_shown(first['input'])} should be text."
    expected = _EXPECTED.get(first["type"]) or message.partition(" should ")[2] or f"not: {message}"
    return f"'{key}' is {_shown(first['input'])}, but should {expected}."


def _shown(value: Any) -> str:
    """Write a value as a part of a sentence, shortened where it is long."""
    try:
        text = repr(value)
    # Python refuses to write a number of thousands of digits.
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def changed_settings(recipe: BaseModel) -> dict[str, tuple[Any, Any]]:
    """Return the settings that are not as they would be by themselves.

    Returns:
        By their dotted key the value and the default; what has no default, and so has to be given, is not among them.
    """
    changed: dict[str, tuple[Any, Any]] = {}
    for name, field in type(recipe).model_fields.items():
        value = getattr(recipe, name)
        if isinstance(value, BaseModel):
            changed |= {f"{name}.{key}": pair for key, pair in changed_settings(value).items()}
        elif not field.is_required() and value != field.default:
            changed[name] = (value, field.default)
    return changed


def to_yaml(recipe: BaseModel) -> str:
    """Write a recipe as YAML, with every setting in it."""
    text: str = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    return text
