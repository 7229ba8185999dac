"""The report of a sweep: one valid, self-contained page that says what the diagnoses say."""

from __future__ import annotations

import base64
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from test_diagnostics import CASES, METRICS, spec_of
from test_estimates import CHAINS, DRAWS, NBETA, iid, trace_of

from lambda_hat.llc.diagnostics import diagnose
from lambda_hat.llc.report import COLUMNS, WRONG, ReportRun, ReportTarget, severity, sweep_report
from lambda_hat.specs.text import with_error

PNG = b"\x89PNG\r\n\x1a\n and so on"
SWEEP = "swp_0123456789abcdef"
#: Elements that HTML never closes.
VOID = {"meta", "img", "br", "input", "link"}


class Page(HTMLParser):
    """The page's elements and text; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.settings: list[list[str]] = []  # [name, value] of the cards
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "dt":
            self.settings.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.texts.append(data.strip())
        if self.open and self.open[-1] in ("dt", "dd"):
            self.settings[-1].append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {data.strip()}".strip()

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def assert_needs_nothing_else(html: str, page: Page) -> None:
    """Of the page of a study with two plots, both `PNG`: it has no script, and refers to itself alone."""
    assert html.startswith("<!doctype html>")
    assert not page.of("script")
    for _, attributes in page.elements:
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("data:image/png;base64,", "#"))
    assert [image["src"].partition(",")[2] for image in page.of("img")] == [base64.b64encode(PNG).decode()] * 2
    assert {link["href"] for link in page.of("a")} <= {
        f"#{attributes['id']}" for _, attributes in page.elements if "id" in attributes
    }


def run_of(spec, trace, label=("bowl", "sgld"), plots=None, metrics=METRICS):
    return ReportRun(label, spec, diagnose(spec, trace, metrics), {"trace": PNG} if plots is None else plots)


def report(runs, **target_plots):
    targets = {run.spec.target_id: ReportTarget(METRICS | {"made_with": {"jax": "1"}}, target_plots) for run in runs}
    return sweep_report(SWEEP, runs, targets, {"llc_vs_true": PNG}, "2026-01-02 03:04")


@pytest.fixture(scope="module")
def runs():
    nets = {"family": "mlp", "seed": 3}
    observed = np.broadcast_to(iid()[:, :, None] / NBETA, (CHAINS, DRAWS, 5))
    lost = np.where(np.arange(CHAINS)[:, None] == 1, np.nan, iid(2))
    return [
        run_of(spec_of(), trace_of(iid()), ("bowl", "hmc"), {"trace": PNG, "theta_trace": PNG + b"2"}),
        run_of(*CASES["diverged"](), ("bowl", "sgld step_size=<1>"), {}),
        run_of(spec_of("sgld", target=nets), trace_of(lost), ("net", "sgld & co"), metrics=METRICS | {"true_llc": None}),
        run_of(
            spec_of("mala", target=nets),
            trace_of(iid(1), observed=observed, observables={"train": 3, "class_7": 2}),
            ("net", "mala"),
        ),
    ]


@pytest.fixture(scope="module")
def html(runs):
    return report(runs, llc_convergence=PNG + b"3")


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_it_needs_nothing_else(html, page):
    assert html.startswith("<!doctype html>")
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "poster", "data"):
            value = attributes.get(name) or ""
            assert value.startswith(("data:image/png;base64,", "#")) or not value, f"<{tag} {name}={value[:60]}>"
        assert not any(name.startswith("on") for name in attributes)
    assert not page.of("link")
    assert not page.of("iframe")
    style, script = html.split("</style>")[0], html.split("<script>")[1]
    assert "@import" not in style
    assert "url(" not in style
    assert not re.search(r"https?:|fetch\(|XMLHttpRequest|import\(|eval\(", style + script)


def test_images_are_the_plots(page, runs):
    images = Counter(image["src"].partition(",")[2] for image in page.of("img"))
    plots = [PNG, *[PNG + b"3"] * 2, *(png for run in runs for png in run.plots.values())]
    assert images == Counter(base64.b64encode(png).decode() for png in plots)
    assert all(image["alt"] for image in page.of("img"))


def test_table_says_what_the_diagnoses_say(page, runs):
    names = ["target", "sampler", "llc", *(name for name, *_ in COLUMNS), "verdict"]
    header = page.rows.index(names)
    for cells, run in zip(page.rows[header + 1 :], runs, strict=False):
        cell = dict(zip(names, cells, strict=True))
        found = run.diagnosis
        assert (cell["target"], cell["sampler"], cell["verdict"]) == (*run.label, found.verdict)
        assert cell["llc"] == with_error(found.llc, found.mcse)
        assert cell["exact"] == (found.true_llc_text or "–")
        assert cell["ESS"] == ("–" if found.ess_bulk is None else f"{found.ess_bulk:,.0f}")
        assert cell["error"] == ("–" if found.relative_error is None else f"{found.relative_error:+.1%}")


def test_every_link_has_its_place(page, runs):
    identities = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identities) == len(set(identities))
    links = {link["href"] for link in page.of("a")}
    assert links <= {f"#{identity}" for identity in identities}
    assert {f"#{run.spec.run_id}" for run in runs} | {f"#{run.spec.target_id}" for run in runs} <= links


def test_findings_and_chains(page, runs):
    text = " ".join(page.texts)
    for run in runs:
        for finding in run.diagnosis.findings:
            assert finding.remedy in text
    assert "left out: not finite" in text
    assert ["class_7", "2"] in [row[:2] for row in page.rows]
    # A label is text, whatever is in it.
    assert "sgld step_size=<1>" in text
    assert "sgld & co" in text
    assert f"lambda-hat show {runs[1].spec.run_id}" in text  # its plots are not in the page


def test_cards_and_configuration(page):
    fields = dict(page.settings)
    assert fields["init_loss"] == "0.5"
    assert fields["true_llc"] == METRICS["true_llc"]
    assert fields["sampler.num_chains"] == str(CHAINS)
    assert "made_with" not in " ".join(fields)


def test_severities():
    assert severity("ok") == "good"
    assert {severity(verdict) for verdict in WRONG} == {"bad"}
    assert severity("too few draws") == "doubtful"
    assert all(any(verdict.startswith(begin) for verdict in CASES) for begin in WRONG)


def test_the_same_content_gives_the_same_page(runs, html):
    assert report(runs, llc_convergence=PNG + b"3") == html


def test_one_run_alone():
    Page(report([run_of(spec_of(), trace_of(iid()), plots={})]))
