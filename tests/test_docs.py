"""The programs in the documentation run, with less training."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from nni_cream.architecture import CreamPath
from nni_cream.child import Child, build_network, save_network
from nni_cream.evaluate import load_checkpoint
from nni_cream.export import export_checkpoint
from tests.conftest import REPOSITORY
from tests.trials.processes import forked


def programs_in(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / document).read_text(encoding="utf-8"), re.DOTALL)


PROGRAMS = programs_in("nni.md")
FILES = programs_in("export.md")
TIMES = programs_in("latency.md")
LESS = {
    '"mnist5k"': '"digits"',
    "max_epochs=30": "max_epochs=2",
    "warmup_epochs=10": "warmup_epochs=1",
    "min_run_time=5": "min_run_time=0.01",
    '{"epochs": 30}': '{"epochs": 2, "data.name": "digits", "cream.warmup_epochs": 1}',
}


def run(program: str, check: str, folder: Path, *, anew: bool = False) -> None:
    """Run a program, and then ``check`` in the same process, which has imported everything unless it is ``anew``."""
    for given, less in LESS.items():
        program = program.replace(given, less)
    # As in a copy of the project.
    (folder / "experiments").symlink_to(REPOSITORY / "experiments")
    file = folder / "program.py"
    file.write_text(program + check, encoding="utf-8")
    command = [sys.executable, str(file)]
    with mock.patch.dict(os.environ, HOME=str(folder)):
        if anew:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        else:
            done = forked(folder, command)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_search_in_python(tmp_path: Path) -> None:
    check = """
from nni_cream.architecture import CreamPath
assert len(set(paths)) == 3
assert all(isinstance(path, CreamPath) for path in paths)
assert all(2.5e6 <= path.cost.macs <= 4e6 for path in strategy.oneshot_module.ranking)
"""
    run(PROGRAMS[0], check, tmp_path)
    # Lines of code, imports apart.
    assert 8 <= len([line for line in PROGRAMS[0].splitlines() if line and "import" not in line]) <= 10


@pytest.mark.slow
def test_a_search_with_a_recipe(tmp_path: Path) -> None:
    run(PROGRAMS[1], "assert 2.5e6 <= child.flops <= 4e6", tmp_path)
    assert (tmp_path / "runs/notebook/child.json").is_file()


@pytest.fixture
def found(tmp_path: Path) -> Path:
    """The files that docs/export.md names, of networks that tell noise apart."""
    torch.manual_seed(0)
    path = "[[0], [0], [1], [2], [3], [0], [0]]"
    data = {"name": "digits", "resolution": 32}
    network = build_network(path, 10, {})
    with torch.no_grad():
        network.train()(torch.randn(16, 3, 32, 32))
    folder = tmp_path / "runs/cream_mnist5k"
    Child(CreamPath.parse(path), 10, 0.5, 1, 2, data, {"name": "a"}).save(folder / "child.json", network)
    file = tmp_path / "runs/retrain-cream_mnist5k/model.safetensors"
    save_network(file, network, architecture=path, num_classes=10, data=data, size={})
    return tmp_path


@pytest.mark.slow
def test_networks_in_python(found: Path) -> None:
    check = """
import torch
assert network.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
assert [tuple(f.shape[1:]) for f in backbone(torch.zeros(2, 3, 32, 32))] == [(40, 4, 4), (320, 1, 1)]
"""
    run(FILES[0], check, found)


@pytest.mark.slow
def test_onnx_without_this_package(found: Path) -> None:
    file = found / "runs/retrain-cream_mnist5k/model.safetensors"
    export_checkpoint(file, output=found / "model.onnx")
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (32, 32, 3), dtype=np.uint8)).save(found / "image.png")
    run(FILES[1], "np.save('logits.npy', logits)\nimport sys\nassert 'torch' not in sys.modules\n", found, anew=True)
    checkpoint = load_checkpoint(file)
    pixels = torch.tensor(np.asarray(Image.open(found / "image.png"))).permute(2, 0, 1) / 255
    # The mean and standard deviation of the data set.
    expected = checkpoint.network.eval()((pixels[None] - 0.3059) / 0.3761)
    torch.testing.assert_close(torch.tensor(np.load(found / "logits.npy")), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_time_of_what_was_found(found: Path) -> None:
    (found / "runs/cream_mnist5k").rename(found / "runs/elpv_fast")
    check = """
assert 0 < measured.median < 10
assert network(images).shape == (1, 10)
assert {tensor.item() for name, tensor in network.state_dict().items() if name.endswith("num_batches_tracked")} == {1}
"""
    run(TIMES[0], check, found)


def test_there_are_no_other_programs() -> None:
    assert (len(PROGRAMS), len(FILES), len(TIMES)) == (2, 2, 1)
