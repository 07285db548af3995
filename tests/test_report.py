from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nni_cream import report as module_under_test
from nni_cream.architecture import CreamPath
from nni_cream.child import Child
from nni_cream.genotype import PUBLISHED_GENOTYPES
from nni_cream.next_steps import after_search, after_training
from nni_cream.recipe import Recipe
from nni_cream.report import leave_report, show_report, write_report
from nni_cream.runs import RunDirectory
from tests.browser import new_page
from tests.html_reading import Reader
from tests.report_runs import ODD_FOLDER, PATH, cream_run, darts_run, training_run

RUNS: dict[str, Callable[[Path], tuple[Recipe, RunDirectory]]] = {
    "cream": cream_run,
    "darts": darts_run,
    "training": training_run,
}
PICTURES = {
    "cream": ["path", "pareto", "board", "curves"],
    "darts": ["cell_normal", "cell_reduce", "alphas_normal", "alphas_reduce", "curves"],
    "training": ["curves", "path"],
}
SECTIONS = {
    "cream": ["The network", "The board", "Curves", "What was searched", "How to go on", "Environment"],
    "darts": ["The cells", "α over time", "Curves", "What was searched", "How to go on", "Environment"],
    "training": ["Curves", "The network", "What was trained", "How to go on", "Environment"],
}
every_kind = pytest.mark.parametrize("kind", RUNS)


class Written:
    """A run with its report."""

    def __init__(self, recipe: Recipe, directory: RunDirectory) -> None:
        write_report(recipe, directory)
        self.recipe = recipe
        self.directory = directory
        self.folder = directory.path
        self.page = directory.report.read_text(encoding="utf-8")
        self.reader = Reader(self.page)

    def facts(self) -> dict[str, str]:
        names, values = self.reader.all("dt"), self.reader.all("dd")
        # A person does not see that no line may be broken there.
        return {name.text: value.text.replace("\u00a0", " ") for name, value in zip(names, values, strict=True)}

    def rows(self) -> dict[str, str]:
        """What stands in the tables without headings."""
        return {row[0]: row[1] for table in self.reader.tables() for row in table if len(row) == 2}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    return {kind: Written(*make(tmp_path_factory.mktemp(kind))) for kind, make in RUNS.items()}


