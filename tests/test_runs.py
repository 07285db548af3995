from __future__ import annotations

import json
import os
import stat
import tempfile
from importlib import metadata
from pathlib import Path

import pytest

from nni_cream import runs
from nni_cream.errors import UserError
from nni_cream.runs import RunDirectory, describe, newest_search, read_json, write_atomically, write_json, write_text


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


class TestWriting:
    @pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
    def test_that_fails_midway_leaves_the_old_content_and_nothing_else(
        self, tmp_path: Path, error: type[BaseException]
    ) -> None:
        file = tmp_path / "a.txt"
        file.write_text("old")

        def write(temporary: Path) -> None:
            temporary.write_text("ne")
            raise error

        with pytest.raises(error):
            write_atomically(file, write)
        assert contents(tmp_path) == {"a.txt": "old"}

    def test_shows_the_old_content_until_the_new_is_complete(self, tmp_path: Path) -> None:
        file = tmp_path / "a.txt"
        file.write_text("old")

        def write(temporary: Path) -> None:
            temporary.write_text("new")
            assert file.read_text() == "old"
            assert temporary.parent == tmp_path  # A rename is atomic only within a file system.

        write_atomically(file, write)
        assert contents(tmp_path) == {"a.txt": "new"}

    def test_reaches_the_disk_before_it_is_named_and_so_does_the_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps: list[object] = []
        flush, replace = os.fsync, Path.replace

        def flushed(descriptor: int) -> None:
            steps.append(Path(f"/proc/self/fd/{descriptor}").resolve())
            flush(descriptor)

        def replaced(self: Path, target: Path) -> Path:
            steps.append("named")
            return replace(self, target)

        monkeypatch.setattr(os, "fsync", flushed)
        monkeypatch.setattr(Path, "replace", replaced)
        written: list[Path] = []
        write_atomically(tmp_path / "a.txt", lambda temporary: (written.append(temporary), temporary.touch()))
        assert steps == [*written, "named", tmp_path]

    def test_makes_the_folder(self, tmp_path: Path) -> None:
        write_text(tmp_path / "a" / "b" / "c.txt", "ü")
        assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == "ü".encode()

    def test_gives_the_file_the_usual_rights(self, tmp_path: Path) -> None:
        before = os.umask(0o027)
        try:
            write_text(tmp_path / "a.txt", "text")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640

    def test_json_comes_back(self, tmp_path: Path) -> None:
        value = {"a": [1, 2.5, None], "ü": "–"}
        write_json(tmp_path / "a.json", value)
        assert read_json(tmp_path / "a.json", "thing") == value

    def test_paths_that_are_no_text(self, tmp_path: Path) -> None:
        value = {"folder": os.fsdecode(b"/bad\xff"), "ü": "–"}
        write_json(tmp_path / "a.json", value)
        assert read_json(tmp_path / "a.json", "thing") == value
        write_text(tmp_path / "a.html", f"<p>ü in {value['folder']}</p>")
        assert (tmp_path / "a.html").read_text(encoding="utf-8") == "<p>ü in /bad\\udcff</p>"
        # All else is as it reads best.
        write_json(tmp_path / "a.json", {"ü": "–"})
        assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "ü": "–"\n}\n'

    @pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"a": 1'])
    def test_what_is_no_json_is_named(self, tmp_path: Path, content: bytes) -> None:
        file = tmp_path / "a.json"
        file.write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_json(file, "thing")
        assert str(caught.value).startswith(f"{file} is not a thing: ")

    def test_json_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(UserError) as caught:
            read_json(tmp_path / "a.json", "thing")
        assert str(caught.value) == f"There is no thing {tmp_path / 'a.json'}."


