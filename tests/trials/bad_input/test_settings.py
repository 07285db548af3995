"""Recipes with values outside the range of their settings, and recipes that are none."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nni_cream.recipe import CreamRecipe, DartsRecipe, EvaluationRecipe, RetrainRecipe
from nni_cream.recipe_files import dotted_keys
from tests.trials.bad_input.refusals import (
    COMMANDS,
    FRACTIONS,
    NUMBERS,
    PATH,
    PROBABILITIES,
    TEXTS,
    base,
    fuzz,
    refused,
)

# Of every kind of setting, values that are outside its range.
COUNTS = NUMBERS | st.just(0) | FRACTIONS | st.integers(min_value=2_000_000)
WORDS = TEXTS.map(lambda text: f"no {text}") | st.integers() | st.just(["sgd"])
SWITCHES = TEXTS.map(lambda text: f"no {text}") | st.integers(min_value=2) | st.just([True])

NAMES = st.text(alphabet="/ .-\t", max_size=3)
# A training is named after the network, whatever the file says, and on the command line any name is text.
NAMED_BY_TEXT = ("retrain_child", "name")

COMMON = {
    "epochs": COUNTS,
    "seed": NUMBERS | st.integers(min_value=2**32),
    "name": NAMES | st.integers(),
    "checkpoint_minutes": NUMBERS | st.just(0),
    "skip_bad_steps": NUMBERS | FRACTIONS,
    "data.name": WORDS,
    # These images are in none.
    "data.folder": st.sampled_from(["elsewhere", "~/images", "/"]) | st.integers() | st.just(["images"]),
    "data.resolution": COUNTS | st.integers(min_value=1, max_value=7),
    "data.batch_size": COUNTS | st.just(1),
    "data.workers": NUMBERS | FRACTIONS | st.integers(min_value=10_000),
    "data.download": SWITCHES,
    "data.resident": SWITCHES,
    "data.architecture_fraction": PROBABILITIES | st.sampled_from([0, 1]),
    "data.validation_fraction": PROBABILITIES | st.sampled_from([0, 1]),
    "data.augmentation.hflip": PROBABILITIES,
    "data.augmentation.vflip": PROBABILITIES,
    "data.augmentation.re_prob": PROBABILITIES,
    "data.augmentation.color_jitter": NUMBERS | st.just([0.4, 0.4]) | st.just([0.4, 0.4, 0.4, 0.6]),
    "data.augmentation.re_mode": WORDS,
    "data.augmentation.scale": NUMBERS | st.just([0.5]) | st.just([0.5, 0.6, 0.7]) | st.just([0.9, 0.1]),
    "data.augmentation.ratio": NUMBERS | st.just([0.5]) | st.just([0.5, 0.6, 0.7]) | st.just([0.9, 0.1]),
    "data.augmentation.interpolation": WORDS,
    "data.augmentation.auto_augment": WORDS | st.just("rand-m9-zz"),
    "data.augmentation.crop_padding": COUNTS,
    "data.augmentation.cutout": COUNTS,
    "optimizer.name": WORDS,
    "optimizer.lr": NUMBERS | st.just(0),
    "optimizer.momentum": PROBABILITIES | st.just(1),
    "optimizer.weight_decay": NUMBERS,
    "optimizer.filter_bias_and_bn": SWITCHES,
    "optimizer.execution": WORDS,
    "schedule.name": WORDS,
    "schedule.interval": WORDS,
    "schedule.decay_rate": PROBABILITIES | st.just(0),
    "schedule.decay_epochs": NUMBERS | st.just(0),
    "optimizer.eps": NUMBERS | st.just(0),
    "schedule.warmup_epochs": NUMBERS | FRACTIONS | st.integers(min_value=1_000),
    "schedule.warmup_lr": NUMBERS,
    "schedule.min_lr": NUMBERS | st.floats(min_value=100, max_value=1e300),
    "device.accelerator": WORDS | st.just("tpus"),
    "device.devices": COUNTS | st.just(3),
    "device.precision": WORDS,
    "device.memory_format": WORDS,
    "device.threads": COUNTS | st.just(100_000),
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
        "space.operations": WORDS,
        "space.skip": SWITCHES,
        "space.aligned": SWITCHES,
        "cream.board_size": COUNTS,
        "cream.board_images": COUNTS | st.integers(min_value=33),
        "cream.admission_gap": NUMBERS,
        "cream.warmup_epochs": NUMBERS | FRACTIONS | st.integers(min_value=2),
        "cream.prior": WORDS | st.just([0, 0, 0, 0, 0, 0]) | st.just([-1, 2, 1, 1, 1, 1]) | st.just([1, 2]),
        "cream.teacher": WORDS,
        "cream.label_smoothing": LABEL_SMOOTHING,
        "cream.meta_interval": COUNTS,
        "cream.matching_lr": NUMBERS | st.just(0),
        "cream.recalibration_batches": COUNTS,
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
        "darts.alpha_lr": NUMBERS | st.just(0),
        "darts.alpha_weight_decay": NUMBERS,
        "darts.alpha_betas": NUMBERS | st.just([0.5]) | st.just([0.5, 1]) | st.just([-0.5, 0.9]),
        "darts.gradient_clip": NUMBERS | st.just(0),
        "darts.label_smoothing": LABEL_SMOOTHING,
        "darts.stop_above_skips": NUMBERS | FRACTIONS,
        "darts.skip_limit": NUMBERS | FRACTIONS,
        "darts.flops_target": NUMBERS | st.just(0),
        "darts.flops_weight": NUMBERS | st.just(0),
        "darts.execution": WORDS,
        "darts.cuda_graphs": SWITCHES,
        "darts.eigenvalue": WORDS | st.just(True),
    },
    "retrain_child": {
        **COMMON,
        "name": NAMES,
        "rank": COUNTS | st.integers(min_value=2, max_value=9),
        "inherit_weights": SWITCHES | st.just(True),
        "label_smoothing": LABEL_SMOOTHING,
        "drop_rate": LABEL_SMOOTHING,
        "drop_path_rate": LABEL_SMOOTHING,
        "gradient_clip": NUMBERS | st.just(0),
        "auxiliary_weight": NUMBERS,
        "device.compile": WORDS,
        "mixing.mixup": NUMBERS | st.floats(min_value=1001),
        "mixing.cutmix": NUMBERS | st.floats(min_value=1001),
        "mixing.prob": PROBABILITIES,
        "mixing.switch_prob": PROBABILITIES,
        "mixing.off_epoch": COUNTS | st.just(5),
        "ema.decay": PROBABILITIES | st.sampled_from([0, 1]),
        "ema.warmup": SWITCHES,
        "darts.stem": WORDS,
        "darts.channels": COUNTS | st.sampled_from([1, 3]),
        "darts.cells": COUNTS,
        "darts.auxiliary": SWITCHES,
    },
    "test_child": {
        key: values
        for key, values in COMMON.items()
        if re.match(r"device\.|data\.(?!augmentation|.*fraction)|data.augmentation.interpolation", key)
    },
}
KINDS = {
    "search_cream": CreamRecipe,
    "search_darts": DartsRecipe,
    "retrain_child": RetrainRecipe,
    "test_child": EvaluationRecipe,
}
# Settings of which null is a value, as are lists or other words, are written here.
NULLABLE = re.compile(
    r"augmentation|data\.(resolution|name|folder|batch_size|workers|resident)|concat|threads|clip|skips|eps|decay|off_epoch"
    r"|skip_limit|flops_target|execution|latency\.(table|max)"
)


WRONG = {
    (name, key): values if NULLABLE.search(key) or (name, key) == NAMED_BY_TEXT else values | st.none()
    for name, of_command in SETTINGS.items()
    for key, values in of_command.items()
}


def sources(name: str, folder: Path) -> list[object]:
    """Arguments that say what is trained or tested."""
    if name == "retrain_child":
        return ["--architecture", str(PATH)]
    return ["--checkpoint", folder / "model.safetensors"] if name == "test_child" else []


# What the commands have said.
tried: list[str] = []


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_the_tables_name_every_setting(name: str) -> None:
    keys = dotted_keys(KINDS[name])
    groups = {key.rpartition(".")[0] for key in keys} | {key.split(".")[0] for key in keys if "." in key}
    assert sorted(SETTINGS[name]) == sorted({*keys} - groups)


class TestRecipes:
    @fuzz(2)
    @given(st.fixed_dictionaries(WRONG))
    def test_with_a_value_out_of_range(self, place: Path, trained: Path, wrong: dict[tuple[str, str], Any]) -> None:
        """Of every setting of every command, one after the other, in the file or on the command line."""
        for number, ((name, key), value) in enumerate(wrong.items()):
            self.is_refused(place, trained, name, key, value, in_file=number % 2 == 0)

    def is_refused(self, place: Path, trained: Path, name: str, key: str, value: Any, in_file: bool) -> None:
        recipe = base(name)
        extra: list[object] = []
        if (in_file and (name, key) != NAMED_BY_TEXT) or (key == "name" and not isinstance(value, str)):
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
        tried.append(sentence)
        # What is wrong is named: the setting, or one of it, or the group that it would be in.
        assert key.rpartition(".")[2].removesuffix("s") in sentence or key.split(".")[0] in sentence

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
            tried.append(sentence)
            assert "recipe.yml" in sentence
            assert len(sentence) < 1000
            assert not marker.exists()


def test_there_were_at_least_200(request: pytest.FixtureRequest) -> None:
    module = {name for name in globals() if name.lower().startswith("test")}
    chosen = {
        item.nodeid.split("::")[1].partition("[")[0] for item in request.session.items if item.fspath == request.fspath
    }
    # Whoever chooses some of these tests has chosen.
    assert module - chosen or len(tried) >= 200
