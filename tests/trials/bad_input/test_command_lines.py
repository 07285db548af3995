"""Command lines with words that are wrong by themselves or together, in this process and in one of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from string import ascii_lowercase

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.latency_tables import made_up
from tests.trials.bad_input.refusals import COMMANDS, TEXTS, base, fuzz, refused
from tests.trials.commands import Ended, content
from tests.trials.processes import SECONDS, command

EVERYWHERE = [["--colour", "blue"], ["--set"], ["--recipe"], ["--set", "epochs"], ["--set", "=3"], ["stray"], ["-x"]]
EVERYWHERE += [["--recipe", "none.yml"], ["--recipe", "."], ["--recip", "a.yml"], ["--set", "device.devices=[1"]]
EVERYWHERE += [["--set", "device={precision: 32-true, precision: 32-true}"], ["--set", "device.precision.bits=3"]]
OF_RUNS = [["--name", "a/b"], ["--name", ""], ["--name", ".."], ["--name", "a" * 300], ["--output", "file"]]
OF_RUNS += [["--output", "file/run"], ["--output", "other"], ["--output", "a" * 300], ["--set", "rank"]]
OF_RUNS += [["--set", f"data={{name: folder, folder: {folder}}}"] for folder in ("nowhere", "file", "~nobody", "''")]
OF_RUNS += [["--set", 'data={name: folder, folder: "a\\0b"}'], ["--set", "data={name: digits, folder: other}"]]
OF_RUNS += [["--set", "data.name=folder"], ["--set", "data.name=imagenet"], ["--set", "data.name=cifar10"]]
# Settings that are right by themselves, and not together.
CONFLICTS = [
    ["--set", f"data.augmentation={{{pair}}}"] for pair in ("re_mode: const", "crop_padding: 4, scale: [0.5, 1]")
]
CONFLICTS += [
    ["--set", "data.augmentation={auto_augment: rand-m9, color_jitter: 0.4}"],
    ["--set", "data.batch_size=9999"],
    ["--set", "device.threads=100000"],
]
CONFLICTS += [["--set", "optimizer.lr=0.01", "--set", "schedule.min_lr=0.02"], ["--set", "data.folder=other"]]
CONFLICTS += [["--set", "epochs=2", "--set", "schedule.warmup_epochs=2"], ["--set", "data.download=true"]]
CONFLICTS += [["--set", "data.architecture_fraction=0.5", "--set", "data.validation_fraction=0.5"]]
CONFLICTS += [
    ["--set", "optimizer={name: sgd, lr: 0.1, momentum: 0}"],
    ["--set", "data.batch_size=31", "--set", "device.devices=2"],
]
CONFLICTS += [
    ["--set", f"data={{name: folder, folder: images/{kind}}}"] for kind in ("none", "one", "empty", "few", "parts")
]
LINES = {
    "search_cream": [
        *EVERYWHERE,
        *OF_RUNS,
        *CONFLICTS,
        ["--set", "flop.max=3"],
        ["--set", "flops.max=nan"],
        *(["--set", f"latency={{table: {table}, max: 3}}"] for table in ("nowhere", "file", ".", "other/recipe.yml")),
        *(["--set", f"latency={{table: latency.json, {interval}}}"] for interval in ("max: 0.01", "min: 90, max: 99")),
        ["--set", "latency={table: latency.json, max: 9}", "--set", "data.resolution=64"],
        ["--set", "latency={table: latency.json, max: 9}", "--set", "space.dil_conv=true"],
    ],
    "search_darts": [
        *EVERYWHERE,
        *OF_RUNS,
        *CONFLICTS,
        ["--set", "flops.max=3"],
        ["--set", "space.operations=[none, none]"],
    ],
    "retrain_child": [
        *EVERYWHERE,
        *OF_RUNS,
        *CONFLICTS,
        *([option, value] for option in ("--child",) for value in ("file", "nowhere", ".", "recipe.yml")),
        ["--child", "a", "--architecture", "cream_14"],
        ["--architecture", "cream_15"],
        ["--architecture", "hf-hub:timm/resnet18.a1_in1k", "--name", "a"],
        ["--architecture", "vit_tiny_patch16_224"],
        ["--architecture", "vgg11", "--set", "drop_path_rate=0.1"],
        ["--set", "inherit_weights=true"],
        ["--set", "rank=2"],
        *(["--seeds", *seeds] for seeds in ((), ("x",), ("1", "1"), ("-1", "0"), ("0", "5000000000"))),
        ["--seeds", "0", "1", "--set", "seed=3"],
        ["--set", "mixing.mixup=0.2", "--set", "data.batch_size=33"],
        ["--set", "optimizer.eps=0.001"],
    ],
    "test_child": [
        *EVERYWHERE,
        *(["--checkpoint", value] for value in ("file", "nowhere", "other", "recipe.yml")),
        ["--checkpoint", "file", "--model", "cream_14"],
        ["--checkpoint", "file", "--model", "cream_15"],
        ["--checkpoint", "file", "--weights", "both"],
        ["--set", "epochs=3"],
        ["--name", "a"],
        [],
    ],
    "export_child": [
        [],
        ["stray"],
        *(["--checkpoint", value] for value in ("file", "nowhere", "other")),
        ["--checkpoint", "file", "--model", "cream_15"],
        ["--checkpoint", "file", "--weights", "both"],
        *(["--checkpoint", "file", option, "x"] for option in ("--resolution", "--opset", "--format", "--import")),
    ],
    "compare": [
        [],
        ["stray"],
        *(["--child", value] for value in ("file", "nowhere", ".")),
        *(["--random", value] for value in ("-1", "x", "1.5")),
        *(["--seeds", *seeds] for seeds in ((), ("x",), ("1", "1"))),
        ["--networks", "resnet18", "resnet18"],
    ],
    "rank_correlation": [
        [],
        ["--search"],
        *(["--search", value] for value in ("file", "nowhere", "other", ".")),
        ["--search", "other", "./other"],
        *(
            ["--search", "other", option, value]
            for option, values in (
                ("--paths", ("2", "0", "x", "5000")),
                ("--seed", ("-1", "x", "5000000000")),
                ("--workers", ("0", "-1", "1.5")),
                ("--set", ("path=3", "rank", "device.devices=2", "inherit_weights=true", "epochs=0")),
                ("--name", ("a/b", "")),
            )
            for value in values
        ),
        *(["--search", "other", "--seeds", *seeds] for seeds in ((), ("x",), ("1", "1"), ("-1",))),
        ["--search", "other", "--seeds", "1", "2", "--set", "seed=3"],
    ],
    "measure_latency": [
        *EVERYWHERE,
        *(["--batch-size", value] for value in ("0", "-1", "x", "1.5", "20000")),
        *(["--threads", value] for value in ("0", "x", "100000")),
        *(["--children", value] for value in ("2", "x", "9999")),
        *(["--classes", value] for value in ("0", "x")),
        ["--device", "tpu"],
        ["--precision", "16-mixed"],
        ["--output", "other"],
        ["--output", "file/latency.json"],
        ["--set", "flops.max=0.01"],
        ["--set", "data={name: folder, folder: nowhere}"],
    ],
    "make_subimagenet": [
        *([*line] for line in ([], ["a"], ["nowhere", "new"], ["file", "new"], [".", "new"], ["~nobody", "new"])),
        *(
            ["imagenet", "new", option, value]
            for option in ("--classes", "--train-images")
            for value in ("0", "x", "9")
        ),
        ["imagenet", "new", "--mode", "move"],
        ["imagenet", "other", "--classes", "1", "--train-images", "1", "--val-images", "1"],
        ["imagenet", "imagenet/train/new", "--classes", "1", "--train-images", "1", "--val-images", "1"],
    ],
    "experiment": [
        *([*line] for line in ([], ["nowhere.yml"], ["."], ["file"], ["bomb.yml"], ["twice.yml"], ["a.yml", "b.yml"])),
        *(["twice.yml", "--port", port] for port in ("x", "0", "-1", "70000", "3.5")),
    ],
}


def make_images(root: Path) -> None:
    """Folders that are no data sets: without classes, with one, with an empty or too small one, with half a part."""
    (root / "none").mkdir(parents=True)
    for kind, name, number in (
        ("one", "a", 9),
        ("empty", "a", 9),
        ("empty", "b", 0),
        ("few", "a", 9),
        ("few", "b", 2),
        ("parts/train", "a", 9),
        ("parts/train", "b", 9),
        ("parts/test", "a", 9),
    ):
        (root / kind / name).mkdir(parents=True, exist_ok=True)
        for index in range(number):
            Image.new("RGB", (9, 9)).save(root / kind / name / f"{index}.png")


@pytest.mark.parametrize("name", sorted(LINES))
def test_command_lines(place: Path, name: str) -> None:
    (place / "file").write_bytes(b"\x80 no text")
    (place / "other").mkdir()
    (place / "other" / "recipe.yml").write_text("name: other\n", encoding="utf-8")
    (place / "imagenet/train/cat").mkdir(parents=True)
    (place / "imagenet/train/cat/1.png").write_bytes(b"")
    (place / "imagenet/train/cat/2.png").write_bytes(b"")
    (place / "bomb.yml").write_text("trialCommand: !!python/object/apply:os.mkdir [executed]\n", encoding="utf-8")
    (place / "twice.yml").write_text("trialCommand: a\nmaxTrialNumber: 1\ntrialCommand: b\n", encoding="utf-8")
    made_up().save(place / "latency.json")
    make_images(place / "images")
    for line in LINES[name]:
        given: list[object] = []
        if name in COMMANDS:
            recipe = place / "recipe.yml"
            recipe.write_text(yaml.safe_dump(base(name)), encoding="utf-8")
            given = [] if "--recipe" in line else ["--recipe", recipe]
        sentence = refused(place, name, *given, *line)
        # Of an option, that it is this one.
        assert "--port" in sentence or "--port" not in line


# Some options of every command, written right.
OPTIONS = {
    "search_cream": ["--recipe", "--set", "--name", "--output", "--import"],
    "search_darts": ["--recipe", "--set", "--name", "--output", "--import"],
    "retrain_child": ["--child", "--architecture", "--seeds", "--recipe", "--set", "--name", "--output"],
    "test_child": ["--checkpoint", "--model", "--weights", "--recipe", "--set"],
    "export_child": ["--checkpoint", "--format", "--opset", "--resolution", "--output"],
    "compare": ["--child", "--random", "--seeds", "--networks"],
    "rank_correlation": ["--search", "--paths", "--seed", "--seeds", "--workers", "--name"],
    "measure_latency": ["--batch-size", "--threads", "--children", "--device", "--precision", "--output"],
    "make_subimagenet": ["--classes", "--train-images", "--val-images", "--mode"],
    "experiment": ["--port"],
}


@fuzz(120)
@given(st.data())
def test_options_with_a_slip(place: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(OPTIONS)))
    option = data.draw(st.sampled_from(OPTIONS[name]))
    at = data.draw(st.integers(min_value=3, max_value=len(option) - 1))
    letter = data.draw(st.sampled_from(ascii_lowercase))
    # One letter less, more, or another one; two that have changed places; a capital.
    slips = [
        option[:at] + option[at + 1 :],
        option[:at] + letter + option[at:],
        option[:at] + letter + option[at + 1 :],
    ]
    slips += [option[: at - 1] + option[at] + option[at - 1] + option[at + 1 :], option[:at] + option[at:].upper()]
    slip = data.draw(st.sampled_from(slips).filter(lambda word: word not in OPTIONS[name]))
    value = data.draw(TEXTS.filter(lambda text: not text.startswith("-") and text.strip() == text))
    places = {
        "make_subimagenet": ["imagenet", "new"],
        "experiment": ["some.yml"],
        "rank_correlation": ["--search", "a"],
    }
    assert slip in refused(place, name, *places.get(name, []), slip, value)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*sorted(COMMANDS), "make_subimagenet", "experiment"])
def test_in_a_process_of_its_own(place: Path, name: str) -> None:
    start = [sys.executable, "-m", "nni_cream.experiment"] if name == "experiment" else command(f"{name}.py")
    full = [*start, "a", "b", "--colour", "blue"]
    done = subprocess.run(full, cwd=place, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert "--colour" in Ended(done.returncode, done.stdout, done.stderr).sentence()
    assert len(done.stderr.splitlines()) == 1
    assert content(place) == {}