class TestRunDirectory:
    def test_is_below_runs_without_nni(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("NNI_OUTPUT_DIR", raising=False)
        assert RunDirectory.for_run("some").path == Path("runs/some")

    def test_is_nnis_under_nni(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("NNI_OUTPUT_DIR", str(tmp_path))
        assert RunDirectory.for_run("some").path == tmp_path

    def test_is_what_the_command_line_says(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("NNI_OUTPUT_DIR", str(tmp_path))
        assert RunDirectory.for_run("some", Path("elsewhere")).path == Path("elsewhere")

    def test_begins_with_recipe_and_environment(self, tmp_path: Path) -> None:
        RunDirectory(tmp_path / "run").begin("name: ü\n", seed=7)
        assert (tmp_path / "run" / "recipe.yml").read_text(encoding="utf-8") == "name: ü\n"
        environment = json.loads((tmp_path / "run" / "environment.json").read_text())
        assert environment["seed"] == 7
        assert environment["versions"]["torch"] == metadata.version("torch")
        assert environment["versions"]["nni"] == "3.0"

    @pytest.mark.parametrize("devices", ["3,1", "", None])
    def test_notes_the_gpus_that_nni_has_chosen(self, monkeypatch: pytest.MonkeyPatch, devices: str | None) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if devices is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
        assert runs.describe_environment()["machine"]["cuda_visible_devices"] == devices

    def test_names_packages_that_are_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runs, "PACKAGES", ("no-such-package",))
        assert runs.describe_environment()["versions"]["no-such-package"] == "not installed"

    def test_begins_again_with_the_same_recipe(self, tmp_path: Path) -> None:
        directory = RunDirectory(tmp_path)
        directory.begin("name: ü\n", seed=7)
        before = contents(tmp_path)
        directory.begin("name: ü\n", seed=7)
        assert contents(tmp_path) == before

    def test_removes_what_a_killed_process_has_left_of_a_checkpoint(self, tmp_path: Path) -> None:
        directory = RunDirectory(tmp_path)

        def be_killed(temporary: Path) -> None:
            temporary.write_text("part")
            os._exit(9)

        if not (child := os.fork()):
            write_atomically(directory.checkpoint, be_killed)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        (directory.checkpoint.parent / ".nfs000001").touch()
        assert len(list(directory.checkpoint.parent.iterdir())) == 2
        directory.begin("name: a\n", seed=7)
        assert [file.name for file in directory.checkpoint.parent.iterdir()] == [".nfs000001"]

    def test_refuses_another_recipe(self, tmp_path: Path) -> None:
        directory = RunDirectory(tmp_path)
        directory.begin("name: a\n", seed=7)
        before = contents(tmp_path)
        with pytest.raises(UserError, match="holds a run of another recipe") as caught:
            directory.begin("name: b\n", seed=8)
        assert str(tmp_path) in str(caught.value)
        assert contents(tmp_path) == before

    def test_refuses_another_training(self, tmp_path: Path) -> None:
        directory = RunDirectory(tmp_path)
        directory.keep_to("resnet18")
        assert contents(tmp_path) == {}
        directory.begin("name: a\n", seed=7)
        assert json.loads((tmp_path / "environment.json").read_text())["training"] == "resnet18"
        RunDirectory(tmp_path).keep_to("resnet18")
        before = contents(tmp_path)
        with pytest.raises(UserError) as caught:
            RunDirectory(tmp_path).keep_to("resnet34")
        sentence = f"{tmp_path} holds a training of resnet18, not of resnet34; choose another folder with --name."
        assert str(caught.value) == sentence
        assert contents(tmp_path) == before

    def test_refuses_another_training_that_has_begun_meanwhile(self, tmp_path: Path) -> None:
        late = RunDirectory(tmp_path)
        late.keep_to("resnet34")
        early = RunDirectory(tmp_path)
        early.keep_to("resnet18")
        early.begin("name: a\n", seed=7)
        with pytest.raises(UserError, match="holds a training of resnet18, not of resnet34"):
            late.begin("name: a\n", seed=7)

    def test_takes_a_run_without_a_note_for_any_training(self, tmp_path: Path) -> None:
        RunDirectory(tmp_path).begin("name: a\n", seed=7)
        assert "training" not in json.loads((tmp_path / "environment.json").read_text())
        directory = RunDirectory(tmp_path)
        directory.keep_to("resnet34")
        directory.begin("name: a\n", seed=7)

    def test_refuses_a_recipe_that_is_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "recipe.yml").write_bytes(b"\xff")
        with pytest.raises(UserError, match="holds a run of another recipe"):
            RunDirectory(tmp_path).begin("name: a\n", seed=7)

    def test_that_was_interrupted_at_its_beginning_begins_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                RunDirectory(tmp_path).begin("name: a\n", seed=7)
        RunDirectory(tmp_path).begin("name: b\n", seed=7)
        assert set(contents(tmp_path)) == {".lock", "recipe.yml", "environment.json"}

    def test_always_has_an_environment_beside_a_recipe(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        order: list[str] = []
        replace = Path.replace

        def noted(temporary: Path, target: Path) -> Path:
            order.append(target.name)
            return replace(temporary, target)

        monkeypatch.setattr(Path, "replace", noted)
        RunDirectory(tmp_path).begin("name: a\n", seed=7)
        assert order == ["environment.json", "recipe.yml"]

    @pytest.mark.parametrize("inside", [".", "deeper/still"])
    def test_that_cannot_be_made(self, tmp_path: Path, inside: str) -> None:
        (tmp_path / "file").write_text("in the way")
        path = tmp_path / "file" / inside
        with pytest.raises(UserError) as caught:
            RunDirectory(path).begin("name: a\n", seed=7)
        message = str(caught.value)
        assert message == f"{tmp_path / 'file'} is not a folder, so that {path} cannot be a run directory."
        assert contents(tmp_path) == {"file": "in the way"}

    def test_that_is_read_only(self) -> None:
        # Root may write anywhere, so root becomes nobody for a moment; a folder of pytest's would be closed to nobody.
        nobody = 65534
        with tempfile.TemporaryDirectory() as folder:
            Path(folder).chmod(0o555)
            if root := os.geteuid() == 0:
                os.seteuid(nobody)
            try:
                with pytest.raises(UserError, match="cannot be written: Permission denied"):
                    RunDirectory(Path(folder) / "run").begin("name: a\n", seed=7)
            finally:
                if root:
                    os.seteuid(0)


class TestNewestSearch:
    def make(self, file: Path, time: float) -> Path:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
        os.utime(file, (time, time))
        return file

    def test_is_the_one_written_last_at_any_depth(self, tmp_path: Path) -> None:
        self.make(tmp_path / "b" / "child.json", 1000)
        nested = self.make(tmp_path / "nni" / "x1" / "trials" / "T2" / "child.json", 3000)
        self.make(tmp_path / "nni" / "x1" / "trials" / "T3" / "child.json", 2000)
        self.make(tmp_path / "z" / "result.json", 5000)
        self.make(tmp_path / "z" / ".child.json.0123", 6000)  # One that is being written.
        assert newest_search(tmp_path) == nested
        later = self.make(tmp_path / "a" / "child.json", 4000)
        assert newest_search(tmp_path) == later

    def test_is_none_where_there_is_none(self, tmp_path: Path) -> None:
        assert newest_search(tmp_path) is None
        assert newest_search(tmp_path / "missing") is None


def test_metrics_on_one_line() -> None:
    assert describe({"epoch": 3, "val_accuracy": 0.94123, "path": [[0]]}) == "epoch 3, val_accuracy 0.9412, path [[0]]"
