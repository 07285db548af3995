"""Hundreds of inputs that are wrong: each ends in one sentence and exit code 2, before anything is trained or written.

What is wrong with an input is known by construction, from the tables below, which are written by hand and not read off
the recipe: a value outside the range of its setting, an architecture with a fault, a file with a damage.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import nni_cream  # noqa: F401 (registers the networks)
from nni_cream.architecture import CreamPath
from nni_cream.child import Child, build_network, save_network
from nni_cream.genotype import PUBLISHED_GENOTYPES
from tests.conftest import REPOSITORY
from tests.latency_tables import made_up
from tests.trials.commands import Began, Ended, call, content

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

tried: list[str] = []


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
    tried.append(sentence)
    return sentence


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


# --- Settings: of each kind, values that are outside its range. ---

TEXTS = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
NO_NUMBER = TEXTS.filter(lambda text: not re.fullmatch(r"[\s\d._eE+-]*", text)) | st.just([1]) | st.just({"a": 1})
BELOW = st.integers(max_value=-1) | st.floats(max_value=-1e-3)
NO_FINITE = st.sampled_from([float("inf"), float("-inf"), float("nan")])
BOOLS = st.booleans()
FRACTIONS = st.floats(min_value=2, max_value=1e6).filter(lambda value: value != int(value))

NUMBERS = NO_NUMBER | BELOW | NO_FINITE | BOOLS
COUNTS = NUMBERS | st.just(0) | FRACTIONS | st.integers(min_value=2_000_000)
PROBABILITIES = NUMBERS | st.floats(min_value=1.001, max_value=1e300)
WORDS = TEXTS.map(lambda text: f"no {text}") | st.integers() | st.just(["sgd"])
SWITCHES = TEXTS.map(lambda text: f"no {text}") | st.integers(min_value=2) | st.just([True])

COMMON = {
    "epochs": COUNTS,
    "seed": NUMBERS | st.integers(min_value=2**32),
    "name": st.text(alphabet="/ .-\t", max_size=3) | st.integers(),
    "data.name": WORDS,
    "data.resolution": COUNTS | st.integers(min_value=1, max_value=7),
    "data.batch_size": COUNTS | st.just(1),
    "data.workers": NUMBERS | FRACTIONS | st.integers(min_value=10_000),
    "data.download": SWITCHES,
    "data.architecture_fraction": PROBABILITIES | st.sampled_from([0, 1]),
    "data.validation_fraction": PROBABILITIES | st.sampled_from([0, 1]),
    "data.augmentation.hflip": PROBABILITIES,
    "data.augmentation.re_prob": PROBABILITIES,
    "data.augmentation.color_jitter": NUMBERS,
    "data.augmentation.scale": NUMBERS | st.just([0.5]) | st.just([0.5, 0.6, 0.7]) | st.just([0.9, 0.1]),
    "data.augmentation.interpolation": WORDS,
    "data.augmentation.auto_augment": WORDS | st.just("rand-m9-zz"),
    "data.augmentation.crop_padding": COUNTS,
    "data.augmentation.cutout": COUNTS,
    "optimizer.name": WORDS,
    "optimizer.lr": NUMBERS | st.just(0),
    "optimizer.momentum": PROBABILITIES | st.just(1),
    "optimizer.weight_decay": NUMBERS,
    "optimizer.filter_bias_and_bn": SWITCHES,
    "schedule.name": WORDS,
    "schedule.interval": WORDS,
    "schedule.decay_rate": PROBABILITIES | st.just(0),
    "schedule.decay_epochs": NUMBERS | st.just(0),
    "optimizer.eps": NUMBERS | st.just(0),
    "schedule.warmup_epochs": NUMBERS | FRACTIONS | st.integers(min_value=1_000),
    "schedule.min_lr": NUMBERS | st.floats(min_value=100, max_value=1e300),
    "device.accelerator": WORDS | st.just("tpus"),
    "device.devices": COUNTS | st.just(3),
    "device.precision": WORDS,
    "device.memory_format": WORDS,
    "device.threads": COUNTS,
}
LABEL_SMOOTHING = PROBABILITIES | st.just(1)
SETTINGS = {
    "search_cream": {
        **COMMON,
        "flops.min": NUMBERS | st.floats(min_value=100, max_value=1e300),
        "flops.max": NUMBERS | st.just(0) | st.floats(min_value=0.01, max_value=1),
        "latency.table": WORDS | st.just("nowhere.json"),
        "latency.min": NUMBERS | st.floats(min_value=0.01, max_value=1e300),
        "latency.max": NUMBERS | st.just(0) | st.floats(min_value=0.01, max_value=1e300),
        "space.dil_conv": SWITCHES,
        "space.resunit": WORDS | st.just(["basic", "none"]),
        "cream.board_size": COUNTS,
        "cream.board_images": COUNTS | st.integers(min_value=33),
        "cream.admission_gap": NUMBERS,
        "cream.warmup_epochs": NUMBERS | FRACTIONS | st.integers(min_value=2),
        "cream.prior": WORDS | st.just([0, 0, 0, 0, 0, 0]) | st.just([-1, 2, 1, 1, 1, 1]) | st.just([1, 2]),
        "cream.teacher": WORDS,
        "cream.label_smoothing": LABEL_SMOOTHING,
        "cream.meta_interval": COUNTS,
        "cream.matching_lr": NUMBERS | st.just(0),
    },
    "search_darts": {
        **COMMON,
        "data.resolution": COUNTS | st.sampled_from([4, 33, 34, 35]),
        "optimizer.name": WORDS | st.just("adam"),
        "space.channels": COUNTS | st.sampled_from([1, 3, 17]),
        "space.cells": COUNTS | st.sampled_from([1, 2]),
        "space.nodes": COUNTS,
        "space.concat": COUNTS | st.just(99),
        "space.operations": WORDS | st.just([]) | st.just(["none"]) | st.just(["sep_conv_9x9"]),
        "darts.order": WORDS,
        "darts.hypergradient": WORDS,
        "darts.radius": NUMBERS | st.just(0),
        "darts.warmup_epochs": NUMBERS | FRACTIONS | st.integers(min_value=3),
        "darts.alpha_betas": NUMBERS | st.just([0.5]) | st.just([0.5, 1]) | st.just([-0.5, 0.9]),
        "darts.gradient_clip": NUMBERS | st.just(0),
        "darts.stop_above_skips": NUMBERS | FRACTIONS,
        "darts.eigenvalue": WORDS | st.just(True),
    },
    "retrain_child": {
        **COMMON,
        "rank": COUNTS | st.integers(min_value=2, max_value=9),
        "inherit_weights": SWITCHES | st.just(True),
        "label_smoothing": LABEL_SMOOTHING,
        "drop_rate": LABEL_SMOOTHING,
        "drop_path_rate": LABEL_SMOOTHING,
        "gradient_clip": NUMBERS | st.just(0),
        "mixing.mixup": NUMBERS | st.floats(min_value=1001),
        "mixing.cutmix": NUMBERS | st.floats(min_value=1001),
        "mixing.prob": PROBABILITIES,
        "mixing.switch_prob": PROBABILITIES,
        "mixing.off_epoch": COUNTS | st.just(5),
        "ema.decay": PROBABILITIES | st.sampled_from([0, 1]),
        "ema.warmup": SWITCHES,
        "darts.stem": WORDS,
        "darts.channels": COUNTS | st.sampled_from([1, 3]),
    },
    "test_child": {
        key: values
        for key, values in COMMON.items()
        if key.startswith(("device.", "data.")) and "augmentation" not in key and "fraction" not in key
    },
}
# Settings of which null is a value, as are lists or other words, are written here.
NULLABLE = re.compile(
    r"augmentation|data\.(resolution|name|folder|batch_size|workers)|concat|threads|clip|skips|eps|decay|off_epoch"
    r"|latency\.(table|max)"
)


@st.composite
def wrong_settings(draw: st.DrawFn) -> tuple[str, str, Any]:
    name = draw(st.sampled_from(sorted(SETTINGS)))
    key = draw(st.sampled_from(sorted(SETTINGS[name])))
    values = SETTINGS[name][key]
    if not NULLABLE.search(key):
        values |= st.none()
    return name, key, draw(values)


def base(name: str) -> dict[str, Any]:
    """A recipe that is right, on images that are quickly read."""
    recipe: dict[str, Any] = yaml.safe_load(COMMANDS[name].read_text(encoding="utf-8"))
    recipe["data"] = {**recipe.get("data", {}), "name": "digits"}
    return recipe


def sources(name: str, folder: Path) -> list[object]:
    """Arguments that say what is trained or tested."""
    if name == "retrain_child":
        return ["--architecture", str(PATH)]
    return ["--checkpoint", folder / "model.safetensors"] if name == "test_child" else []


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a search and a training leave behind."""
    folder = tmp_path_factory.mktemp("trained")
    network = build_network(str(PATH), 10, {})
    Child(PATH, 10, 0.5, 1, 2, DIGITS, {"name": "a", "seed": 0}).save(folder / "child.json", network)
    save_network(folder / "model.safetensors", network, architecture=str(PATH), num_classes=10, data=DIGITS, size={})
    cream_14 = build_network("cream_14", 10, {}).state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in cream_14.items()}}, folder / "14.pth.tar")
    return folder


