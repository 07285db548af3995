from __future__ import annotations

import errno
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from nni_cream import child as child_module
from nni_cream.architecture import CreamPath
from nni_cream.child import (
    Candidate,
    Child,
    Description,
    build_network,
    fit_weights,
    load_weights,
    read_network,
    save_network,
)
from nni_cream.errors import UserError
from nni_cream.genotype import Genotype, derive_genotype
from nni_cream.models.darts import DartsNetwork
from search_spaces.darts import DartsSpace
from tests.reference import apply_rule, standard_normal

PATH = CreamPath.parse("[0] [0] [1] [2] [3, 1] [0] [0]")


def make_child(**changes: Any) -> Child:
    values: dict[str, Any] = {
        "architecture": PATH,
        "num_classes": 7,
        "accuracy": 0.875,
        "flops": 12_345_678,
        "params": 910_111,
        "data": {"name": "folder", "folder": "Übung", "resolution": 32},
        "search": {"name": "a", "seed": 3},
        "runners_up": [{"path": [[0], [1]], "accuracy": 0.5, "flops": 1, "params": 2}],
    }
    return Child(**{**values, **changes})


EDGES = (("sep_conv_3x3", 1), ("skip_connect", 0), ("max_pool_3x3", 0), ("dil_conv_3x3", 2))
GENOTYPE = Genotype(normal=EDGES, normal_concat=(2, 3), reduce=EDGES[::-1][2:] + EDGES[2:], reduce_concat=(2, 3))
SPACE = {"channels": 4, "cells": 3, "nodes": 2, "concat": 2, "operations": [*dict(EDGES), "none"]}


def darts_child(**changes: Any) -> Child:
    return make_child(**{"architecture": GENOTYPE, "runners_up": [], "space": SPACE, **changes})


def build(child: Child) -> nn.Module:
    size = {"kind": "search", **child.space} if child.space else {}
    return build_network(str(child.architecture), child.num_classes, size)


AGAIN = "copy the child.json once more that the search has made."


def small_network(width: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    file = tmp_path / "child.json"
    make_child().save(file, small_network())
    return file


def change(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, **changes}), encoding="utf-8")


def refusal(file: Path) -> str:
    with pytest.raises(UserError) as caught:
        Child.load(file)
    return checked_sentence(str(caught.value), file)


def checked_sentence(message: str, file: Path) -> str:
    assert str(file) in message
    assert "\n" not in message
    assert message.endswith(".")
    assert not message.endswith("..")
    return message


