from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from nni_cream import child as child_module
from nni_cream.architecture import CreamPath
from nni_cream.child import Child, load_weights
from nni_cream.errors import UserError

PATH = CreamPath.parse("[0] [0] [1] [2] [3, 1] [0] [0]")


def make_child(**changes: Any) -> Child:
    values: dict[str, Any] = {
        "path": PATH,
        "num_classes": 7,
        "accuracy": 0.875,
        "flops": 12_345_678,
        "params": 910_111,
        "data": {"name": "folder", "folder": "Übung", "resolution": 32},
        "search": {"name": "a", "seed": 3},
        "runners_up": [{"path": [[0], [1]], "accuracy": 0.5, "flops": 1, "params": 2}],
    }
    return Child(**{**values, **changes})


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

    def test_of_the_weights_in_the_network_that_is_built(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        child = make_child()
        network = child.build().eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.no_grad():
            for tensor in network.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(0.01 * torch.rand_like(tensor))  # Batch statistics as well.
        child.save(tmp_path / "child.json", network)

        again = Child.load(tmp_path / "child.json").build().eval()
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

    def test_leaves_nothing_but_the_two_files(self, saved: Path) -> None:
        assert {path.name for path in saved.parent.iterdir()} == {"child.json", "child.safetensors"}

    def test_there_is_no_child_without_its_weights(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any) -> None:
            assert (tmp_path / "child.safetensors").exists()
            raise KeyboardInterrupt

        monkeypatch.setattr(child_module, "write_json", fail)
        with pytest.raises(KeyboardInterrupt):
            make_child().save(tmp_path / "child.json", small_network())
        assert not (tmp_path / "child.json").exists()

    def test_other_classes_change_the_classifier_only(self) -> None:
        seven, two = make_child().build().state_dict(), make_child().build(num_classes=2).state_dict()
        different = {name for name in seven if seven[name].shape != two[name].shape}
        assert different == {"classifier.weight", "classifier.bias"}


class TestWrongChild:
    @pytest.mark.parametrize("value", ["nni_cream.child/2", None, ["nni_cream.child/1"]])
    def test_format(self, saved: Path, value: Any) -> None:
        change(saved, format=value)
        assert "its 'format' should be 'nni_cream.child/1'" in refusal(saved)

    @pytest.mark.parametrize("key", ["path", "num_classes", "accuracy", "flops", "params", "data", "search"])
    def test_missing_field(self, saved: Path, key: str) -> None:
        content = json.loads(saved.read_text())
        del content[key]
        saved.write_text(json.dumps(content))
        assert refusal(saved) == f"{saved} is not a complete child of a search: {key!r} is missing."

    def test_surplus_field(self, saved: Path) -> None:
        change(saved, colour="blue")
        assert refusal(saved) == f"{saved} is not a child of a search: 'colour' is not part of one."

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("num_classes", "7"),
            ("accuracy", None),
            ("flops", 1.5),
            ("params", [1]),
            ("data", ["name"]),
            ("search", 3),
            ("runners_up", {}),
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
        assert "is not a child of a search" in refusal(tmp_path)


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

    def test_that_are_not_there(self, saved: Path) -> None:
        saved.with_suffix(".safetensors").unlink()
        assert self.refusal(small_network(), saved).startswith("There are no weights ")

    def test_of_other_shapes(self, saved: Path) -> None:
        assert "has shape [3], but the network needs [4]" in self.refusal(small_network(4), saved)

    def test_of_another_network(self, saved: Path) -> None:
        network = nn.Sequential(nn.Linear(2, 3))
        message = self.refusal(network, saved)
        assert "5 entries are only in one of them, such as '1.bias' of the file." in message


def test_reading_a_child_imports_nothing_heavy(saved: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from nni_cream.child import Child\n"
        f"print(Child.load(Path({str(saved)!r})).path, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{PATH} False"
