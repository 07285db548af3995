"""Checks of the arguments of strategies, in the words in which recipes refuse theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nni_cream.errors import UserError


def one_of(name: str, value: Any, words: Sequence[str]) -> None:
    """Make sure that an argument is one of some words.

    Raises:
        UserError: if it is none of them.
    """
    if value not in words:
        raise UserError(f"{name} is {value!r}, but should be {', '.join(map(repr, words[:-1]))} or {words[-1]!r}.")


def at_least(lowest: float, **arguments: float | None) -> None:
    """Make sure that numbers are not below a bound; None is none.

    Raises:
        UserError: if one is; it has the argument's name.
    """
    for name, value in arguments.items():
        if value is not None and not value >= lowest:
            raise UserError(f"{name} is {value!r}, but should be at least {lowest}.")


def above_zero(**arguments: float | None) -> None:
    """Make sure that numbers are positive; None is none.

    Raises:
        UserError: if one is not; it has the argument's name.
    """
    for name, value in arguments.items():
        if value is not None and not value > 0:
            raise UserError(f"{name} is {value!r}, but should be above 0.")