class TestEveryReport:
    @every_kind
    def test_is_one_file_that_needs_no_other(self, written: dict[str, Written], kind: str) -> None:
        reader = written[kind].reader
        assert {element.name for element in reader.elements}.isdisjoint({"script", "link", "a", "iframe", "object"})
        addresses = [
            value
            for element in reader.elements
            for name, value in element.attributes.items()
            if name in ("src", "href", "srcset", "data")
        ]
        assert addresses
        assert all(address.startswith("data:image/svg+xml;base64,") for address in addresses)
        assert len(written[kind].page) < 2_000_000

    @every_kind
    def test_has_its_sections_and_a_title(self, written: dict[str, Written], kind: str) -> None:
        reader = written[kind].reader
        assert [heading.text for heading in reader.all("h2")] == SECTIONS[kind]
        title = {"cream": "Cream search “cream_mnist5k”", "darts": "DARTS search “darts_mnist5k”"}
        assert reader.all("title")[0].text == title.get(kind, "Training “retrain-cream”")

    @every_kind
    def test_shows_the_pictures_that_lie_beside_it(self, written: dict[str, Written], kind: str) -> None:
        run = written[kind]
        shown = [base64.b64decode(image.attributes["src"].partition(",")[2]) for image in run.reader.all("img")]
        assert shown == [(run.folder / f"{name}.svg").read_bytes() for name in PICTURES[kind]]
        for content in shown:
            assert ElementTree.fromstring(content).tag == "{http://www.w3.org/2000/svg}svg"
        assert all(len(image.attributes["alt"]) > 30 for image in run.reader.all("img"))
        assert len(run.reader.all("figcaption")) == len(shown)
        made = {f"{name}.{suffix}" for name in PICTURES[kind] for suffix in ("svg", "png")} | {"report.html"}
        assert {file.name for file in run.folder.iterdir() if file.suffix in (".svg", ".png", ".html")} == made

    @every_kind
    def test_names_the_environment_and_what_the_run_was_of(self, written: dict[str, Written], kind: str) -> None:
        run = written[kind]
        environment = json.loads((run.folder / "environment.json").read_text())
        rows = run.rows()
        for name, version in environment["versions"].items():
            assert rows[name] == version
        assert rows["system"] == environment["machine"]["system"]
        assert rows["folder"] == str(run.folder)
        assert rows["Seed"] == "0"
        assert rows["Data"] == ("mnist5k" if kind == "darts" else f"folder in {ODD_FOLDER}")

    @every_kind
    def test_names_the_settings_that_are_not_the_defaults(self, written: dict[str, Written], kind: str) -> None:
        (table,) = [table for table in written[kind].reader.tables() if table[0][0] == "Setting"]
        expected = {
            "cream": ["optimizer.lr", "0.03", "0.1"],
            "darts": ["darts.alpha_lr", "0.03", "0.0003"],
            "training": ["schedule.name", '"cosine"', '"linear"'],
        }
        assert expected[kind] in table
        named = [row[0] for row in table]
        assert "name" not in named
        assert "epochs" not in named
        assert "optimizer.weight_decay" not in named

    @every_kind
    def test_ends_with_commands_to_copy(self, written: dict[str, Written], kind: str) -> None:
        run = written[kind]
        recipe: Any = run.recipe
        if kind == "training":
            result = json.loads((run.folder / "result.json").read_text())
            commands = after_training(recipe, run.directory, result["network"], result["data"])
        else:
            commands = after_search(recipe, run.directory, runners_up=4 if kind == "cream" else 0)
        blocks = [block.text for block in run.reader.all("pre")]
        assert blocks[1:] == [command.text for command in commands]
        assert all(f"{command.what}:" in run.reader.text for command in commands)

    @every_kind
    def test_is_the_same_every_time(self, written: dict[str, Written], kind: str) -> None:
        run = written[kind]
        write_report(run.recipe, run.directory)
        assert run.directory.report.read_text(encoding="utf-8") == run.page

    @every_kind
    def test_is_in_tensorboard_as_pictures(self, tmp_path: Path, kind: str) -> None:
        run = Written(*RUNS[kind](tmp_path))
        events = EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0}).Reload()
        assert sorted(events.Tags()["images"]) == sorted(f"report/{name}" for name in PICTURES[kind])
        for name in PICTURES[kind]:
            (event,) = events.Images(f"report/{name}")
            with Image.open(run.folder / f"{name}.png") as picture:
                assert (event.width, event.height) == picture.size
                pixels = np.asarray(picture.convert("RGB"))
            (tmp_path / "shown.png").write_bytes(event.encoded_image_string)
            with Image.open(tmp_path / "shown.png") as shown:
                assert (np.asarray(shown) == pixels).all()
            assert event.step == {"cream": 30, "darts": 20, "training": 25}[kind]