class TestRoundTrip:
    def test_of_what_was_found(self, saved: Path) -> None:
        assert Child.load(saved) == make_child()

    @pytest.mark.parametrize("child", [make_child(), darts_child()], ids=["Cream", "DARTS"])
    def test_of_the_weights_in_the_network_that_is_built(self, tmp_path: Path, child: Child) -> None:
        torch.manual_seed(0)
        network = build(child).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.no_grad():
            for tensor in network.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(0.01 * torch.rand_like(tensor))  # Batch statistics as well.
        child.save(tmp_path / "child.json", network)

        again = build(Child.load(tmp_path / "child.json")).eval()
        images = torch.rand(2, 3, 32, 32)
        assert not torch.equal(again(images), network(images))
        load_weights(again, tmp_path / "child.json")
        for name, tensor in network.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
        torch.testing.assert_close(again(images), network(images))
        assert again(images).shape == (2, 7)

    def test_the_weights_tell_what_they_are_of(self, saved: Path) -> None:
        with safe_open(saved.with_suffix(".safetensors"), "pt") as file:
            assert file.metadata() == {
                "format": "nni_cream.network/1",
                "architecture": "[[0], [0], [1], [2], [3, 1], [0], [0]]",
                "num_classes": "7",
                "data": '{"name": "folder", "folder": "Übung", "resolution": 32}',
            }

    def test_of_a_genotype(self, tmp_path: Path) -> None:
        darts_child().save(tmp_path / "child.json", small_network())
        assert Child.load(tmp_path / "child.json") == darts_child()
        content = json.loads((tmp_path / "child.json").read_text(encoding="utf-8"))
        assert content["genotype"] == {
            "normal": [["sep_conv_3x3", 1], ["skip_connect", 0], ["max_pool_3x3", 0], ["dil_conv_3x3", 2]],
            "normal_concat": [2, 3],
            "reduce": [["skip_connect", 0], ["sep_conv_3x3", 1], ["max_pool_3x3", 0], ["dil_conv_3x3", 2]],
            "reduce_concat": [2, 3],
        }
        assert content["space"] == SPACE
        assert "path" not in content
        with safe_open(tmp_path / "child.safetensors", "pt") as file:
            notes = file.metadata()
        assert Genotype.parse(notes["architecture"]) == GENOTYPE
        assert json.loads(notes["size"]) == {"kind": "search", **SPACE}

    def test_of_a_path_says_nothing_of_a_space(self, saved: Path) -> None:
        content = json.loads(saved.read_text(encoding="utf-8"))
        assert content["path"] == [[0], [0], [1], [2], [3, 1], [0], [0]]
        assert not {"space", "genotype", "architecture"} & set(content)

    def test_leaves_nothing_but_the_two_files(self, saved: Path) -> None:
        assert {path.name for path in saved.parent.iterdir()} == {"child.json", "child.safetensors"}
        # Whoever may read the one may read the other.
        assert len({path.stat().st_mode for path in saved.parent.iterdir()}) == 1

    def test_the_same_weights_are_the_same_bytes(self, tmp_path: Path) -> None:
        network = nn.Linear(3, 2)
        files = [tmp_path / f"{i}.safetensors" for i in range(9)]
        for file in files:
            # The library shuffles notes anew every time.
            save_network(
                file, network, architecture="ü", num_classes=2, data={"name": "ä"}, size={"a": 1}, averaged=True
            )
        assert len({file.read_bytes() for file in files}) == 1
        weights, notes = read_network(files[0])
        assert torch.equal(weights["weight"], network.weight)
        assert torch.equal(weights["bias"], network.bias)
        assert (notes["architecture"], notes["data"]) == ("ü", '{"name": "ä"}')

    def test_there_is_no_child_without_its_weights(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any) -> None:
            assert (tmp_path / "child.safetensors").exists()
            raise KeyboardInterrupt

        monkeypatch.setattr(child_module, "write_json", fail)
        with pytest.raises(KeyboardInterrupt):
            make_child().save(tmp_path / "child.json", small_network())
        assert not (tmp_path / "child.json").exists()

    def test_a_full_disk_is_named_and_leaves_the_old_files(self, saved: Path) -> None:
        before = {path: path.read_bytes() for path in saved.parent.iterdir()}
        _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(OSError, match="File too large") as caught:
                make_child(num_classes=9).save(saved, nn.Linear(100, 100))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.filename == str(saved.with_suffix(".safetensors"))
        assert {path: path.read_bytes() for path in saved.parent.iterdir()} == before

    def test_other_classes_change_the_classifier_only(self) -> None:
        seven, two = (build_network(str(PATH), number, {}).state_dict() for number in (7, 2))
        different = {name for name in seven if seven[name].shape != two[name].shape}
        assert different == {"classifier.weight", "classifier.bias"}


