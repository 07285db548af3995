"""The two command lines without NNI, as a user starts them, on a tiny recipe."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import os
import pty
import runpy
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from nni_cream.data import load_data
from nni_cream.evaluate import load_checkpoint
from tests.browser import new_page
from tests.trials.processes import command, epochs, kill_in_epoch, trial

pytestmark = pytest.mark.slow


def search(repository: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    recipe = repository / "tests/experiments/tiny_recipe.yml"
    return trial(folder, "search_cream.py", "--recipe", recipe, *arguments)


@pytest.fixture(scope="module")
def searched(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("searched")
    result = search(repository, folder)
    assert result.returncode == 0, result.stderr
    assert "FLOPs:" in result.stdout
    return folder


def test_the_report_shows_in_a_browser_what_was_found(searched: Path) -> None:
    run = searched / "runs" / "tiny"
    child = json.loads((run / "child.json").read_text())
    with new_page(viewport={"width": 1000, "height": 800}) as page:
        page.goto((run / "report.html").as_uri())
        facts = dict(zip(*(page.locator(f"dl.facts {part}").all_inner_texts() for part in ("dt", "dd")), strict=True))
        # Of the tables, by the first word of their heads; tabs lie between cells.
        tables = {table.split()[0]: table.splitlines() for table in page.locator("table").all_inner_texts()}
        path = page.locator("pre").first.inner_text()
        loaded = page.evaluate("() => [...document.images].map(image => image.complete && image.naturalWidth > 100)")
    assert list(facts.values())[:3] == [
        f"{100 * child['accuracy']:.2f}\u00a0%",
        f"{child['flops'] / 1e6:.3f}\u00a0M",
        f"{child['params'] / 1e6:.3f}\u00a0M",
    ]
    assert path == str(child["path"])
    board = [row.split("\t")[:3] for row in tables["Rank"][1:]]
    found = [child, *child["runners_up"]]
    assert [(rank, path) for rank, path, _ in board] == [
        (str(i), str(one["path"])) for i, one in enumerate(found, start=1)
    ]
    assert [row[2].split("\u00a0")[0] for row in board] == [f"{100 * one['accuracy']:.2f}" for one in found]
    stages = [row.split("\t") for row in tables["Stage"][1:]]
    assert [len(row[3].split(";")) for row in stages] == [len(stage) for stage in child["path"]]
    assert loaded
    assert all(loaded)


def blocks_of_the_supernet(checkpoint: Path) -> int:
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    return len({tuple(name.split("blocks.")[1].split(".")[:2]) for name in weights if "blocks." in name})


def inherited(checkpoint: Path, path: list[list[int]]) -> dict[str, Tensor]:
    """What the supernet has for the network of a path, under the names of that network."""
    weights = {}
    for name, tensor in torch.load(checkpoint, weights_only=True)["state_dict"].items():
        _, _, key = name.partition("training_module._model.")
        parts = key.split(".")
        if parts[0] == "blocks":
            stage, block, choice = map(int, parts[1:4])
            if path[stage][block] != choice:
                continue
            del parts[3]
        if key:
            weights[".".join(parts)] = tensor
    return weights


def test_a_search_leaves_everything_in_its_run_directory(searched: Path) -> None:
    run = searched / "runs" / "tiny"
    child = json.loads((run / "child.json").read_text())
    assert 2_000_000 <= child["flops"] <= 3_000_000
    assert child["path"][0] == child["path"][-1] == [0]
    assert len(child["runners_up"]) == 2
    # The inherited weights are those of the path, and nothing else of the supernet.
    weights = load_file(run / "child.safetensors")
    learned = sum(tensor.numel() for name, tensor in weights.items() if "running" not in name and "num_b" not in name)
    assert learned == child["params"]
    assert epochs(run / "metrics.csv") == [1, 2]
    assert json.loads((run / "environment.json").read_text())["versions"]["nni"] == "3.0"
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert (run / "checkpoints" / "last.ckpt").exists()
    assert "board_size: 3" in (run / "recipe.yml").read_text()


@torch.no_grad()
def test_the_exported_network_is_as_good_as_the_search_says(searched: Path) -> None:
    run = searched / "runs" / "tiny"
    child = json.loads((run / "child.json").read_text())
    network = load_checkpoint(run / "child.safetensors").network.eval()
    held_out = load_data("digits", resolution=32, seed=0).validation
    images = torch.stack([image for image, _ in (held_out[i] for i in range(len(held_out)))])

    def accuracy() -> float:
        return (network(images).argmax(-1).numpy() == held_out.labels).mean().item()

    # The batches that its statistics are from were drawn anew: 30 draws were at most 0.07 away, for each of 4 seeds.
    assert accuracy() == pytest.approx(child["accuracy"], abs=0.1)
    shared = inherited(run / "checkpoints/last.ckpt", child["path"])
    exported = network.state_dict()
    assert exported.keys() == shared.keys()
    for name, tensor in exported.items():
        if name.endswith("num_batches_tracked"):
            assert tensor.item() == 2 < shared[name].item()  # recalibration_batches
        elif "running" not in name:
            assert torch.equal(tensor, shared[name])
    network.load_state_dict(shared)
    assert accuracy() < child["accuracy"] - 0.2


def test_the_same_command_again_shows_the_result_and_another_recipe_is_refused(
    repository: Path, searched: Path
) -> None:
    before = (searched / "runs/tiny/child.json").read_bytes()
    again = search(repository, searched)
    assert again.returncode == 0
    assert "has ended" in again.stdout
    other = search(repository, searched, "--set", "seed=7")
    assert other.returncode == 2
    assert other.stderr.startswith("error: ")
    assert "--name" in other.stderr
    assert (searched / "runs/tiny/child.json").read_bytes() == before


def test_the_same_seed_finds_the_same_weights(repository: Path, searched: Path) -> None:
    result = search(repository, searched, "--output", str(searched / "again"))
    assert result.returncode == 0, result.stderr
    assert (searched / "again/child.json").read_text() == (searched / "runs/tiny/child.json").read_text()
    first = load_file(searched / "runs/tiny/child.safetensors")
    second = load_file(searched / "again/child.safetensors")
    assert all(tensor.equal(second[name]) for name, tensor in first.items())


def test_a_person_at_a_terminal_sees_a_progress_bar_and_no_lines(repository: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    recipe = repository / "tests/experiments/tiny_recipe.yml"
    full = command("search_cream.py", "--recipe", recipe)
    with subprocess.Popen(full, cwd=tmp_path, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        seen = b""
        # Linux ends the reading with an error once nobody holds the other end.
        with contextlib.suppress(OSError):
            while part := os.read(ours, 65536):
                seen += part
    os.close(ours)
    assert process.returncode == 0
    assert b"Epoch 1: 100%|" in seen
    assert b"epoch 1, " not in seen


def test_a_killed_search_goes_on_where_it_was(repository: Path, tmp_path: Path) -> None:
    recipe = repository / "tests/experiments/tiny_recipe.yml"
    kill_in_epoch(3, tmp_path, "search_cream.py", "--recipe", recipe, "--set", "epochs=4")
    metrics = tmp_path / "runs/tiny/metrics.csv"
    assert epochs(metrics) == [1, 2, 3]
    result = search(repository, tmp_path, "--set", "epochs=4")
    assert result.returncode == 0, result.stderr
    # Epoch 3 may have been run again, if it was reported but not yet in a checkpoint; the table has it once.
    assert epochs(metrics) == [1, 2, 3, 4]
    assert "epoch 1," not in result.stdout
    assert (tmp_path / "runs/tiny/child.json").exists()


def test_a_search_killed_after_its_last_epoch_still_ends(repository: Path, searched: Path, tmp_path: Path) -> None:
    shutil.copytree(searched / "runs", tmp_path / "runs")
    files = [tmp_path / "runs/tiny" / name for name in ("child.json", "child.safetensors", "history.json")]
    expected = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    result = search(repository, tmp_path)
    assert result.returncode == 0, result.stderr
    assert [file.read_bytes() for file in files] == expected
    assert epochs(tmp_path / "runs/tiny/metrics.csv") == [1, 2]


def test_further_operations_and_depth_are_searched_and_retrained(repository: Path, tmp_path: Path) -> None:
    options = ["space.dil_conv=true", "space.resunit=[bottleneck, basic]", "space.skip=true", "flops.max=8"]
    # None of the inverted residuals may be drawn, so that every block of the path is something else.
    options += ["flops.min=0", "cream.prior=[0, 0, 0, 0, 0, 0, 0.2, 0.1, 0.2, 0.1, 0.4]"]
    result = search(repository, tmp_path, *(part for option in options for part in ("--set", option)))
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs/tiny"
    child = json.loads((run / "child.json").read_text())
    architectures = [child["path"], *(other["path"] for other in child["runners_up"])]
    assert {choice for path in architectures for stage in path[1:-1] for choice in stage} <= {6, 7, 8, 9}
    depth = blocks_of_the_supernet(run / "checkpoints/last.ckpt")
    assert any(sum(map(len, path)) < depth for path in architectures)  # blocks have been left out

    words = ["--set", "epochs=1", "--set", "inherit_weights=true", "--set", "schedule.warmup_epochs=0"]
    result = trial(tmp_path, "retrain_child.py", *words)
    assert result.returncode == 0, result.stderr
    stored = json.loads((tmp_path / "runs/retrain-tiny/result.json").read_text())
    assert (stored["flops"], stored["params"]) == (child["flops"], child["params"])


def test_the_recipe_of_the_paper_runs_on_a_small_imagenet(repository: Path, tmp_path: Path) -> None:
    """Space, resolution, prior, schedule and strategy as shipped; fewer images, so a smaller batch and fewer epochs."""
    colours = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 2)):
        for name in ("n01440764", "n01443537", "n01484850"):
            (tmp_path / "imagenet" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = colours.integers(0, 256, (240, 260, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "imagenet" / part / name / f"{name}_{number}.JPEG")
    recipe = repository / "experiments/recipes/cream_imagenet.yml"
    smaller = [f"data.folder={tmp_path / 'imagenet'}", "data.batch_size=8", "data.workers=0", "optimizer.lr=0.01"]
    smaller += ["epochs=2", "cream.warmup_epochs=1", "cream.meta_interval=2", "cream.board_size=2"]
    words = [part for option in smaller for part in ("--set", option)]
    result = trial(tmp_path, "search_cream.py", "--recipe", recipe, *words)
    assert result.returncode == 0, result.stderr
    child = json.loads((tmp_path / "runs/cream_imagenet/child.json").read_text())
    assert child["num_classes"] == 3
    assert child["data"]["resolution"] == 224
    assert [len(stage) for stage in child["path"]] == [1, 4, 4, 4, 4, 4, 1]  # golden: 0 to 600 M
    assert 200e6 < child["flops"] <= 600e6


@pytest.mark.parametrize("inherit", ["false", "true"])
def test_retraining_takes_the_newest_search(searched: Path, inherit: str) -> None:
    recipe = searched / "retrain.yml"
    recipe.write_text(f"name: again\nepochs: 2\ninherit_weights: {inherit}\noptimizer: {{lr: 0.02}}\n")
    name = f"retrained-{inherit}"
    words = ("--recipe", recipe, "--name", name)
    result = trial(searched, "retrain_child.py", *words)
    assert result.returncode == 0, result.stderr
    run = searched / "runs" / name
    stored = json.loads((run / "result.json").read_text())
    child = json.loads((searched / "runs/tiny/child.json").read_text())
    assert stored["network"] == str(child["path"])
    assert stored["data"]["name"] == "digits"
    assert (stored["flops"], stored["params"]) == (child["flops"], child["params"])
    assert result.stdout.splitlines()[-1] == f"test accuracy: {stored['test_accuracy']:.4f}"
    assert load_file(run / "model.safetensors").keys() == load_file(searched / "runs/tiny/child.safetensors").keys()

    # As if it had been killed after the last epoch: nothing is left to train, and the result is the same.
    (run / "result.json").unlink()
    again = trial(searched, "retrain_child.py", *words)
    assert again.returncode == 0, again.stderr
    assert json.loads((run / "result.json").read_text()) == stored
    assert epochs(run / "metrics.csv") == [1, 2]


def test_retraining_without_a_search_says_so_and_trains_the_published_network(tmp_path: Path) -> None:
    words = ["--set", "epochs=1", "--set", "data.name=digits", "--set", "schedule.warmup_epochs=0"]
    result = trial(tmp_path, "retrain_child.py", *words)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("No search has run yet")
    assert json.loads((tmp_path / "runs/retrain-cream_14/result.json").read_text())["network"] == "cream_14"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[[0], [a]]", "'[[0], [a]]' is not a Cream path"),
        ("Genotype(normal=3)", "A genotype has the fields normal, "),
        ("cream_41", "timm has no network 'cream_41'; did you mean"),
    ],
)
def test_an_architecture_that_is_none_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    result = trial(tmp_path, "retrain_child.py", "--set", "data.name=digits", "--architecture", text)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert sentence in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_an_architecture_is_retrained_by_its_text(tmp_path: Path) -> None:
    path = "[[0], [0], [3], [4, 0], [2], [3], [0]]"
    words = ["--set", "data.name=digits", "--set", "epochs=1", "--set", "schedule.warmup_epochs=0"]
    result = trial(tmp_path, "retrain_child.py", "--architecture", path, *words)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"Training {path}.")
    # Lightning speaks of it for every checkpoint, between the lines of the epochs.
    assert "weights_only" not in result.stdout + result.stderr
    assert json.loads((tmp_path / "runs/retrain-architecture/result.json").read_text())["network"] == path


def test_a_last_batch_of_one_image_is_shared_out(repository: Path, tmp_path: Path) -> None:
    assert len(load_data("digits", resolution=32).architecture) == 143 == 2 * 71 + 1
    result = search(repository, tmp_path, "--set", "data.batch_size=71", "--set", "data.workers=1")
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs/tiny"
    with (run / "metrics.csv").open(encoding="utf-8") as lines:
        correct = [float(row["val_accuracy"]) * 143 for row in csv.DictReader(lines)]
    correct.append(json.loads((run / "child.json").read_text())["accuracy"] * 143)
    assert correct == pytest.approx([round(number) for number in correct], abs=1e-9)  # no image has been left out


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
ONLY_THE_DEAREST = ("cream.prior=[0, 0, 0, 0, 0, 1]", "flops.max=2.6")


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("search_cream.py", ("data.name=folder", "data.folder=/nowhere"), "/nowhere"),
        ("search_cream.py", ("flops.min=40", "flops.max=50"), "No network costs 40 M to 50 M multiply-accumulates"),
        ("search_cream.py", ONLY_THE_DEAREST, "The prior gives hardly any path that costs 2 M to 2.6 M"),
        (
            "search_cream.py",
            ("data.batch_size=8000", "cream.teacher=top1"),
            "data.batch_size is 8000, but there are 1152 images",
        ),
        ("search_cream.py", ("optimizer.name=sdg",), "did you mean 'sgd'?"),
        pytest.param("search_cream.py", ("device.accelerator=gpu",), "device.accelerator 'gpu'", marks=NO_GPU),
        ("retrain_child.py", ("data.batch_size=8000",), "data.batch_size is 8000, but there are 1295 images"),
        ("retrain_child.py", ("optimizer.name=sdg",), "did you mean 'sgd'?"),
        pytest.param("retrain_child.py", ("device.accelerator=gpu",), "device.accelerator 'gpu'", marks=NO_GPU),
    ],
    ids=str,
)
def test_a_start_that_fails_does_not_claim_the_folder(
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    settings: tuple[str, ...],
    expected: str,
) -> None:
    options = [f"--set={setting}" for setting in ("data.name=digits", *settings)]
    if name == "search_cream.py":
        options += ["--recipe", str(repository / "tests/experiments/tiny_recipe.yml")]
    monkeypatch.setattr(sys, "argv", [name, *options])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(repository / "trials" / name), run_name="__main__")
    assert caught.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.splitlines()[-1].startswith("error: ")
    assert expected in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert not list(tmp_path.iterdir())


def test_retraining_refuses_what_is_not_there(tmp_path: Path) -> None:
    for extra in (["--child", "nowhere.json"], ["--set", "inherit_weights=true"]):
        result = trial(tmp_path, "retrain_child.py", "--set", "data.name=digits", *extra)
        assert result.returncode == 2
        assert result.stderr.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in result.stderr
        assert not list(tmp_path.iterdir())