class TestCream:
    def test_result(self, written: dict[str, Written]) -> None:
        assert written["cream"].facts() == {
            "Accuracy, shared weights": "92.00 %",
            "Multiply-accumulates": "3.235 M",
            "Parameters": "1.339 M",
        }
        lead = written["cream"].reader.all("p")[0].text.replace("\u00a0", " ")
        assert "3.235 M multiply-accumulates, between the 2.5 and 4 million that were asked for" in lead
        assert "92.00 % of 500 held-out images" in lead

    def test_architecture_in_words(self, written: dict[str, Written]) -> None:
        (table,) = [table for table in written["cream"].reader.tables() if table[0][0] == "Stage"]
        assert table[4] == [
            "3",
            "80",
            "2 × 2",
            "; ".join(f"inverted residual {k}×{k}, expansion {e}" for k, e in ((7, 4), (3, 4), (5, 6))),
        ]
        assert written["cream"].reader.all("pre")[0].text == str(PATH)

    def test_the_board(self, written: dict[str, Written]) -> None:
        run = written["cream"]
        child = Child.load(run.directory.child)
        (table,) = [table for table in run.reader.tables() if table[0][0] == "Rank"]
        assert table[0] == ["Rank", "Path", "Accuracy", "MACs (M)", "Params (M)", "Beaten"]
        assert len(table) == 6
        for rank, row in enumerate(table[1:], start=1):
            path = child.ranked(rank)
            error = 100 * (path.accuracy * (1 - path.accuracy) / 500) ** 0.5
            accuracy = f"{100 * path.accuracy:.2f} % ± {error:.2f} %"
            macs, params = f"{path.flops / 1e6:.3f}", f"{path.params / 1e6:.3f}"
            others = [child.ranked(other) for other in range(1, 6) if other != rank]
            beaten = any(o.accuracy >= path.accuracy and o.flops <= path.flops for o in others)
            expected = [str(rank), str(path.architecture), accuracy, macs, params, "yes" if beaten else "no"]
            assert [cell.replace("\u00a0", " ") for cell in row] == expected
        assert {row[5] for row in table[1:]} == {"yes", "no"}

    def test_a_single_path_has_no_runner_up_to_train(self, tmp_path: Path) -> None:
        run = Written(*cream_run(tmp_path, paths=1, epochs=3))
        assert "rank=2" not in run.reader.text
        (table,) = [table for table in run.reader.tables() if table[0][0] == "Rank"]
        assert len(table) == 2


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(*cream_run(tmp_path_factory.mktemp("timed"), timed=True))


class TestBudgetOfTime:
    def test_is_named_in_place_of_that_of_macs(self, timed: Written) -> None:
        lead = timed.reader.all("p")[0].text.replace("\u00a0", " ")
        assert "3.235 M multiply-accumulates, predicted to take between the 1 and 2.5 ms for a batch that were" in lead
        assert timed.facts()["Predicted time of a batch"] == "1.765 ms"
        rows = {name: text.replace("\u00a0", " ") for name, text in timed.rows().items()}
        assert rows["Budget"] == "1 to 2.5 ms, as predicted for a batch"
        assert rows["Time of"] == "a batch of 1 on Abacus 3000, 2 threads, 32-true, torch 2.13.0+cpu"
        # Off by -20 %, 0 and +20 %.
        assert rows["Error of predictions"] == "13.33 %, the mean of 3 networks that were measured"

    def test_is_what_paths_beat_each_other_in(self, timed: Written) -> None:
        child = Child.load(timed.directory.child)
        (table,) = [table for table in timed.reader.tables() if table[0][0] == "Rank"]
        assert table[0] == ["Rank", "Path", "Accuracy", "MACs (M)", "Params (M)", "Time (ms)", "Beaten"]
        found = [child.ranked(rank) for rank in range(1, 6)]
        for path, row in zip(found, table[1:], strict=True):
            assert row[5] == f"{path.latency:.3f}" == f"{5 - path.flops / 1e6:.3f}"
            beaten = any(o.accuracy >= path.accuracy and o.flops >= path.flops for o in found if o is not path)
            assert row[6] == ("yes" if beaten else "no")
        assert {row[6] for row in table[1:]} == {"yes", "no"}

    def test_is_what_pictures_show(self, timed: Written, written: dict[str, Written]) -> None:
        for name, label in (("pareto", "predicted time of a batch (ms; dashed"), ("board", "predicted time (ms)")):
            assert label in (timed.folder / f"{name}.svg").read_text()
            assert label not in (written["cream"].folder / f"{name}.svg").read_text()


@pytest.mark.parametrize(
    ("changes", "sentence", "text"),
    [
        (
            {"flops": {"min": 0, "max": 4}},
            "accumulates, within the 4 million that were allowed.",
            "at most 4 million mul",
        ),
        (
            {"timed": True, "latency": {"table": "latency.json", "max": 2.5}},
            "accumulates, predicted to take no more than the 2.5 ms for a batch that were allowed.",
            "at most 2.5 ms, as predicted for a batch",
        ),
    ],
    ids=["MACs", "time"],
)
def test_a_budget_that_begins_at_zero_is_a_most(
    tmp_path: Path, changes: dict[str, Any], sentence: str, text: str
) -> None:
    run = Written(*cream_run(tmp_path, **changes))
    assert sentence in run.reader.all("p")[0].text.replace("\u00a0", " ")
    assert run.rows()["Budget"].replace("\u00a0", " ").startswith(text)