class TestWrongChild:
    @pytest.mark.parametrize("value", ["nni_cream.child/2", None, ["nni_cream.child/1"]])
    def test_format(self, saved: Path, value: Any) -> None:
        change(saved, format=value)
        assert f"its 'format' is {value!r}, but should be 'nni_cream.child/1'" in refusal(saved)

    @pytest.mark.parametrize("value", [-1, "1", True, [1], math.nan, math.inf])
    def test_time(self, saved: Path, value: Any) -> None:
        change(saved, latency=value)
        assert f"'latency' is {value!r}, but should be a number of milliseconds" in refusal(saved)

    @pytest.mark.parametrize("key", ["num_classes", "accuracy", "flops", "params", "data", "search"])
    def test_missing_field(self, saved: Path, key: str) -> None:
        content = json.loads(saved.read_text())
        del content[key]
        saved.write_text(json.dumps(content))
        assert refusal(saved) == f"{saved} is not a child of a search: {key!r} is missing; {AGAIN}"

    def test_without_an_architecture_or_with_two(self, saved: Path) -> None:
        expected = f"{saved} is not a child of a search: it should have either 'path' or 'genotype', and has "
        change(saved, genotype=GENOTYPE.to_json())
        assert refusal(saved) == f"{expected}both; {AGAIN}"
        content = json.loads(saved.read_text())
        del content["path"], content["genotype"]
        saved.write_text(json.dumps(content))
        assert refusal(saved) == f"{expected}neither; {AGAIN}"

    def test_surplus_field(self, saved: Path) -> None:
        change(saved, colour="blue")
        assert refusal(saved) == f"{saved} is not a child of a search: 'colour' is not part of one; {AGAIN}"

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("num_classes", "7"),
            ("num_classes", True),
            ("num_classes", 0),
            ("accuracy", None),
            ("accuracy", float("nan")),
            ("accuracy", 1.5),
            ("flops", -1),
            ("flops", 1.5),
            ("params", [1]),
            ("data", ["name"]),
            ("search", 3),
            ("runners_up", {}),
            ("space", [1]),
            ("space", None),
            ("path", None),
            ("path", [[0], 1]),
        ],
    )
    def test_type(self, saved: Path, key: str, value: Any) -> None:
        change(saved, **{key: value})
        assert f"{key!r}" in refusal(saved)

    @pytest.mark.parametrize("path", [[], [[]], [[0], [-1]], [[0], ["a"]], "abc", [[0], [1.5]]])
    def test_architecture(self, saved: Path, path: Any) -> None:
        change(saved, path=path)
        assert refusal(saved).startswith(f"{saved} is not a child of a search: ")

    @pytest.mark.parametrize(
        ("genotype", "expected"),
        [
            (None, "but this is a NoneType"),
            ([["skip_connect", 0]], "but this is a list"),
            ("Genotype()", "but this is a str"),
            ({}, "missing or too many: normal, normal_concat, reduce, reduce_concat"),
            ({**GENOTYPE.to_json(), "colour": 3}, "missing or too many: colour"),
            ({**GENOTYPE.to_json(), "normal": 3}, "The field 'normal' of a genotype is a list of pairs"),
            ({**GENOTYPE.to_json(), "reduce": [["skip_connect"]]}, "The field 'reduce' of a genotype is a list of pa"),
            ({**GENOTYPE.to_json(), "reduce": [[0, "skip_connect"]] * 4}, "The field 'reduce'"),
            ({**GENOTYPE.to_json(), "normal_concat": [9]}, "concatenates the states [9]"),
            ({**GENOTYPE.to_json(), "normal_concat": "2"}, "The field 'normal_concat' of a genotype is a list of num"),
            ({**GENOTYPE.to_json(), "normal": [["skip_connect", 5]] * 4}, "normal"),
        ],
        ids=str,
    )
    def test_genotype(self, tmp_path: Path, genotype: Any, expected: str) -> None:
        file = tmp_path / "child.json"
        darts_child().save(file, small_network())
        change(file, genotype=genotype)
        message = refusal(file)
        assert message.startswith(f"{file} is not a child of a search: ")
        assert expected in message

    def test_without_runners_up_is_taken(self, saved: Path) -> None:
        content = json.loads(saved.read_text())
        del content["runners_up"]
        saved.write_text(json.dumps(content))
        assert Child.load(saved) == make_child(runners_up=[])

    @pytest.mark.parametrize("size", [0, 1, 100, -3])
    def test_truncated(self, saved: Path, size: int) -> None:
        saved.write_bytes(saved.read_bytes()[:size])
        assert "is not a child of a search" in refusal(saved)

    @pytest.mark.parametrize("content", [b"[1]", b"3", b"\xff\xfe"])
    def test_other_content(self, saved: Path, content: bytes) -> None:
        saved.write_bytes(content)
        assert "is not a child of a search" in refusal(saved)

    def test_that_is_not_there(self, tmp_path: Path) -> None:
        assert refusal(tmp_path / "child.json") == f"There is no child of a search {tmp_path / 'child.json'}."

    def test_that_is_a_folder(self, tmp_path: Path) -> None:
        assert refusal(tmp_path).endswith(" is not a child of a search, but a folder; give the child.json of a search.")
        (tmp_path / "child.json").touch()
        assert refusal(tmp_path).endswith(f" but a folder; give {tmp_path / 'child.json'}.")

    def test_of_a_name_that_no_file_has(self) -> None:
        assert "is not a child of a search" in refusal(Path("a" * 300))


def test_a_folder_whose_path_is_no_text_comes_back(tmp_path: Path) -> None:
    data = {"name": "folder", "folder": os.fsdecode(b"/bad\xff"), "resolution": 8}
    child = make_child(data=data)
    child.save(tmp_path / "child.json", small_network())
    assert Child.load(tmp_path / "child.json") == child
    weights = tmp_path / "child.safetensors"
    assert Description.of_notes(child_module.read_notes(weights), weights).data == data


