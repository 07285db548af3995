"""What tests of recipes share: those that are shipped, and the sentence of a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from nni_cream.errors import UserError
from nni_cream.recipe import CreamRecipe, DartsRecipe, EvaluationRecipe, RetrainRecipe
from nni_cream.recipe_files import load_recipe
from nni_cream.settings import Settings

ROOT = Path(__file__).resolve().parents[1]


SHIPPED = sorted((ROOT / "experiments" / "recipes").glob("*.yml"))


KINDS: dict[str, type[Settings]] = {
    "search": CreamRecipe,
    "cream": CreamRecipe,
    "uniform": CreamRecipe,
    "darts": DartsRecipe,
    "retrain": RetrainRecipe,
    "test": EvaluationRecipe,
}


DARTS = {"name": "a", "epochs": 30}


SMALLEST = {"name": "a", "epochs": 30, "flops": {"min": 1, "max": 2}}


def kind_of(file: Path) -> type[Settings]:
    return KINDS[file.name.partition("_")[0]]


def write(folder: Path, settings: dict[str, Any]) -> Path:
    file = folder / "wrong.yml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return file


def refusal(file: Path, overrides: dict[str, Any] | None = None, kind: type[Settings] = CreamRecipe) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(kind, file, overrides or {})
    return checked_sentence(str(caught.value))


def checked_sentence(message: str) -> str:
    assert "\n" not in message
    assert message[-1] in ".?"
    assert message[-2] not in ".?!"
    return message
