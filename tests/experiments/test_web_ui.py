"""NNI's web UI during and after a search, in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from PIL import Image
from playwright.sync_api import Page, expect
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nni_cream.architecture import CreamPath
from tests.browser import new_page
from tests.experiments.running import Running, running, tiny_experiment

pytestmark = pytest.mark.slow

EPOCHS = 5
# The page draws its curves on a canvas; this asks the library that draws for their points.
CURVES = """() => {
    const chart = document.querySelector("[_echarts_instance_]");
    const key = Object.keys(chart).find(name => name.startsWith("__react"));
    let component = chart[key];
    while (!component.stateNode?.getEchartsInstance) component = component.return;
    return component.stateNode.getEchartsInstance().getOption().series.map(curve => [curve.name, curve.data]);
}"""
# How many pixels of the canvas are coloured: axes and grid are grey.
COLOURED = """() => {
    const canvas = document.querySelector("[_echarts_instance_] canvas");
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    let count = 0;
    for (let i = 0; i < data.length; i += 4)
        if (data[i + 3] > 200 && data[i + 2] - data[i] > 60) count++;
    return count;
}"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tiny_experiment(tmp_path_factory.mktemp("ui"), f"epochs={EPOCHS}")) as experiment:
        yield experiment


@pytest.fixture(scope="module")
def page(experiment: Running) -> Iterator[Page]:
    """The page of the trials."""
    with new_page(viewport={"width": 1840, "height": 840}) as page:
        page.goto(f"http://127.0.0.1:{experiment.port}/detail")
        yield page


def curve_on(page: Page) -> list[float]:
    """The points of the only curve that the page shows now."""
    page.get_by_text("Intermediate result", exact=True).click()
    page.wait_for_selector("[_echarts_instance_] canvas")
    ((_, points),) = page.evaluate(CURVES)
    return [float(point) for point in points]


def reload(page: Page, experiment: Running, status: str) -> None:
    page.reload()
    expect(page.get_by_text(status, exact=True)).to_be_visible(timeout=30_000)


def test_the_curve_grows_while_the_supernet_trains(page: Page, experiment: Running) -> None:
    experiment.await_epoch(2)
    reload(page, experiment, "RUNNING")
    early = curve_on(page)
    assert 2 <= len(early) <= EPOCHS

    experiment.await_end()
    reload(page, experiment, "SUCCEEDED")
    curve = curve_on(page)
    assert curve == [value["default"] for _, _, value in experiment.reports("PERIODICAL")]
    assert len(curve) == EPOCHS
    assert curve[: len(early)] == early
    page.wait_for_function(f"({COLOURED})() > 200")


def test_the_trial_shows_accuracy_cost_and_architecture(
    page: Page, experiment: Running, screenshots: Path | None, tmp_path: Path
) -> None:
    experiment.await_end()
    reload(page, experiment, "SUCCEEDED")
    page.get_by_text("Add/Remove columns").click()
    for name in ("accuracy", "flops", "params", "path"):
        page.get_by_text(f"{name} (metric)").click()
    page.get_by_role("button", name="Save").click()
    row = page.locator("[data-automationid=DetailsRowFields]").first

    def shown(column: str) -> str:
        return row.locator(f"[data-automation-key='{column}']").inner_text().strip()

    child: dict[str, Any] = json.loads((experiment.folder() / "child.json").read_text())
    expect(row).to_contain_text(str(CreamPath.of(child["path"])))
    assert CreamPath.parse(shown("metric/path")) == CreamPath.of(child["path"])
    assert float(shown("metric/accuracy")) == pytest.approx(child["accuracy"], abs=1e-6)
    assert float(shown("latestAccuracy").removesuffix("(FINAL)")) == pytest.approx(child["accuracy"], abs=1e-6)
    assert int(shown("metric/flops")) == child["flops"]
    assert int(shown("metric/params")) == child["params"]

    row.locator("[data-automation-key=_expand] i").click()
    expect(page.get_by_text("optimizer.lr:")).to_be_visible()
    row.locator("[data-automation-key=_expand] i").click()

    # The column is too narrow for a path, and shows the whole of it to who points there.
    page.get_by_text("Intermediate result", exact=True).click()
    page.wait_for_function(f"({COLOURED})() > 200")
    page.wait_for_timeout(1500)  # while the curve is drawn to its end
    row.locator("[data-automation-key='metric/path'] .ellipsis").hover()
    whole = page.locator(".ms-Tooltip-content")
    expect(whole).to_be_visible()
    expect(whole).to_be_in_viewport(ratio=1)
    expect(whole).to_have_text(str(CreamPath.of(child["path"])))
    assert whole.evaluate("element => element.scrollWidth <= element.clientWidth")
    picture = (screenshots or tmp_path) / "web_ui.png"
    page.screenshot(path=picture)
    assert Image.open(picture).size == (1840, 840)


def test_the_tensorboard_button_opens_the_curves_of_the_trial(page: Page, experiment: Running) -> None:
    experiment.await_end()
    reload(page, experiment, "SUCCEEDED")
    page.locator("[data-automation-key=_selected] label").first.click()
    page.get_by_role("button", name="TensorBoard").first.click()
    expect(page.get_by_text("You are starting a new TensorBoard with trials")).to_be_visible(timeout=30_000)
    (task,) = experiment.get("tensorboard-tasks")
    (trial,) = experiment.trials()
    run = f"{trial['sequenceId']}-{trial['trialJobId']}/."

    def tags() -> Any:
        try:
            answer = requests.get(f"http://127.0.0.1:{task['port']}/data/plugin/scalars/tags", timeout=20)
        except requests.ConnectionError:
            return None
        return answer.json().get(run)

    assert "train_loss" in experiment.await_(tags, "TensorBoard had the curves", seconds=120)
    events = EventAccumulator(str(experiment.folder() / "tensorboard")).Reload()
    assert len(events.Scalars("val_accuracy")) == EPOCHS


def test_the_search_has_reported_to_nni_what_it_found(experiment: Running) -> None:
    (trial,) = experiment.await_end()
    folder = experiment.folder()
    assert trial["status"] == "SUCCEEDED", (folder / "trial.stderr").read_text()
    curve = [value for _, _, value in experiment.reports("PERIODICAL")]
    assert [point["epoch"] for point in curve] == list(range(1, EPOCHS + 1))
    assert all(0 <= point["default"] <= 1 for point in curve)
    ((_, _, final),) = experiment.reports("FINAL")
    child = json.loads((folder / "child.json").read_text())
    assert CreamPath.parse(final["path"]).to_json() == child["path"]
    assert (final["default"], final["flops"], final["params"]) == (child["accuracy"], child["flops"], child["params"])
    assert (folder / "child.safetensors").is_file()
    # The tuner's value arrived: it is not the recipe's.
    assert yaml.safe_load((folder / "recipe.yml").read_text())["optimizer"]["lr"] == 0.05


def test_nni_gives_the_trial_no_gpu(experiment: Running) -> None:
    experiment.await_end()
    environment = json.loads((experiment.folder() / "environment.json").read_text())
    assert environment["machine"]["cuda_visible_devices"] in ("", "-1")  # trialGpuNumber: 0