class TestRecipes:
    @fuzz(250)
    @given(wrong_settings(), st.booleans())
    def test_with_a_value_out_of_range(
        self, place: Path, trained: Path, wrong: tuple[str, str, Any], in_file: bool
    ) -> None:
        name, key, value = wrong
        recipe = base(name)
        extra: list[object] = []
        # A training is named after the network, whatever the file says.
        if in_file and (name, key) != ("retrain_child", "name"):
            group = recipe
            *groups, last = key.split(".")
            for part in groups:
                group = group.setdefault(part, {})
            group[last] = value
        else:
            extra = ["--set", f"{key}={json.dumps(value)}"]
        file = place / "recipe.yml"
        file.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
        sentence = refused(place, name, "--recipe", file, *sources(name, trained), *extra)
        # What is wrong is named: the setting, or the group that it would be in.
        assert key.rpartition(".")[2] in sentence or key.split(".")[0] in sentence

    @pytest.mark.parametrize("name", sorted(COMMANDS))
    def test_that_are_no_yaml_or_no_settings(self, place: Path, name: str) -> None:
        good = COMMANDS[name].read_text(encoding="utf-8")
        marker = place / "executed"
        for bad in (
            b"",
            b"# only a comment",
            b"- a list",
            b"\xff\xfe\x00",
            f"{good}\nseed: [1".encode(),
            f"{good}\nseed: 1: 2".encode(),
            f"{good}\nseed: &a [*a, *b]".encode(),
            f"{good}\n\tseed: 1".encode(),
            f"{good}\nseed: 2001-99-99".encode(),
            f"{good}\nseed: {'9' * 5000}".encode(),
            f"{good}\nseed: 0x{'f' * 9000}".encode(),
            f"{good}\nseed: {'[' * 3000}".encode(),
            f"{good}\n1: 2".encode(),
            f"{good}\ncolour: blue".encode(),
            f"{good}\ndevice: {{precision: 32-true}}\ndevice: {{precision: 32-true}}".encode(),
            f"{good}\nname: !!python/object/apply:os.system ['touch {marker}']".encode(),
            f"{good}\nname: !!python/object/new:os.system ['touch {marker}']".encode(),
            f"{good}\nname: !!python/name:os.system".encode(),
        ):
            (place / "recipe.yml").write_bytes(bad)
            sentence = refused(place, name, "--recipe", place / "recipe.yml")
            assert "recipe.yml" in sentence
            assert len(sentence) < 1000
            assert not marker.exists()


