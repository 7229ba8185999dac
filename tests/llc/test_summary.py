"""Results as people read them: names, numbers and tables."""

import pytest

from lambda_hat.llc import summary
from lambda_hat.llc.artifacts import sweep_id
from lambda_hat.llc.run import RunSpec, labels
from lambda_hat.samplers.hmc import HmcSpec
from lambda_hat.samplers.kinds import AnySamplerSpec
from lambda_hat.samplers.mclmc import MclmcSpec
from lambda_hat.samplers.posterior import PosteriorSpec
from lambda_hat.samplers.sgld import SgldSpec
from lambda_hat.store.manifest import run_address, sweep_address, target_address
from lambda_hat.store.store import Store
from lambda_hat.targets.analytic import DeepLinearSpec, QuadraticSpec
from lambda_hat.targets.networks import ModelSpec
from lambda_hat.targets.supervised import MlpSpec
from lambda_hat.targets.target import TargetSpec


def run(target: TargetSpec, sampler: AnySamplerSpec, **posterior) -> RunSpec:
    return RunSpec(target=target, sampler=sampler, posterior=PosteriorSpec(**posterior))


BOWL = QuadraticSpec()


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        ([run(BOWL, HmcSpec(seed=7))], [("quadratic", "hmc")]),
        # Kinds of their own need no more than the kind, whatever else differs.
        ([run(BOWL, HmcSpec(seed=7)), run(MlpSpec(), SgldSpec())], [("quadratic", "hmc"), ("mlp", "sgld")]),
        (
            [run(BOWL, SgldSpec(step_size=1e-5)), run(BOWL, SgldSpec(step_size=1e-6)), run(BOWL, HmcSpec(step_size=0.1))],
            [("quadratic", "sgld step_size=1e-05"), ("quadratic", "sgld step_size=1e-06"), ("quadratic", "hmc")],
        ),
        (
            [run(QuadraticSpec(seed=s, dim=d), HmcSpec()) for s, d in ((1, 4), (2, 4), (2, 8))],
            [("quadratic seed=1 dim=4", "hmc"), ("quadratic seed=2 dim=4", "hmc"), ("quadratic seed=2 dim=8", "hmc")],
        ),
        (
            [run(MlpSpec(model=ModelSpec(depth=depth)), HmcSpec()) for depth in (1, 2)],
            [("mlp model.depth=1", "hmc"), ("mlp model.depth=2", "hmc")],
        ),
        (
            [run(DeepLinearSpec(widths=widths), HmcSpec()) for widths in ((5, 3, 5), (10, 10))],
            [("dln widths=[5,3,5]", "hmc"), ("dln widths=[10,10]", "hmc")],
        ),
        # The posterior is part of what is sampled, and differs across targets and samplers.
        (
            [run(BOWL, HmcSpec(), nbeta=10), run(MlpSpec(), SgldSpec(), nbeta=20)],
            [("quadratic", "hmc nbeta=10.0"), ("mlp", "sgld nbeta=20.0")],
        ),
    ],
)
def test_labels_name_what_differs(specs, expected):
    assert labels(specs) == expected


def test_labels_tell_all_runs_apart():
    specs = [
        run(target, sampler, localization=localization)
        for target in (QuadraticSpec(seed=1), QuadraticSpec(seed=2), MlpSpec())
        for sampler in (SgldSpec(seed=1), SgldSpec(seed=2), SgldSpec(preconditioner="adam"), HmcSpec(), MclmcSpec())
        for localization in (1.0, 2.0)
    ]
    assert len(set(labels(specs))) == len(specs)


def diagnosis(**changes) -> dict:
    return {
        "llc": 12.3412, "mcse": 0.5634, "true_llc": 13.5, "ess_bulk": 120.6, "rhat": 1.00345, "fge": 122880.0, "seconds": 3.25,
        "verdict": "ok", "remedy": "",
    } | changes  # fmt: skip


def row(status: str = "computed", **changes) -> dict:
    return summary.row(("quadratic", "hmc"), run(BOWL, HmcSpec()), status, diagnosis(**changes))


@pytest.mark.parametrize(
    ("llc", "mcse", "text"),
    [
        (12.3412, 0.5634, "12.34 ± 0.56"),
        (12.3412, 5.634, "12.3 ± 5.6"),
        (12.3412, 56.34, "12 ± 56"),
        (12.3412, 0.05634, "12.341 ± 0.056"),
        (-0.381, 0.21, "-0.38 ± 0.21"),
        # Tiny and huge errors: no exponents, and not one digit of the value that the error does not support.
        (6.5, 1.25e-9, "6.5000000000 ± 0.0000000013"),
        (2_512_345.0, 123_456.0, "2512345 ± 123456"),
        (0.25, 1e5, "0 ± 100000"),
        # No error, or none that says anything.
        (12.3412, None, "12.34"),
        (12.3412, 0.0, "12.34"),
        (1.5e-7, None, "1.5e-07"),
        (None, None, "-"),
    ],
)
def test_value_with_error(llc, mcse, text):
    assert summary.table([row(llc=llc, mcse=mcse)])[0]["llc"] == text


