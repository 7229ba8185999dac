"""The Prefect UI in a real browser: what a person sees of a sweep, at work and finished, and the form that starts one."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from deployed import Terminals, documented, flow_run_id, terminals, wait_for
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright
from programs import CHECKOUT

from flows.sweep import sweep
from lambda_hat.llc.plan import make_plan
from lambda_hat.specs.settings import load_settings
from lambda_hat.store.manifest import diagnosis_address
from lambda_hat.store.store import Store

CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium"),
]

#: One run lasts long enough to be looked at; one diverges, so that its numbers are NaN.
OVERRIDES = ["target=quadratic", "sampler=hmc,sgld,sghmc", "sampler.sgld.step_size=1000", "sampler.sghmc.num_draws=10000"]
NAMES = [
    "build quadratic", "sample quadratic by hmc", "sample quadratic by sgld", "diagnose quadratic by sghmc",
    "compare 3 of 3 runs",
]  # fmt: skip
PATIENCE = 60_000  # milliseconds


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(str(tmp_path_factory.mktemp("ui") / "store"))


@pytest.fixture(scope="module")
def reader(store, tmp_path_factory):
    with terminals(tmp_path_factory.mktemp("terminals"), store.uri) as reader:
        for command in documented("Server, pool, worker"):
            reader.type(command)
        yield reader


@pytest.fixture(scope="module")
def page(reader):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(PATIENCE)
        yield page
        browser.close()


@pytest.fixture(scope="module")
def run(reader) -> str:
    """The id of a sweep's flow run that has just begun to sample."""
    overrides = str(OVERRIDES).replace("'", '"')
    run = flow_run_id(reader.type(f"prefect deployment run sweep/sweep --param 'overrides={overrides}'"))
    sampling = {"task_runs": {"name": {"like_": "sample quadratic by sghmc"}, "state": {"type": {"any_": ["RUNNING"]}}}}
    wait_for(lambda: reader.api("task_runs/filter", sampling), "sampling", 300)
    return run