# --- Architectures: a path or a genotype with one fault. ---

CHOICES = st.integers(min_value=10) | st.integers(max_value=-1) | st.sampled_from([1.5, "3", None, True, [3], {}])


@st.composite
def wrong_paths(draw: st.DrawFn) -> str:
    stages: list[Any] = PATH.to_json()
    fault = draw(st.sampled_from(["fewer", "more", "empty", "choice", "end", "number", "cut", "code"]))
    position = draw(st.integers(min_value=0, max_value=6))
    if fault == "fewer":
        del stages[position]
    elif fault == "more":
        stages.insert(position, [0])
    elif fault == "empty":
        stages[position] = []
    elif fault == "choice":
        stages[position] = [draw(CHOICES)]
    elif fault == "end":
        stages[draw(st.sampled_from([0, -1]))] = draw(st.sampled_from([[1], [0, 0]]))
    elif fault == "number":
        stages[position] = draw(st.integers())
    elif fault == "cut":
        # The first bracket closes at the end only.
        return str(stages)[: draw(st.integers(min_value=1, max_value=len(str(stages)) - 1))]
    else:
        return f"[[__import__('os').mkdir('executed')], {str(stages)[1:]}"
    return str(stages)


@st.composite
def wrong_genotypes(draw: st.DrawFn) -> str:
    fields = json.loads(json.dumps(GENOTYPE.to_json()))
    cell = draw(st.sampled_from(["normal", "reduce"]))
    edge = draw(st.integers(min_value=0, max_value=7))
    fault = draw(st.sampled_from(["operation", "state", "odd", "concat", "missing", "surplus", "type", "cut", "code"]))
    if fault == "operation":
        fields[cell][edge][0] = draw(st.sampled_from(["sep_conv_9x9", "", "Conv2d", "os.system", "a b", "é"]))
    elif fault == "state":
        fields[cell][edge][1] = draw(st.integers(max_value=-1) | st.integers(min_value=2 + edge // 2))
    elif fault == "odd":
        del fields[cell][edge]
    elif fault == "concat":
        wrong = st.sampled_from([[], [2, 2], [0], [1, 2], [6], [-1], ["2"], [2.0], [True]])
        fields[f"{cell}_concat"] = draw(wrong)
    elif fault == "missing":
        del fields[draw(st.sampled_from(sorted(fields)))]
    elif fault == "surplus":
        fields["colour"] = [1]
    elif fault == "type":
        fields[cell] = draw(st.sampled_from([None, 3, "abc", [1, 2], [[1, 2], [3, 4]], [["skip_connect"]], {}]))
    text = "Genotype(" + ", ".join(f"{key}={value}" for key, value in fields.items()) + ")"
    if fault == "cut":
        return text[: draw(st.integers(min_value=len("Genotype("), max_value=len(text) - 1))]
    if fault == "code":
        call = "__import__('os').mkdir('executed')"
        return draw(st.sampled_from([f"Genotype({call})", f"Genotype(normal={call})", f"{text} or {call}"]))
    return text


class TestArchitectures:
    @fuzz(60)
    @given(wrong_paths() | wrong_genotypes() | TEXTS.map(lambda text: f"no {text}"))
    def test_with_a_fault(self, place: Path, text: str) -> None:
        arguments = ["--set", "data.name=digits", "--set", "data.resolution=32", "--set", "darts.channels=4"]
        refused(place, "retrain_child", f"--architecture={text}", "--name", "a", *arguments)


# --- Command lines. ---

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
    "compare": [
        [],
        ["stray"],
        *(["--child", value] for value in ("file", "nowhere", ".")),
        *(["--random", value] for value in ("-1", "x", "1.5")),
        *(["--seeds", *seeds] for seeds in ((), ("x",), ("1", "1"))),
        ["--networks", "resnet18", "resnet18"],
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


# --- Files: a child, weights, a checkpoint of another program, each with a damage. ---


def write_bomb(file: Path, zipped: bool) -> None:
    """A pickle that makes a folder when it is read without care."""

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.mkdir, (file.with_name("executed"),))

    torch.save({"state_dict": Bomb(), "epoch": 3}, file, _use_new_zipfile_serialization=zipped)


CHILD_VALUES = {
    "format": st.sampled_from(["nni_cream.child/9", None, 1, []]),
    "path": st.sampled_from([None, 3, [], [[]], [3], [[0], [1]], [[0], [0], [1], [99], [3], [0], [0]], {"a": 1}]),
    "num_classes": NUMBERS | st.just(0),
    "accuracy": PROBABILITIES,
    "flops": NUMBERS | FRACTIONS,
    "params": NUMBERS | FRACTIONS,
    "data": st.sampled_from([None, [], 3, {"name": "nothing"}, {"name": 3}, {"resolution": "x"}, {"folder": [1]}]),
    "search": st.sampled_from([None, [], 3]),
    "runners_up": st.sampled_from([None, {}, 3, "a"]),
    "space": st.sampled_from([None, [], 3]),
    "colour": st.integers(),
}


class TestFiles:
    @fuzz(50)
    @given(st.data())
    def test_a_child(self, place: Path, trained: Path, data: st.DataObject) -> None:
        child = place / "child.json"
        content = json.loads((trained / "child.json").read_text(encoding="utf-8"))
        fault = data.draw(st.sampled_from(["value", "value", "missing", "cut", "other"]))
        if fault == "value":
            key = data.draw(st.sampled_from(sorted(CHILD_VALUES)))
            content[key] = data.draw(CHILD_VALUES[key])
        elif fault == "missing":
            del content[data.draw(st.sampled_from(sorted(set(content) - {"runners_up", "space"})))]
        text = json.dumps(content)
        if fault == "cut":
            text = text[: data.draw(st.integers(min_value=0, max_value=len(text) - 1))]
        child.write_text(text, encoding="utf-8")
        if fault == "other":
            child.unlink()
            other = data.draw(st.sampled_from(["child.safetensors", "14.pth.tar"]))
            shutil.copy(trained / other, child)
        assert "child.json" in refused(place, "retrain_child", "--child", child)

    @fuzz(40)
    @given(st.data())
    def test_weights_of_a_training(self, place: Path, trained: Path, data: st.DataObject) -> None:
        file = place / "model.safetensors"
        shutil.copy(trained / "model.safetensors", file)
        fault = data.draw(st.sampled_from(["cut", "head", "notes", "missing", "surplus", "shape", "classes"]))
        if fault == "cut":
            size = file.stat().st_size
            file.write_bytes(file.read_bytes()[: data.draw(st.integers(min_value=0, max_value=size - 1))])
        elif fault == "head":
            file.write_bytes(data.draw(st.binary(min_size=8, max_size=8)) + file.read_bytes()[8:])
            # Of a wrong length of the head, none is that of the file.
            if file.read_bytes() == (trained / "model.safetensors").read_bytes():
                file.write_bytes(b"")
        else:
            change_weights(file, fault, data)
        assert "model.safetensors" in refused(place, "test_child", "--checkpoint", file)

    @fuzz(40)
    @given(st.data())
    def test_a_checkpoint_of_another_program(self, place: Path, trained: Path, data: st.DataObject) -> None:
        file = place / "14.pth.tar"
        weights = torch.load(trained / "14.pth.tar", weights_only=True)["state_dict"]
        first = data.draw(st.sampled_from(sorted(weights)))
        fault = data.draw(
            st.sampled_from(["cut", "bytes", "bomb", "missing", "surplus", "shape", "type", "kind", "model", "classes"])
        )
        model = "cream_14"
        if fault == "missing":
            del weights[first]
        elif fault == "surplus":
            weights["module.colour"] = torch.ones(1)
        elif fault == "shape":
            weights[first] = torch.ones(2, 3, 4, 5, 6)
        elif fault == "type":
            weights[first] = data.draw(st.sampled_from([None, 3, "x", [1]]))
        elif fault == "model":
            model = data.draw(st.sampled_from(["cream_43", "resnet18", "darts_v2_cifar10", "cream_15", "", "a/b"]))
        elif fault == "classes":
            weights["module.classifier.weight"] = weights["module.classifier.weight"][:7]
            weights["module.classifier.bias"] = weights["module.classifier.bias"][:7]
        kinds = st.sampled_from([None, 3, [1], {1: 2}, {"state_dict": None}, {"state_dict": {}}, {"state_dict": [1]}])
        torch.save(data.draw(kinds) if fault == "kind" else {"state_dict": weights, "epoch": 1}, file)
        if fault == "cut":
            size = file.stat().st_size
            file.write_bytes(file.read_bytes()[: data.draw(st.integers(min_value=0, max_value=size - 30))])
        elif fault == "bytes":
            file.write_bytes(data.draw(st.binary(max_size=100)))
        elif fault == "bomb":
            write_bomb(file, data.draw(st.booleans()))
        data_set = ["--set", "data.name=digits", "--set", "data.resolution=32"]
        refused(place, "test_child", "--checkpoint", file, "--model", model, *data_set)

    def test_weights_of_a_child_that_are_to_be_inherited(self, place: Path, trained: Path) -> None:
        for fault in ("gone", "cut", "bomb", "classes"):
            for name in ("child.json", "child.safetensors"):
                shutil.copy(trained / name, place / name)
            file = place / "child.safetensors"
            if fault == "gone":
                file.unlink()
            elif fault == "cut":
                file.write_bytes(file.read_bytes()[:-1])
            elif fault == "bomb":
                write_bomb(file, zipped=True)
            else:
                save_file({"a": torch.ones(1)}, file)
            command = ["--child", place / "child.json", "--set", "inherit_weights=true"]
            assert "child.safetensors" in refused(place, "retrain_child", *command)

    def test_a_checkpoint_of_a_run_with_code_in_it(self, place: Path) -> None:
        """An interrupted run: the folder is claimed already, so that what it holds has to stay as it is."""
        recipe = place / "recipe.yml"
        recipe.write_text(yaml.safe_dump(base("search_cream")), encoding="utf-8")
        command = ["search_cream", "--recipe", recipe, "--output", place / "run"]
        with pytest.raises(Began):
            call(*command, folder=place)  # type: ignore[arg-type]
        (place / "run/checkpoints").mkdir()
        write_bomb(place / "run/checkpoints/last.ckpt", zipped=True)
        sentence = refused(place, *command)  # type: ignore[arg-type]
        assert "last.ckpt" in sentence
        assert "remove" in sentence
        assert not (place / "run/checkpoints/executed").exists()

    @pytest.mark.parametrize(
        ("name", "arguments"),
        [("search_cream", []), ("search_darts", []), ("retrain_child", ["--architecture", str(PATH)])],
    )
    @pytest.mark.parametrize("damage", ["empty", "cut", "no object", "a field"])
    def test_the_result_of_a_run_that_has_ended(
        self, place: Path, trained: Path, name: str, arguments: list[str], damage: str
    ) -> None:
        recipe = place / "recipe.yml"
        recipe.write_text(yaml.safe_dump(base(name)), encoding="utf-8")
        file = place / "run" / ("result.json" if name == "retrain_child" else "child.json")
        file.parent.mkdir()
        if name == "retrain_child":
            result = {"network": "a", "folder": "b", "test_accuracy": 0.5, "val_accuracy": 0.5, "flops": 1, "params": 2}
        else:
            result = json.loads((trained / "child.json").read_text(encoding="utf-8"))
        if name == "search_darts":
            del result["path"]
            result |= {"genotype": GENOTYPE.to_json(), "space": {"channels": 4}, "search": {"supernet_accuracy": 0.5}}
        good = json.dumps(result)
        command = ["--recipe", recipe, "--output", place / "run", *arguments]
        file.write_text(good, encoding="utf-8")
        assert call(name, *command, folder=place).code == 0
        last = "test_accuracy" if name == "retrain_child" else "supernet_accuracy" if "darts" in name else "accuracy"
        bad = {
            "empty": "",
            "cut": good[:-9],
            "no object": "[1]",
            "a field": re.sub(f'"{last}": 0.5', f'"{last}": "x"', good),
        }
        assert bad[damage] != good
        file.write_text(bad[damage], encoding="utf-8")
        sentence = refused(place, name, *command)
        assert "remove it, and the same command" in sentence
        assert file.name in sentence or damage == "a field"


def change_weights(file: Path, fault: str, data: st.DataObject) -> None:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        notes = opened.metadata()
    some = data.draw(st.sampled_from(sorted(weights)))
    if fault == "notes":
        key = data.draw(st.sampled_from(["architecture", "num_classes", "data"]))
        notes[key] = data.draw(st.sampled_from(["", "{", "null", "3.5", "[[0]]", "Genotype()", '{"name": "nothing"}']))
    elif fault == "missing":
        del weights[some]
    elif fault == "surplus":
        weights["colour"] = torch.ones(1)
    elif fault == "shape":
        weights[some] = torch.ones(2, 3, 4, 5, 6)
    else:
        notes["num_classes"] = "7"
    save_file(weights, file, metadata=notes)


# --- Images: of every kind, and one that is damaged. ---


@pytest.mark.slow
def test_images(place: Path) -> None:
    """Unusual ones are trained with; a damaged one is named where it is met, in the first epoch."""
    wide = np.full((20, 20), 40000, dtype=np.uint16)
    kinds = [Image.new(mode, (20, 20), 3) for mode in ("1", "L", "P", "LA", "RGBA", "RGB")]
    kinds += [Image.fromarray(wide), Image.new("RGB", (1, 1)), Image.new("L", (1, 90)), Image.new("RGBA", (90, 1))]
    for name in ("a", "b"):
        (place / "images" / name).mkdir(parents=True)
        for index, image in enumerate(2 * kinds):
            image.save(place / "images" / name / f"{index}.png")
    words = ["data={name: folder, folder: images, resolution: 16, batch_size: 8, workers: 1}"]
    words += ["epochs=1", "schedule.warmup_epochs=0"]
    command = [sys.executable, str(REPOSITORY / "trials/retrain_child.py"), "--architecture", "cream_14"]
    command += [word for setting in words for word in ("--set", setting)]

    def run(name: str) -> Ended:
        full = [*command, "--name", name]
        done = subprocess.run(full, cwd=place, capture_output=True, text=True, timeout=120, check=False)
        return Ended(done.returncode, done.stdout, done.stderr)

    good = run("good")
    assert good.code == 0, good.err
    for path in (place / "images").glob("*/*5.png"):
        path.write_bytes(path.read_bytes()[:-30])
    assert re.match(r"image \S+/images/[ab]/1?5\.png cannot be read: ", run("bad").sentence())


# --- The same in processes of their own, and how much there was. ---


@pytest.mark.slow
@pytest.mark.parametrize("name", [*sorted(COMMANDS), "make_subimagenet", "experiment"])
def test_in_a_process_of_its_own(place: Path, name: str) -> None:
    start = ["-m", "nni_cream.experiment"] if name == "experiment" else [str(REPOSITORY / "trials" / f"{name}.py")]
    command = [sys.executable, *start, "a", "b", "--colour", "blue"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=120, check=False)
    assert "--colour" in Ended(done.returncode, done.stdout, done.stderr).sentence()
    assert len(done.stderr.splitlines()) == 1
    assert content(place) == {}


def test_there_were_at_least_200(request: pytest.FixtureRequest) -> None:
    module = {name for name in globals() if name.lower().startswith("test")}
    chosen = {
        item.nodeid.split("::")[1].partition("[")[0] for item in request.session.items if item.fspath == request.fspath
    }
    # Whoever chooses some of these tests has chosen.
    assert module - chosen or len(tried) >= 200