class TestDarts:
    def test_result(self, written: dict[str, Written]) -> None:
        assert written["darts"].facts() == {
            "Accuracy, shared weights": "12.34 %",
            "Multiply-accumulates": "1.235 M",
            "Parameters": "0.023 M",
        }
        lead = written["darts"].reader.all("p")[0].text.replace("\u00a0", " ")
        assert "12.34 % of 500 held-out images right, and the supernet itself 93.75 %" in lead

    def test_cells_in_words(self, written: dict[str, Written]) -> None:
        run = written["darts"]
        genotype: Any = Child.load(run.directory.child).architecture
        assert run.reader.all("pre")[0].text == str(genotype)
        normal, reduce = [table for table in run.reader.tables() if table[0][0] == "Node"]
        states = ["the cell before last", "the last cell", "node 0", "node 1", "node 2"]
        for kind, table in (("normal", normal), ("reduce", reduce)):
            assert len(table) == 5
            for node, row in enumerate(table[1:]):
                edges = [f"{name} of {states[state]}" for name, state in genotype.edges_to(kind, node + 2)]
                assert row == [str(node), *edges]

    def test_an_early_end_is_said(self, tmp_path: Path, written: dict[str, Written]) -> None:
        run = Written(*darts_run(tmp_path, ended="the normal cell keeps 4 skip connections, more than 3; the result …"))
        assert "The search was ended early: the normal cell keeps 4 skip connections" in run.reader.text
        assert run.rows()["Epochs"] == "20 of 25"
        assert "ended early" not in written["darts"].reader.text
        assert written["darts"].rows()["Epochs"] == "20"

    def test_a_cell_with_too_many_edges_is_left_out(self, tmp_path: Path) -> None:
        run = Written(*darts_run(tmp_path, nodes=7, epochs=2))
        assert "A cell has too many edges for a picture; history.json holds α" in run.reader.text
        assert not (tmp_path / "alphas_normal.svg").exists()

    def test_a_limit_of_skip_connections_is_said(self, tmp_path: Path, written: dict[str, Written]) -> None:
        run = Written(*darts_run(tmp_path, epochs=2, darts={"skip_limit": 2}))
        assert "weighs most, with at most 2 skip connections in the cell." in run.reader.text
        assert "skip connections in the cell" not in written["darts"].reader.text


class TestTraining:
    def test_result(self, written: dict[str, Written]) -> None:
        assert written["training"].facts() == {
            "Test accuracy": "99.10 %",
            "Test, among the first five": "99.95 %",
            "Held-out accuracy": "98.76 %",
            "Multiply-accumulates": "3.235 M",
            "Parameters": "1.339 M",
        }
        assert written["training"].rows()["Weights before"] == "random"

    def test_of_a_genotype_shows_its_cells(self, tmp_path: Path) -> None:
        run = Written(*training_run(tmp_path, str(PUBLISHED_GENOTYPES["darts_v2"])))
        assert "The cells" in [heading.text for heading in run.reader.all("h2")]
        assert (tmp_path / "cell_reduce.png").exists()

    def test_of_a_network_of_timms_names_it(self, tmp_path: Path) -> None:
        run = Written(*training_run(tmp_path, "cream_14", inherit_weights=True))
        assert "The network of timm's that is called cream_14." in run.reader.text
        assert run.rows()["Weights before"] == "those of the search"


