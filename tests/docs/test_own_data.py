"""docs/own_data.md is followed with a folder of images to an exported network, with less training."""

from __future__ import annotations

import json
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from nni_cream.child import Child
from nni_cream.evaluate import load_checkpoint
from tests.conftest import REPOSITORY
from tests.docs.reading import blocks, page

pytestmark = pytest.mark.slow

# Those for a folder; the others are for solar cells, whose package is not everywhere.
COMMANDS = [
    block.text for block in blocks(page("docs/own_data.md")) if block.language == "sh" and "solar" in block.text
]
FASTER = {
    "search_cream.py": [
        *("data.resolution=32", "data.batch_size=16", "flops.min=2", "flops.max=3", "epochs=2"),
        *("cream.warmup_epochs=1", "cream.board_size=2", "cream.board_images=4", "cream.recalibration_batches=2"),
    ],
    "retrain_child.py": [
        *("data.batch_size=16", "data.workers=0", "epochs=2", "schedule.warmup_epochs=1", "mixing.off_epoch=1"),
    ],
    "export_child.py": [],
}


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of somebody who has done all that is on the page with dark and bright images."""
    folder = tmp_path_factory.mktemp("own_data")
    # As in a copy of the project.
    (folder / "experiments").symlink_to(REPOSITORY / "experiments")
    pixels = np.random.default_rng(0)
    for darkest, name in ((0, "defective"), (120, "functional")):
        (folder / "solar" / name).mkdir(parents=True)
        for number in range(30):
            image = Image.fromarray(pixels.integers(darkest, darkest + 120, (36, 30), dtype=np.uint8))
            image.save(folder / "solar" / name / f"{number:04}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for text in COMMANDS:
            text = text.replace("\\\n", " ").replace("/path/to/solar", str(folder / "solar"))
            _, script, *words = shlex.split(text)
            settings = [f"--set={setting}" for setting in FASTER[Path(script).name]]
            patch.setattr(sys, "argv", [script, *words, *settings])
            runpy.run_path(str(REPOSITORY / script), run_name="__main__")
    return folder


def test_they_are_a_search_a_training_and_an_export() -> None:
    assert [Path(text.split()[1]).name for text in COMMANDS] == list(FASTER)


def test_the_search_keeps_to_the_budget_for_the_images(followed: Path) -> None:
    child = Child.load(followed / "runs/solar/child.json")
    assert 2e6 <= child.flops <= 3e6
    assert child.num_classes == 2
    assert (child.data["name"], child.data["folder"]) == ("folder", str(followed / "solar"))


def test_what_was_found_is_trained_on_the_same_images(followed: Path) -> None:
    result = json.loads((followed / "runs/retrain-solar/result.json").read_text())
    assert result["network"] == str(Child.load(followed / "runs/solar/child.json").architecture)
    assert (result["data"]["folder"], result["data"]["resolution"]) == (str(followed / "solar"), 32)


def test_the_file_gives_the_logits_of_the_training(followed: Path) -> None:
    checkpoint = load_checkpoint(followed / "runs/retrain-solar/model.safetensors")
    session = onnxruntime.InferenceSession(followed / "runs/retrain-solar/model.onnx")
    stored = session.get_modelmeta().custom_metadata_map
    mean, std = (np.array(json.loads(stored[name])) for name in ("mean", "std"))
    photograph = Image.open(followed / "solar/defective/0000.png").convert("RGB")
    pixels = np.asarray(photograph.resize((32, 32), Image.Resampling.BILINEAR)) / 255
    image = ((pixels - mean) / std).transpose(2, 0, 1)[None].astype(np.float32)
    (logits,) = session.run(None, {"images": image})
    with torch.no_grad():
        expected = checkpoint.network.eval()(torch.from_numpy(image))
    assert logits.shape == (1, 2)
    assert logits == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-5)
