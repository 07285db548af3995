"""Hundreds of inputs that are wrong: each ends in one sentence and exit code 2, before anything is trained or written.

What is wrong with an input is known by construction, from tables that are written by hand and not read off the recipe:
a value outside the range of its setting, an architecture with a fault, a file with a damage.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from nni_cream.architecture import CreamPath
from nni_cream.genotype import PUBLISHED_GENOTYPES
from tests.conftest import REPOSITORY
from tests.trials.commands import Began, call, content

RECIPES = REPOSITORY / "experiments" / "recipes"
COMMANDS = {
    "measure_latency": REPOSITORY / "tests" / "experiments" / "tiny_recipe.yml",
    "search_cream": REPOSITORY / "tests" / "experiments" / "tiny_recipe.yml",
    "search_darts": RECIPES / "darts_mnist5k.yml",
    "retrain_child": RECIPES / "retrain_mnist5k.yml",
    "test_child": RECIPES / "test_child.yml",
}
PATH = CreamPath.parse("[0] [0] [1] [2] [3] [0] [0]")
GENOTYPE = PUBLISHED_GENOTYPES["darts_v2"]
DIGITS = {"name": "digits", "resolution": 32, "batch_size": 64}


def fuzz(examples: int) -> Any:
    """As many examples as said, the same ones at any time."""
    return settings(
        derandomize=True,
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def refused(folder: Path, name: str, *arguments: object) -> str:
    """Run a command that has to be refused, and see that nothing has changed."""
    before = content(folder)
    try:
        ended = call(name, *arguments, folder=folder)
    except Began:
        raise AssertionError(f"{name} {arguments} was taken") from None
    sentence = ended.sentence()
    assert content(folder) == before, (arguments, sentence)
    return sentence


# Values of settings that are wrong, by the kind of setting.
TEXTS = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
NO_NUMBER = TEXTS.filter(lambda text: not re.fullmatch(r"[\s\d._eE+-]*", text)) | st.just([1]) | st.just({"a": 1})
BELOW = st.integers(max_value=-1) | st.floats(max_value=-1e-3)
NO_FINITE = st.sampled_from([float("inf"), float("-inf"), float("nan")])
BOOLS = st.booleans()
FRACTIONS = st.floats(min_value=2, max_value=1e6).filter(lambda value: value != int(value))

NUMBERS = NO_NUMBER | BELOW | NO_FINITE | BOOLS
PROBABILITIES = NUMBERS | st.floats(min_value=1.001, max_value=1e300)


def base(name: str) -> dict[str, Any]:
    """A recipe that is right, on images that are quickly read."""
    recipe: dict[str, Any] = yaml.safe_load(COMMANDS[name].read_text(encoding="utf-8"))
    recipe["data"] = {**recipe.get("data", {}), "name": "digits"}
    return recipe