class TestFailure:
    """The run has ended well by then, and must not be lost for a picture."""

    @every_kind
    def test_is_one_line_and_the_same_command_tries_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
    ) -> None:
        recipe, directory = RUNS[kind](tmp_path)
        with monkeypatch.context() as patch:

            def fail(*_: Any) -> None:
                raise RuntimeError("no\nfont")

            patch.setattr(module_under_test, "draw_curves", fail)
            leave_report(recipe, directory)
        said = capsys.readouterr()
        assert said.err == (
            f"The run has ended well, but {directory.report} could not be made (RuntimeError: no font); the same "
            "command tries again.\n"
        )
        assert said.out == ""
        assert not directory.report.exists()
        show_report(recipe, directory)
        assert capsys.readouterr() == (f"report:    {directory.report}\n", "")
        Reader(directory.report.read_text(encoding="utf-8"))

    def test_a_report_that_is_there_is_not_made_again(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        recipe, directory = training_run(tmp_path)
        directory.report.write_text("as it was")
        show_report(recipe, directory)
        assert directory.report.read_text() == "as it was"
        assert capsys.readouterr().out == f"report:    {directory.report}\n"
        # The end of a run makes it anew: what there is, is of a run before.
        leave_report(recipe, directory)
        assert directory.report.read_text().startswith("<!DOCTYPE html>")

    @pytest.mark.parametrize("name", ["history.json", "metrics.csv", "environment.json", "child.json"])
    def test_a_file_that_is_missing_is_named(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
    ) -> None:
        recipe, directory = darts_run(tmp_path, epochs=2)
        (tmp_path / name).unlink()
        leave_report(recipe, directory)
        assert re.fullmatch(
            rf"The run has ended well, but .*{re.escape(name)}.*; the same .*\n", capsys.readouterr().err
        )

    def test_a_half_written_report_is_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        recipe, directory = training_run(tmp_path)

        def fail(self: Path, *_: Any, **__: Any) -> None:
            self.write_bytes(b"<!DOCTYPE html><html")
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", fail)
            leave_report(recipe, directory)
        assert not directory.report.exists()
        assert not list(tmp_path.glob(".report*"))


def test_nothing_is_lost_by_text_that_could_be_markup(tmp_path: Path) -> None:
    """Among the paths is one that is as long as paths of the deepest space are."""
    recipe, directory = cream_run(tmp_path, epochs=3)
    child = json.loads(directory.child.read_text())
    child["data"]["folder"] = "</td></tr></table><script>alert(1)</script>"
    child["runners_up"][0]["path"] = CreamPath.parse(
        "[0] [3,3,2,3,3] [3,2,3,2,3] [3,3,2,2,3,3] [1,1,1,1] [3,3] [0]"
    ).to_json()
    directory.child.write_text(json.dumps(child))
    run = Written(recipe, directory)
    assert run.rows()["Data"] == "folder in </td></tr></table><script>alert(1)</script>"
    assert not run.reader.all("script")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@every_kind
def test_in_a_browser(written: dict[str, Written], kind: str, scheme: Any) -> None:
    said: list[str] = []
    asked: list[str] = []
    address = written[kind].directory.report.as_uri()
    with new_page(viewport={"width": 1000, "height": 800}, color_scheme=scheme) as page:
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        for heading in SECTIONS[kind]:
            assert page.get_by_role("heading", name=heading, exact=True).is_visible()
        for element in page.locator("p, td, th, dd, pre, figcaption").all():
            assert element.is_visible()
        sizes = page.evaluate(
            "() => [...document.images].map(i =>"
            " [i.complete, i.naturalWidth, i.naturalHeight, i.clientWidth, i.clientHeight]"
            ".concat(parseFloat(getComputedStyle(i).paddingLeft)))"
        )
        assert len(sizes) == len(PICTURES[kind])
        for complete, natural_width, natural_height, width, height, padding in sizes:
            assert complete
            assert min(natural_width, natural_height) > 100
            # Neither stretched nor squeezed.
            shown = (width - 2 * padding) / (height - 2 * padding)
            assert shown == pytest.approx(natural_width / natural_height, rel=0.02)
        dark = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        assert dark == {"light": "rgb(255, 255, 255)", "dark": "rgb(23, 25, 28)"}[scheme]
        # On a narrow screen nothing is cut off, and only wide tables are moved to and fro.
        page.set_viewport_size({"width": 380, "height": 700})
        assert page.evaluate("() => document.scrollingElement.scrollWidth") <= 380
        printed = page.pdf()
    assert printed.startswith(b"%PDF")
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [address]