class TestWrongWeights:
    def refusal(self, network: nn.Module, saved: Path) -> str:
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        with pytest.raises(UserError) as caught:
            load_weights(network, saved)
        for name, tensor in network.state_dict().items():
            assert torch.equal(before[name], tensor), name
        return checked_sentence(str(caught.value), saved.with_suffix(".safetensors"))

    @pytest.mark.parametrize("size", [0, 4, 20, -5])
    def test_truncated(self, saved: Path, size: int) -> None:
        weights = saved.with_suffix(".safetensors")
        weights.write_bytes(weights.read_bytes()[:size])
        assert "is not a safetensors file" in self.refusal(small_network(), saved)

    def test_that_may_not_be_read(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(file: Path, *_: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(file))

        monkeypatch.setattr(Path, "open", refuse)
        weights = saved.with_suffix(".safetensors")
        assert self.refusal(small_network(), saved) == f"{weights} cannot be read: Permission denied."

    def test_that_are_not_there(self, saved: Path) -> None:
        saved.with_suffix(".safetensors").unlink()
        assert self.refusal(small_network(), saved).startswith("There are no weights ")

    def test_of_other_shapes(self, saved: Path) -> None:
        assert "has shape [3], but the network needs [4]" in self.refusal(small_network(4), saved)

    def test_of_another_network(self, saved: Path) -> None:
        network = nn.Sequential(nn.Linear(2, 3))
        message = self.refusal(network, saved)
        assert "5 entries are only in one of them, such as '1.bias' of the file; give the file of this" in message


def test_weights_without_the_count_of_batches_are_taken_and_nothing_else_may_lack(saved: Path) -> None:
    network = small_network()
    weights = dict(small_network().state_dict())
    del weights["1.num_batches_tracked"]
    fit_weights(network, weights, saved, "it")
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in weights.items())
    del weights["1.running_var"]
    with pytest.raises(UserError, match=r"1 entries are only in one of them, such as '1\.running_var' of the network"):
        fit_weights(network, weights, saved, "it")


class TestBuiltNetwork:
    def test_of_a_genotype_as_searched_is_the_frozen_space(self) -> None:
        network = build_network(str(GENOTYPE), 7, {"kind": "search", **SPACE})
        space = DartsSpace(7, **SPACE)
        frozen = space.freeze(space.sample(GENOTYPE))
        shapes = {name: tensor.shape for name, tensor in frozen.state_dict().items()}
        assert {name: tensor.shape for name, tensor in network.state_dict().items()} == shapes
        network.load_state_dict(frozen.state_dict())
        images = torch.rand(2, 3, 16, 16)
        assert torch.equal(network.eval()(images), frozen.eval()(images))
        assert network(images).shape == (2, 7)

    @pytest.mark.parametrize("seed", range(3))
    def test_of_any_genotype_as_searched_is_the_frozen_space(self, seed: int) -> None:
        space = DartsSpace(3, channels=4, cells=5, nodes=3, concat=2)
        random = np.random.RandomState(seed)
        alphas: Any = {kind: random.randn(9, len(space.operations)) for kind in ("normal", "reduce")}
        genotype = derive_genotype(alphas, space.operations, concat=2)
        frozen = space.freeze(space.sample(genotype)).double()
        apply_rule(frozen, seed=str(seed))
        size = {"kind": "search", "channels": 4, "cells": 5, "nodes": 3, "concat": 2}
        network = build_network(str(genotype), 3, size).double()
        assert list(network.state_dict()) == list(frozen.state_dict())
        network.load_state_dict(frozen.state_dict())
        images = standard_normal(seed, 2, 3, 16, 16)
        assert torch.equal(network.eval()(images), frozen.eval()(images))
        assert torch.equal(network.train()(images), frozen.train()(images))

    def test_of_a_genotype_as_trained_is_of_the_given_size(self) -> None:
        size = {"kind": "trained", "channels": 6, "cells": 4, "stem": "imagenet", "auxiliary": True}
        network = build_network(str(GENOTYPE), 7, size, drop_rate=0.25, drop_path_rate=0.5)
        assert isinstance(network, DartsNetwork)
        expected = DartsNetwork(GENOTYPE, channels=6, cells=4, stem="imagenet", auxiliary=True, num_classes=7)
        shapes = {name: tensor.shape for name, tensor in expected.state_dict().items()}
        assert {name: tensor.shape for name, tensor in network.state_dict().items()} == shapes
        assert any(name.startswith("auxiliary_head.") for name in shapes)
        assert network.head_drop.p == 0.25
        assert {m.drop_prob for m in network.modules() if hasattr(m, "drop_prob")} == {0.5}

    @pytest.mark.parametrize(
        ("architecture", "size", "expected"),
        [
            (str(GENOTYPE), {"kind": "search", "colour": 1}, "is not one of a genotype"),
            (str(GENOTYPE), {"kind": "trained"}, "is not one of a genotype"),
            (str(GENOTYPE), {}, "is not one of a genotype"),
            (str(GENOTYPE), {"kind": "search", **SPACE, "cells": "four"}, "is not one of a genotype"),
            (str(GENOTYPE), {"kind": "search", **SPACE, "channels": 3}, "even number of channels, at least 2, not 3."),
            (str(GENOTYPE), {"kind": "search", **SPACE, "operations": ["none", "skip_connect"]}, "sep_conv_3x3"),
            (str(GENOTYPE)[:-1], {}, "is not a genotype"),
            ("Genotype(normal=[])", {}, "missing or too many"),
        ],
        ids=str,
    )
    def test_of_what_is_none_is_refused_in_a_sentence(
        self, architecture: str, size: dict[str, Any], expected: str
    ) -> None:
        with pytest.raises(UserError) as caught:
            build_network(architecture, 7, size)
        message = str(caught.value)
        assert expected in message
        assert "\n" not in message
        assert message.endswith(".")