def test_cells():
    (cell,) = summary.table([row()])
    assert cell == {
        "target": "quadratic", "sampler": "hmc", "llc": "12.34 ± 0.56", "exact": "13.5", "ESS": "121", "R-hat": "1.003",
        "FGE": "122,880", "seconds": "3.2", "status": "computed", "verdict": "ok",
    }  # fmt: skip
    nothing = dict.fromkeys(("llc", "mcse", "true_llc", "ess_bulk", "rhat", "seconds"))
    (cell,) = summary.table([row(**nothing)])
    assert [cell[name] for name in ("llc", "exact", "ESS", "R-hat", "seconds")] == ["-"] * 5


def test_row_of_a_failure_has_its_reason():
    spec = run(BOWL, HmcSpec())
    failed = summary.row(("quadratic", "hmc"), spec, "failed", None, "it diverged")
    assert failed == {
        "target": "quadratic", "sampler": "hmc", "status": "failed", "target_id": spec.target_id, "run_id": spec.run_id,
        "verdict": "failed", "remedy": "it diverged",
    }  # fmt: skip
    (cell,) = summary.table([failed])
    assert [cell[name] for name in ("llc", "exact", "ESS", "R-hat", "FGE", "seconds")] == ["-"] * 6
    assert row()["run_id"] == spec.run_id
    assert row()["llc"] == 12.3412


def test_text_table():
    rows = [
        row(),
        row("cached", llc=-1234.5, mcse=20.0, true_llc=None, fge=98.0, seconds=1234.0, verdict="too few", remedy="draw more"),
        row("cached", verdict="too few", remedy="draw more"),
        summary.row(("a long name", "sgld"), run(BOWL, SgldSpec()), "failed", None, "it diverged"),
        row(prior_share=0.1849, notes=("the prior holds 18% of the llc",)),
        row(prior_share=0.09),
    ]
    assert summary.text_table(rows) == (
        "target       sampler           llc  exact  ESS  R-hat      FGE  seconds  status    verdict\n"
        "──────────────────────────────────────────────────────────────────────────────────────────\n"
        "quadratic    hmc      12.34 ± 0.56   13.5  121  1.003  122,880      3.2  computed  ok\n"
        "quadratic    hmc        -1234 ± 20      -  121  1.003       98   1234.0  cached    too few\n"
        "quadratic    hmc      12.34 ± 0.56   13.5  121  1.003  122,880      3.2  cached    too few\n"
        "a long name  sgld                -      -    -      -        -        -  failed    failed\n"
        "quadratic    hmc      12.34 ± 0.56   13.5  121  1.003  122,880      3.2  computed  ok, prior 18%\n"
        "quadratic    hmc      12.34 ± 0.56   13.5  121  1.003  122,880      3.2  computed  ok\n"
        "too few (2): draw more\n"
        "failed (1): it diverged\n"
        "note (1): the prior holds 18% of the llc"
    )


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


def test_plan_table(store):
    """Of four runs one is there, one was interrupted, one was finished before its checkpoint was cleared and one is new."""
    specs = [
        run(BOWL, HmcSpec(seed=0)), run(BOWL, HmcSpec(seed=1)), run(BOWL, SgldSpec()), run(MlpSpec(), HmcSpec(seed=1)),
    ]  # fmt: skip
    there, interrupted, cleared_late, _ = (run_address(spec.target_id, spec.run_id) for spec in specs)
    store.publish(target_address(BOWL.target_id), {}, spec={}, summary={})
    for address in (there, cleared_late):
        store.publish(address, {}, spec={}, summary={})
    for address in (interrupted, cleared_late):
        store.save_checkpoint(address, b"state")
    header, _, *lines, total = summary.plan_table(specs, store).splitlines()
    assert header.split() == ["target", "sampler", "run", "FGE", "status"]
    assert [line.split("  ")[-1] for line in lines] == ["exists", "to resume", "exists", "to compute"]
    for line, spec in zip(lines, specs, strict=True):
        assert spec.run_id in line
        assert line.index(spec.run_id) == header.index("run")
        assert f"{spec.fge:,.0f}" in line
    work = f"{specs[1].fge + specs[3].fge:,.0f}"
    assert total == f"4 runs of 2 targets, 1 of them built; {work} full-data gradient equivalents (FGE) to compute"


def test_plan_table_of_an_empty_store_writes_nothing(store, tmp_path):
    lines = summary.plan_table([run(BOWL, HmcSpec())], store).splitlines()
    assert lines[2].endswith("to compute")
    assert "1 runs of 1 targets, 0 of them built" in lines[-1]
    assert list(tmp_path.iterdir()) == []


def test_plot_places(store):
    specs = [run(BOWL, HmcSpec()), run(BOWL, SgldSpec())]
    assert summary.plot_places(specs, store) == summary.plot_places([], store) == "no run finished, so there are no plots"
    files = {"a.png": b"x", "results.json": b"[]", "report.html": b"<p>"}
    store.publish(sweep_address(sweep_id(specs)), files, spec={}, summary={})
    page, heading, plot, one = summary.plot_places(specs, store).splitlines()
    assert page.startswith("report: ")
    assert page.endswith("report.html")
    assert heading == "plots:"
    with open(plot.strip(), "rb") as file:
        assert file.read() == b"x"
    assert one.endswith(f"lambda-hat show {specs[0].run_id}")
