"""docs/adding.md is done as it stands there, one block after the other, with less training."""

from __future__ import annotations

import functools
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nni_cream import imports
from nni_cream.architecture import CreamPath
from nni_cream.child import Child
from nni_cream.cost import Cost, measure_network
from nni_cream.genotype import Genotype
from nni_cream.models import cream, darts_operations
from tests.conftest import REPOSITORY
from tests.docs.reading import blocks, page

pytestmark = pytest.mark.slow

BLOCKS = blocks(page("docs/adding.md"))
LESS = {
    "max_epochs=20": "max_epochs=2, accelerator='cpu', enable_progress_bar=False",
    "warmup_epochs=5": "warmup_epochs=1",
    # A tenth of the images.
    "DataLoader(data.weights, 64, shuffle=True)": "DataLoader(data.architecture, 48, shuffle=True)",
}
DIGITS = [
    "data.name=digits",
    "data.validation_fraction=0.8",
    "data.architecture_fraction=0.1",
    "data.batch_size=48",
    "device.accelerator=cpu",
]
FASTER = {
    "search_darts.py": ["epochs=1", "space.channels=2", "space.cells=3", "space.nodes=2", "data.resolution=8"],
    "retrain_child.py": ["epochs=1", "schedule.warmup_epochs=0", "darts.channels=4", "darts.cells=3"],
    # Blocks are of the first operation or of the page's.
    "search_cream.py": [
        "epochs=2",
        "cream.warmup_epochs=1",
        "cream.board_size=1",
        "cream.recalibration_batches=2",
        "cream.prior=[1, 0, 0, 0, 0, 0, 3]",
    ],
    "test_child.py": [],
}


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Follower]:
    """Somebody who has done all that is on the page."""
    with pytest.MonkeyPatch.context() as patch:
        follower = Follower(tmp_path_factory.mktemp("adding"), patch)
        for block in BLOCKS:
            getattr(follower, block.language)(block.text)
        yield follower


class Follower:
    """Does what a block says, in a folder."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        import nni.nas.experiment.experiment as experiments

        self.folder = folder
        self.patch = patch
        self.namespace: dict[str, Any] = {}
        self.commands: list[str] = []
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.setattr(darts_operations, "_BUILDERS", dict(darts_operations._BUILDERS))
        patch.setattr(cream, "_OWN", {})
        patch.setattr(imports, "_IMPORTED", [])
        patch.setitem(sys.modules, "my_operations", None)
        patch.delitem(sys.modules, "my_operations")
        # NNI keeps a list of experiments in the home directory, and knows that directory since it was imported.
        patch.setenv("HOME", str(folder))
        patch.setattr(experiments, "Experiments", functools.partial(experiments.Experiments, str(folder)))

    def python(self, text: str) -> None:
        first = text.partition("\n")[0]
        if first.endswith(".py"):
            (self.folder / first.removeprefix("# ")).write_text(text, encoding="utf-8")
            return
        for given, less in LESS.items():
            text = text.replace(given, less)
        exec(compile(text, "docs/adding.md", "exec"), self.namespace)

    def sh(self, text: str) -> None:
        for line in text.replace("\\\n", " ").splitlines():
            python, script, *words = shlex.split(line)
            assert python == "python"
            name = Path(script).name
            self.commands.append(name)
            settings = [*DIGITS, *FASTER[name]] if FASTER[name] else []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", [script, *words, *(f"--set={setting}" for setting in settings)])
                runpy.run_path(str(REPOSITORY / script), run_name="__main__")


def test_every_block_is_one_that_can_be_followed() -> None:
    assert [block.language for block in BLOCKS] == ["python", "sh", *["python"] * 7]


def test_the_commands_find_and_train_networks_of_the_operations(followed: Follower) -> None:
    assert followed.commands == list(FASTER)
    cells = Child.load(followed.folder / "runs/own-cells/child.json")
    assert isinstance(cells.architecture, Genotype)
    assert "conv_3x3" in str(cells.architecture)
    trained = followed.folder / "runs/retrain-own-cells"
    assert (trained / "model.safetensors").is_file()
    found = Child.load(followed.folder / "runs/own-blocks/child.json").architecture
    assert isinstance(found, CreamPath)
    assert {number for stage in found.stages[1:-1] for number in stage} == {0, 100}


def test_reports_go_on_with_the_file(followed: Follower) -> None:
    file = followed.folder / "my_operations.py"
    for run, trial in (("own-cells", "retrain_child.py"), ("own-blocks", "search_cream.py")):
        report = (followed.folder / "runs" / run / "report.html").read_text(encoding="utf-8")
        assert f"python trials/{trial} --import {file}" in report
    assert "fused_3x3" in (followed.folder / "runs/own-blocks/path.svg").read_text(encoding="utf-8")


def test_the_operations_have_costs_and_numbers(followed: Follower) -> None:
    # 12 channels behind the stem become 4; a 3×3 convolution of 4 to 4 channels at 16×16 pixels.
    assert followed.namespace["of_conv"] == Cost(16 * 16 * 4 * 4 * 9, 4 * 4 * 9)
    assert followed.namespace["of_skip"] == Cost(0, 0)
    assert followed.namespace["path"] == CreamPath.parse("[0] [0] [100] [0] [0] [0] [0]")


def test_cream_keeps_their_space_below_the_budget(followed: Follower) -> None:
    names = followed.namespace
    table, middle = names["table"], names["middle"]
    # By hand: 16×16 pixels, 16 channels; the linear layer once.
    stem = {"small": 3 * 3 * 3 * 16 * 256, "large": 5 * 5 * 3 * 16 * 256}
    body = [16 * 16 * 256, 9 * 16 * 16 * 256, 0]
    assert (table.cheapest, table.dearest) == (stem["small"] + 160, stem["large"] + body[1] + 160)
    assert 1 <= len(names["samples"]) <= 3
    for sample in names["samples"]:
        assert stem[sample["stem"]] + body[sample["body"]] + 160 <= middle
        assert len(sample["join"]) == 2
    assert names["best"].sample == names["samples"][0]


def test_darts_gives_a_network_of_their_space(followed: Follower) -> None:
    names = followed.namespace
    assert set(names["sample"]) == set(names["samples"][0]) == {"stem", "body", "join"}
    assert names["network"].eval()(torch.zeros(2, 3, 16, 16)).shape == (2, 10)
    assert measure_network(names["network"], 16).macs in range(names["table"].cheapest, names["table"].dearest + 1)


def test_what_is_saved_is_the_found_network(followed: Follower) -> None:
    names = followed.namespace
    network = names["MySpace"](10).freeze(names["best"].sample)
    network.load_state_dict(load_file(followed.folder / "mine.safetensors"))
