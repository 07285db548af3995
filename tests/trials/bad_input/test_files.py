"""Files with a damage: a child, weights, a checkpoint of another program, the result of a run, images."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from nni_cream.data import load_data
from tests.trials.bad_input.refusals import FRACTIONS, GENOTYPE, NUMBERS, PATH, PROBABILITIES, base, fuzz, refused
from tests.trials.commands import Began, call
from tests.trials.processes import trial


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
        # PyTorch 0.3 wrote no counts of batches, so that a file without one is right.
        first = data.draw(st.sampled_from(sorted(name for name in weights if not name.endswith("tracked"))))
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
        sentence = refused(place, "test_child", "--checkpoint", file, "--model", model, *data_set)
        # Of a network that there is not, it says that.
        assert "14.pth.tar" in sentence or fault == "model"

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

    def test_weights_of_a_child_of_other_classes(self, place: Path, trained: Path) -> None:
        child = json.loads((trained / "child.json").read_text(encoding="utf-8"))
        (place / "child.json").write_text(json.dumps({**child, "num_classes": 7}), encoding="utf-8")
        shutil.copy(trained / "child.safetensors", place)
        command = ["--child", place / "child.json", "--set", "inherit_weights=true"]
        assert refused(place, "retrain_child", *command).endswith(
            "child.json was searched with 7 classes and the data has 10; leave it off, or give the data of the search."
        )

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
            result = {
                "network": str(PATH),
                "folder": "b",
                "test_accuracy": 0.5,
                "val_accuracy": 0.5,
                "flops": 1,
                "params": 2,
            }
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


@pytest.mark.slow
def test_images(place: Path) -> None:
    """Unusual ones are trained with; a damaged one is named before anything is trained or written, in whatever part."""
    wide = np.full((20, 20), 40000, dtype=np.uint16)
    kinds = [Image.new(mode, (20, 20), 3) for mode in ("1", "L", "P", "LA", "RGBA", "RGB")]
    kinds += [Image.fromarray(wide), Image.new("RGB", (1, 1)), Image.new("L", (1, 90)), Image.new("RGBA", (90, 1))]
    for name in ("a", "b"):
        (place / "images" / name).mkdir(parents=True)
        for index, image in enumerate(2 * kinds):
            image.save(place / "images" / name / f"{index}.png")
    settings = ["data={name: folder, folder: images, resolution: 16, batch_size: 8, workers: 1}"]
    settings += ["epochs=1", "schedule.warmup_epochs=0"]
    words = [word for setting in settings for word in ("--set", setting)]
    command = ["retrain_child", "--architecture", "cream_14", *words]
    done = trial(place, "retrain_child.py", *command[1:], "--name", "good")
    assert done.returncode == 0, done.stderr

    splits = load_data("folder", folder=place / "images", resolution=16)
    for part in (splits.weights, splits.architecture, splits.validation, splits.test):
        file = Path(part.images.store[part.indices[-1]])
        whole = file.read_bytes()
        for damaged in (whole[:-30], b"", b"text"):
            file.write_bytes(damaged)
            sentence = refused(place, *command, "--name", "bad")
            assert sentence.startswith(f"image {file} cannot be read: ")
        file.write_bytes(whole)


def test_images_that_have_become_others(place: Path) -> None:
    for name in ("a", "b"):
        (place / "images" / name).mkdir(parents=True)
        for index in range(20):
            Image.new("RGB", (20, 20)).save(place / "images" / name / f"{index}.png")
    recipe = {
        **base("search_cream"),
        "data": {"name": "folder", "folder": "images", "resolution": 16, "batch_size": 16},
    }
    (place / "recipe.yml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = ["search_cream", "--recipe", place / "recipe.yml", "--name", "some"]
    with pytest.raises(Began):
        call(*command, folder=place)  # type: ignore[arg-type]
    # What is in a file may change, not which files there are.
    Image.new("RGB", (30, 30), 9).save(place / "images/a/0.png")
    with pytest.raises(Began):
        call(*command, folder=place)  # type: ignore[arg-type]
    (place / "images/a/0.png").unlink()
    sentence = refused(place, *command)  # type: ignore[arg-type]
    assert "runs/some holds a run that began with other images, or divided otherwise (40 then, 39 now)" in sentence
    (place / "runs/some/environment.json").write_text("{", encoding="utf-8")
    sentence = refused(place, *command)  # type: ignore[arg-type]
    assert sentence.endswith("Remove it, and the same command goes on.")