@pytest.mark.parametrize("child", [make_child(), darts_child()], ids=["Cream", "DARTS"])
def test_reading_a_child_imports_nothing_heavy(tmp_path: Path, child: Child) -> None:
    saved = tmp_path / "child.json"
    child.save(saved, small_network())
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from nni_cream.child import Child\n"
        f"print(Child.load(Path({str(saved)!r})).architecture, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{child.architecture} False"


class TestRank:
    def test_chooses_among_what_was_found(self, tmp_path: Path) -> None:
        others = [{"path": [[0], [n]], "accuracy": n / 10, "flops": n, "params": 2 * n} for n in (1, 2)]
        child = make_child(runners_up=others)
        assert child.ranked(1) is child
        third = child.ranked(3)
        assert (third.architecture, third.accuracy) == (CreamPath.of([[0], [2]]), 0.2)
        assert (third.flops, third.params, third.data) == (2, 4, child.data)
        child.save(tmp_path / "child.json", small_network())
        assert Candidate(tmp_path / "child.json").load(2) == child.ranked(2)

    def test_has_its_own_predicted_time(self, tmp_path: Path) -> None:
        other = {"path": [[0], [1]], "accuracy": 0.5, "flops": 1, "params": 2}
        child = make_child(latency=1.5, runners_up=[{**other, "latency": 1.25}])
        assert [(found.latency, found.cost) for found in (child, child.ranked(2))] == [(1.5, 1.5), (1.25, 1.25)]
        child.save(tmp_path / "child.json", small_network())
        assert Child.load(tmp_path / "child.json") == child
        with pytest.raises(UserError, match=r"'flops' and 'params', and, as the best path has it, 'latency'\.$"):
            make_child(latency=1.5, runners_up=[other]).ranked(2)
        # Without a budget of time the file is as it ever was.
        make_child().save(tmp_path / "child.json", small_network())
        assert "latency" not in json.loads((tmp_path / "child.json").read_text())
        assert Child.load(tmp_path / "child.json").latency is None
        assert make_child().cost == make_child().flops

    @pytest.mark.parametrize("found", [make_child(), darts_child()], ids=["Cream", "DARTS"])
    def test_of_nothing_is_refused(self, found: Child, tmp_path: Path) -> None:
        file = tmp_path / "child.json"
        found.save(file, small_network())
        number = 1 + len(found.runners_up)
        with pytest.raises(UserError) as caught:
            Candidate(file).load(3)
        assert str(caught.value) == f"{file}: rank is 3, but the search found {number}: make it at most that."
        with pytest.raises(UserError, match="rank is 2, but only a --child of a search has networks of several ranks"):
            Candidate(None).load(2)

    @pytest.mark.parametrize(
        "runner_up", [3, {}, {"path": [[0]], "accuracy": "good", "flops": 1, "params": 1}, {"path": 4, "accuracy": 1}]
    )
    def test_of_something_damaged_is_refused(self, runner_up: Any) -> None:
        with pytest.raises(UserError, match="should have 'path', 'accuracy', 'flops' and 'params'"):
            make_child(runners_up=[runner_up]).ranked(2)