@pytest.fixture(scope="module")
def picture(page, store) -> Callable[[str], None]:
    """Keeps what the page shows as ui-NAME.png in the folder UI_PICTURES, where that is set; without the test's own path."""
    shorten = "path => document.querySelectorAll('code').forEach(code => code.innerText = code.innerText.replace(path, '~'))"

    def picture(name: str) -> None:
        if folder := os.environ.get("UI_PICTURES"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            page.wait_for_timeout(3000)  # until what moves has come to rest
            page.evaluate(shorten, str(Path(store.uri).parent))
            image = Image.open(BytesIO(page.screenshot())).convert("P", palette=Image.Palette.ADAPTIVE)
            image.save(Path(folder) / f"ui-{name}.png", optimize=True)

    return picture


def open_tab(page: Page, name: str) -> None:
    page.locator("[role=tablist]").get_by_text(name, exact=True).click()


def open_artifact(page: Page, reader: Terminals, key: str) -> None:
    """The latest of this key, by way of the list of artifacts."""
    page.goto(f"{reader.url}/artifacts")
    page.locator(f"a[href='/artifacts/key/{key}']").click()
    page.locator("a[href*='/artifacts/artifact/']").first.click()


def test_progress_while_it_runs(page, reader, run, picture):
    page.goto(f"{reader.url}/runs/flow-run/{run}")
    expect(page.get_by_text("█").first).to_be_visible(timeout=PATIENCE)
    picture("run")
    open_tab(page, "Task Runs")
    page.get_by_role("link", name="sample quadratic by sghmc").click()
    expect(page.locator("[role=tablist]").get_by_text("Task inputs")).to_be_visible(timeout=PATIENCE)
    open_tab(page, "Artifacts")
    expect(page.get_by_text(re.compile(r"^\s*progress\s*$", re.IGNORECASE)).first).to_be_visible(timeout=PATIENCE)


def test_names_of_tasks(page, reader, run):
    page.goto(f"{reader.url}/runs/flow-run/{run}")
    expect(page.get_by_text("Completed", exact=True).first).to_be_visible(timeout=5 * PATIENCE)
    open_tab(page, "Task Runs")
    for name in NAMES:
        expect(page.get_by_role("link", name=name).first).to_be_visible(timeout=PATIENCE)


def test_finished_progress_is_whole(reader, run):
    bars = reader.api("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}, "type": {"any_": ["progress"]}}})
    assert "sample quadratic by sghmc" in {bar["description"] for bar in bars}
    assert {bar["data"] for bar in bars} == {100.0}


def test_results_table(page, reader, run, picture):
    open_artifact(page, reader, "sweep-results")
    expect(page.get_by_text("3 of 3 runs finished").first).to_be_visible(timeout=PATIENCE)
    expect(page.locator("td").first).to_be_visible(timeout=PATIENCE)
    cells = [text.strip() for text in page.locator("th, td").all_inner_texts()]
    head, *rows = [cells[at : at + 10] for at in range(0, len(cells), 10)]
    assert head == ["target", "sampler", "llc", "exact", "ESS", "R-hat", "FGE", "seconds", "status", "verdict"]
    assert [(row[0], row[1], row[8], row[9]) for row in rows] == [
        ("quadratic", "hmc", "computed", "ok"),
        ("quadratic", "sgld", "computed", "diverged"),
        ("quadratic", "sghmc", "computed", "ok"),
    ]
    assert all("±" in row[2] for row in (rows[0], rows[2]))
    assert "nan" not in str(rows).lower()
    picture("results")


def test_plots_are_drawn(page, reader, run, picture):
    open_artifact(page, reader, "sweep-results-plots")
    expect(page.locator("img").first).to_be_visible(timeout=PATIENCE)
    widths = page.locator("img").evaluate_all("images => images.map(image => image.complete ? image.naturalWidth : 0)")
    assert widths
    assert min(widths) > 300
    page.locator("img").first.scroll_into_view_if_needed()
    picture("plots")


def test_a_run_from_the_form(page, reader, store, picture):
    [deployment] = reader.api("deployments/filter", {"deployments": {"name": {"any_": ["sweep"]}}})
    page.goto(f"{reader.url}/deployments/deployment/{deployment['id']}/run")
    for name, parameter in sweep.parameters.properties.items():
        expect(page.get_by_text(f"{name} (Optional)", exact=True)).to_be_visible(timeout=PATIENCE)
        expect(page.get_by_text(parameter["description"])).to_be_visible(timeout=PATIENCE)
    page.locator("input[type=text]").first.fill("from the form")
    for _ in page.get_by_text("list", exact=True).all():  # where a list may also be null
        page.get_by_text("list", exact=True).click()
    for override in ("target=quadratic", "sampler=mala"):
        fields = page.locator("textarea").count()
        page.get_by_role("button", name="Add item").click()
        expect(page.locator("textarea")).to_have_count(fields + 1)
        page.locator("//button[contains(., 'Add item')]/preceding::textarea[1]").fill(override)
    picture("form")
    page.get_by_role("button", name="Submit").click()
    page.get_by_role("button", name="View run").last.dispatch_event("click")  # it still moves
    page.wait_for_url("**/runs/flow-run/**")
    found = reader.api(f"flow_runs/{page.url.rsplit('/', 1)[1]}")
    assert found["name"] == "from the form"
    expect(page.get_by_text("Completed", exact=True).first).to_be_visible(timeout=5 * PATIENCE)
    assert found["parameters"]["overrides"] == ["target=quadratic", "sampler=mala"]
    [spec] = make_plan(load_settings(str(CHECKOUT / "settings.toml")), None, found["parameters"]["overrides"])
    assert store.exists(diagnosis_address(spec.target_id, spec.run_id))


def test_a_wrong_run_says_why(page, reader: Terminals):
    run = flow_run_id(reader.type("prefect deployment run sweep/sweep --param experiment=defualt --watch", status=1))
    page.goto(f"{reader.url}/runs/flow-run/{run}")
    expect(page.get_by_text("Failed", exact=True).first).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_text("Did you mean 'default'?").first).to_be_visible(timeout=PATIENCE)
