"""`lambda-hat`: every command on a small store made by the corridor's own steps, and what each refuses."""

import json
import math
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import jax
import pandas as pd
import pytest

from lambda_hat.cli import KINDS, main
from lambda_hat.llc import artifacts, summary
from lambda_hat.llc.run import RunSpec
from lambda_hat.samplers.hmc import HmcSpec
from lambda_hat.samplers.posterior import PosteriorSpec
from lambda_hat.samplers.sgld import SgldSpec
from lambda_hat.store.manifest import diagnosis_address, run_address, sweep_address, target_address
from lambda_hat.store.store import Store
from lambda_hat.targets.analytic import DeepLinearData, DeepLinearSpec, QuadraticData, QuadraticSpec

BOWL = QuadraticSpec(dim=4, data=QuadraticData(n_data=300))
LINEAR = DeepLinearSpec(widths=(3, 2, 3), data=DeepLinearData(n_data=300))
SHORT = {"num_draws": 50, "num_chains": 2}
# More digits than any rounding leaves, and specs with fields of their own, whose columns have gaps.
STEP = 1.2345678901234e-07
SPECS = [
    RunSpec(target=BOWL, sampler=SgldSpec(batch_size=64, num_burnin_steps=50, num_steps_bw_draws=1, step_size=STEP, **SHORT)),
    RunSpec(target=BOWL, sampler=HmcSpec(num_burnin_steps=50, **SHORT), posterior=PosteriorSpec(nbeta=40)),
    RunSpec(target=LINEAR, sampler=SgldSpec(batch_size=64, num_burnin_steps=50, num_steps_bw_draws=1, step_size=1e-3, **SHORT)),
]
#: Sampled, but not diagnosed.
RAW = RunSpec(target=BOWL, sampler=SPECS[0].sampler.model_copy(update={"seed": 5}))


def fill(store: Store) -> None:
    for spec in SPECS:
        artifacts.build_target(spec.target, store)
        artifacts.sample_batch([spec], store)
        artifacts.diagnose_run(spec, store)
    artifacts.sample_batch([RAW], store)
    artifacts.publish_sweep(SPECS, store)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = Store(str(tmp_path_factory.mktemp("cli") / "store"))
    with jax.numpy_dtype_promotion("standard"):
        fill(store)
    return store


@pytest.fixture(autouse=True)
def _settings(monkeypatch, tmp_path):
    """No command finds the checkout's settings or store."""
    for name in list(os.environ):
        if name.startswith("LAMBDA_HAT_"):
            monkeypatch.delenv(name)
    (tmp_path / "settings.toml").write_text(f'[store]\nuri = "{tmp_path / "default store"}"\n')
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capsys, store):
    """Runs a command on the store: its status, stdout and stderr."""

    def run(*arguments: str, store_uri: str | None = store.uri):
        where = [] if store_uri is None else ["--store", store_uri]
        try:
            status = main([*arguments, *where])
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return SimpleNamespace(status=status, out=captured.out, err=captured.err)

    return run


TARGETS = {target.target_id: target for target in (BOWL, LINEAR)}
RUNS = [*(spec.run_id for spec in SPECS), RAW.run_id]
SWEEP = artifacts.sweep_id(SPECS)


def test_ls(run, store):
    result = run("ls")
    assert (result.status, result.err) == (0, "")
    sections = {head: "\n".join(rows) for head, *rows in (text.split("\n") for text in result.out.strip().split("\n\n"))}
    counts = {"targets": 2, "runs": 4, "sweeps": 1, "trials": 0, "studies": 0, "entropy": 0, "entropy-studies": 0}
    assert list(sections) == [f"{kind} ({count}) in {store.uri}" for kind, count in counts.items()]
    # Oldest first.
    ids = [[line.split()[0] for line in text.split("\n")[1:]] for text in sections.values()]
    assert ids == [[*TARGETS], RUNS, [SWEEP], [], [], [], []]
    header, *lines = (line.split() for line in sections[f"targets (2) in {store.uri}"].split("\n"))
    first, second = (dict(zip(header, line, strict=True)) for line in lines)
    assert (first["family"], first["num_params"], first["num_data"], first["true_llc"]) == ("quadratic", "4", "300", "4/2")
    assert (second["family"], second["num_params"]) == ("dln", "12")


@pytest.mark.parametrize("kinds", [["runs"], ["sweeps", "targets"]])
def test_ls_of_some_kinds(run, kinds):
    out = run("ls", *kinds).out
    assert [line.split()[0] for line in out.splitlines() if " in " in line] == kinds
    assert (SWEEP in out) == ("sweeps" in kinds)
    assert all((identity in out) == ("runs" in kinds) for identity in RUNS)


def test_ls_json(run, store):
    listing = json.loads(run("ls", "--json").out)
    assert list(listing) == list(KINDS)
    assert [row["id"] for row in listing["runs"]] == RUNS
    for row, spec in zip(listing["runs"], [*SPECS, RAW], strict=True):
        assert (row["target_id"], row["spec.sampler.kind"]) == (spec.target_id, spec.sampler.kind)
        manifest = store.manifest(run_address(spec.target_id, spec.run_id))
        assert row["created_at"][:19] == manifest.created_at[:19]
        assert row["fge"] == manifest.summary["fge"]
    for row in listing["targets"]:
        assert row["init_loss"] == store.manifest(target_address(row["id"])).summary["init_loss"]
    assert json.loads(run("ls", "sweeps", "--json").out) == {"sweeps": listing["sweeps"]}


def test_show_json_is_the_manifests(run, store):
    spec = SPECS[1]
    content = json.loads(run("show", spec.run_id, "--json").out)
    assert list(content) == ["run", "diagnosis"]
    for part, address in (("run", run_address), ("diagnosis", diagnosis_address)):
        manifest = store.manifest(address(spec.target_id, spec.run_id))
        assert content[part]["created_at"] == manifest.created_at
        assert content[part]["spec"] == manifest.spec == spec.model_dump(mode="json")
        assert content[part]["summary"] == manifest.summary
        assert list(content[part]["files"]) == [file.name for file in manifest.files]
        for file in manifest.files:
            assert Path(content[part]["files"][file.name]).stat().st_size == file.size
    assert {"trace.png", "rank.png", "running_llc.png"} <= content["diagnosis"]["files"].keys()
    assert list(json.loads(run("show", RAW.run_id, "--json").out)) == ["run"]


def test_show_by_the_beginning_of_an_id(run, store):
    spec = SPECS[0]
    length = next(n for n in range(5, 21) if [identity.startswith(spec.run_id[:n]) for identity in RUNS].count(True) == 1)
    shown = run("show", spec.run_id[:length])
    assert shown.status == 0
    assert shown.out == run("show", spec.run_id).out
    lines = [line.split(maxsplit=1) for line in shown.out.splitlines()]
    diagnosis = store.manifest(diagnosis_address(spec.target_id, spec.run_id)).summary
    assert ["sampler.step_size", str(STEP)] in lines
    assert ["verdict", diagnosis["verdict"]] in lines
    assert ["llc", str(diagnosis["llc"])] in lines
    paths = [value for name, value in (line for line in lines if len(line) == 2) if name.endswith((".png", ".npz", ".json"))]
    plots = ["trace", "rank", "running_llc", "autocorrelation", "energy", "theta_trace"]
    assert sorted(path.rsplit("/", 1)[1] for path in paths) == sorted(
        ["trace.npz", "result.json", *(f"{p}.png" for p in plots)]
    )
    assert all(Path(path).is_file() for path in paths)


@pytest.mark.parametrize("identity", [BOWL.target_id, LINEAR.target_id[:8], SWEEP, "swp_"])
def test_show_of_targets_and_sweeps(run, store, identity):
    address = store.find(identity)
    manifest = store.manifest(address)
    assert json.loads(run("show", identity, "--json").out)[address.kind]["summary"] == manifest.summary
    out = run("show", identity).out
    assert out.startswith(f"{address.kind} {manifest.id}, made {manifest.created_at}\n")
    assert all(store.url(address, file.name) in out for file in manifest.files)
    assert address in (target_address(BOWL.target_id), target_address(LINEAR.target_id), sweep_address(SWEEP))


def expected_results(store: Store) -> pd.DataFrame:
    frame = store.catalogue("diagnosis")
    assert list(frame["id"]) == [spec.run_id for spec in SPECS]
    return frame


def test_results_table(run, store):
    header, *lines = (line.split() for line in run("results").out.splitlines())
    # The fields in which runs of a family, or of a kind, differ: not those that kinds have of their own.
    differing = ["posterior.nbeta", "step_size"]
    results = ["llc", "mcse", "true_llc", "ess_bulk", "rhat", "fge", "seconds", "prior_share", "verdict"]
    assert header == ["id", "family", "kind", *differing, *results]
    frame = expected_results(store)
    assert len(lines) == len(frame)
    for line, (_, row) in zip(lines, frame.iterrows(), strict=True):
        cells = dict(zip(header, line, strict=False))
        assert cells["id"] == row["id"]
        for name in ("llc", "mcse", "ess_bulk", "fge"):
            assert float(cells[name]) == pytest.approx(row[name], rel=1e-4)
        assert " ".join(line[len(header) - 1 :]) == row["verdict"]


def same(value, expected) -> bool:
    """Equal to the last digit, where the form may have made text of it (JSON of a list) or has no NaN."""
    if expected is None or (isinstance(expected, float) and math.isnan(expected)):
        return value in (None, "") or bool(pd.isna(value))
    if isinstance(expected, tuple):
        return (json.loads(value) if isinstance(value, str) else value) == json.loads(json.dumps(expected))
    if isinstance(value, str) and isinstance(expected, int | float):
        return value == str(expected) or float(value) == expected
    return value == expected


@pytest.mark.parametrize(
    ("form", "to_file"), [("csv", False), ("csv", True), ("json", False), ("json", True), ("parquet", True)]
)
def test_results_read_back(run, store, tmp_path, form, to_file):
    path = tmp_path / f"results.{form}"
    result = run("results", "--format", form, *(["--output", str(path)] if to_file else []))
    assert (result.status, result.err, result.out == "") == (0, "", to_file)
    if not to_file:
        path.write_text(result.out)
    if form == "json":
        rows = json.loads(path.read_text())
    else:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False) if form == "csv" else pd.read_parquet(path)
        rows = frame.to_dict("records")
    expected = expected_results(store).to_dict("records")
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        assert list(row) == list(wanted)
        assert {name: row[name] for name in row if not same(row[name], wanted[name])} == {}
    assert float(rows[0]["spec.sampler.step_size"]) == STEP


def test_results_table_to_a_file(run, tmp_path):
    run("results", "--output", str(tmp_path / "table.txt"))
    assert (tmp_path / "table.txt").read_text() == run("results").out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--where", "sampler.kind=sgld"], [0, 2]),
        (["--where", "spec.sampler.kind=hmc"], [1]),
        (["--where", "target.family=quadratic", "sampler.kind=sgld"], [0]),
        (["--where", "posterior.nbeta=40"], [1]),
        (["--where", "posterior.nbeta=none"], [0, 2]),
        (["--where", f"sampler.step_size={STEP}"], [0]),
        (["--where", "target.widths=(3, 2, 3)"], [2]),
        (["--sweep", "latest"], [0, 1, 2]),
        (["--sweep", SWEEP[:8], "--where", "sampler.kind=hmc"], [1]),
        (["--where", "sampler.seed=7"], []),
    ],
)
def test_results_of_some_runs(run, arguments, expected):
    rows = json.loads(run("results", "--format", "json", *arguments).out)
    assert [row["id"] for row in rows] == [SPECS[index].run_id for index in expected]
    out = run("results", *arguments).out
    assert out.startswith("no results fit in") if not expected else len(out.splitlines()) == 1 + len(expected)


def test_report_is_the_one_that_was_published(run, store, tmp_path):
    published = store.read(sweep_address(SWEEP), "report.html")
    result = run("report")
    assert (result.status, result.out) == (0, f"{SWEEP}.html: 3 runs of {SWEEP}\n")
    assert (tmp_path / f"{SWEEP}.html").read_bytes() == published
    assert run("report", SWEEP[:9], "--output", str(tmp_path / "page.html")).status == 0
    assert (tmp_path / "page.html").read_bytes() == published


def test_a_sweep_without_report_is_refused(run, tmp_path):
    old = Store(str(tmp_path / "old"))
    old.publish(sweep_address(SWEEP), {}, spec={"run_ids": []}, summary={"num_runs": 0})
    result = run("report", store_uri=old.uri)
    assert result.status == 2
    assert f"{SWEEP} has none. Call its sweep again" in result.err


def test_promote_is_stable(run, store, tmp_path):
    """Twice gives the same files to the byte; what else is in the folder stays."""
    folder = tmp_path / "gallery"
    folder.mkdir()
    (folder / "notes.md").write_text("mine")
    first = run("promote")
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run("promote", "--to", str(folder)).status == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == content
    pngs = {name for name in content if name.endswith(".png")}
    assert first.out == f"{len(pngs)} plots, shown in gallery/README.md\n"
    kinds = ["trace", "rank", "running_llc", "autocorrelation", "energy", "theta_trace"]
    runs = ["quadratic-sgld", "quadratic-hmc", "dln-sgld"]
    comparisons = {"quadratic-llc_convergence.png", "dln-llc_convergence.png", "llc_vs_true.png"}
    assert pngs == comparisons | {f"{of}-{plot}.png" for of in runs for plot in kinds}
    spec = SPECS[0]
    assert content["quadratic-sgld-trace.png"] == store.read(diagnosis_address(spec.target_id, spec.run_id), "trace.png")
    readme = content["README.md"].decode()
    assert set(re.findall(r"\]\((.*?)\)", readme)) == pngs
    assert f"`{spec.run_id}`" in readme
    assert store.uri not in readme


def test_promote_some(run, tmp_path):
    result = run("promote", "--to", "some", "--plot", "trace", "llc_vs_true", "--where", "sampler.kind=hmc")
    assert result.status == 0
    assert {path.name for path in (tmp_path / "some").iterdir()} == {"quadratic-hmc-trace.png", "llc_vs_true.png", "README.md"}


def test_promote_one_plot_of_each_sampler(run, store, tmp_path):
    """Of the latest run of each, whatever its target."""
    assert run("promote", "--samplers", "sgld,hmc", "--plot-name", "theta_trace.png", "--outdir", "assets").status == 0
    assert {path.name for path in (tmp_path / "assets").iterdir()} == {"sgld.png", "hmc.png", "README.md"}
    latest = {run.sampler.kind: run for run in SPECS}
    for kind, spec in latest.items():
        at = diagnosis_address(spec.target_id, spec.run_id)
        assert (tmp_path / f"assets/{kind}.png").read_bytes() == store.read(at, "theta_trace.png")
    assert "(sgld.png)" in (tmp_path / "assets/README.md").read_text()
    assert run("promote", "--samplers", "hmc", "--to", "some", "--plot", "trace").status == 0
    assert {path.name for path in (tmp_path / "some").glob("*.png")} == {"quadratic-hmc-trace.png"}


def test_promote_takes_the_latest(run, store, tmp_path):
    """A later run of the family and sampler replaces the earlier one's plots."""
    copy = Store(str(tmp_path / "copy"))
    subprocess.run(["cp", "-r", store.uri, copy.uri], check=True)
    with jax.numpy_dtype_promotion("standard"):
        artifacts.diagnose_run(RAW, copy)
    for uri, spec in ((store.uri, SPECS[0]), (copy.uri, RAW)):
        assert run("promote", "--plot", "trace", store_uri=uri).status == 0
        at = diagnosis_address(spec.target_id, spec.run_id)
        assert (tmp_path / "gallery/quadratic-sgld-trace.png").read_bytes() == Store(uri).read(at, "trace.png")


def test_show_tells_chains_and_findings(run, store):
    spec = SPECS[2]
    found = store.manifest(diagnosis_address(spec.target_id, spec.run_id)).summary
    lines = [line.strip() for line in run("show", spec.run_id).out.splitlines()]
    assert f"llc {summary.with_error(found['llc'], found['mcse'])}, exact {found['true_llc_text']}: {found['verdict']}" in lines
    for finding in found["findings"]:
        assert f"{finding['verdict']}: {finding['remedy']}" in lines
    header, *rows = (line.split() for line in lines if re.match(r"chain |\d ", line))
    for chain, cells in zip(found["chains"], rows, strict=True):
        assert float(dict(zip(header, cells, strict=True))["llc"]) == pytest.approx(chain["llc"], rel=1e-4)


def test_verify(run, store, tmp_path):
    count = len(TARGETS) + len(RUNS) + len(SPECS) + 1
    result = run("verify")
    assert (result.status, result.out) == (0, f"{count} artifacts checked, 0 damaged, in {store.uri}\n")

    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", store.uri, copy], check=True)
    spec = SPECS[1]
    damaged = Path(Store(str(copy)).url(run_address(spec.target_id, spec.run_id), "trace.npz"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    result = run("verify", store_uri=str(copy))
    assert result.status == 1
    first, last = result.out.splitlines()
    assert first.startswith(f"damaged: run {spec.run_id}: ")
    assert str(damaged) in first
    assert "compute it again" in first
    assert last == f"{count} artifacts checked, 1 damaged, in {copy}"
    damaged.unlink()
    assert run("verify", store_uri=str(copy)).status == 1


def files(root: str | Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in Path(root).rglob("*") if path.is_file()}


def test_pull_everything(run, store, tmp_path):
    count = len(TARGETS) + len(RUNS) + len(SPECS) + 1
    result = run("pull", "--to", "here")
    here = str(tmp_path / "here")
    assert (result.status, result.out) == (0, f"{count} artifacts copied, 0 were there, 0 damaged, in {here}\n")
    assert files(here) == files(store.uri)
    assert run("pull", "--to", "here").out == f"0 artifacts copied, {count} were there, 0 damaged, in {here}\n"
    assert run("results", store_uri=here).out == run("results").out
    assert run("report", "--output", "report.html", store_uri=here).status == 0


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([BOWL.target_id], ["t0", "r0", "d0", "r1", "d1", "r3"]),
        ([SPECS[2].run_id], ["t1", "r2", "d2"]),
        ([SPECS[2].run_id, RAW.run_id], ["t1", "r2", "d2", "t0", "r3"]),
        (["swp_"], ["s", "t0", "t1", "r0", "d0", "r1", "d1", "r2", "d2"]),
    ],
    ids=["target", "run", "two runs", "sweep"],
)
def test_pull_some(run, store, tmp_path, ids, expected):
    """What an id is made from and what is made from it, and nothing else."""
    places = {"s": sweep_address(SWEEP).folder}
    places |= {f"t{index}": target_address(target_id).folder for index, target_id in enumerate(TARGETS)}
    for index, spec in enumerate([*SPECS, RAW]):
        places[f"r{index}"] = run_address(spec.target_id, spec.run_id).folder
        places[f"d{index}"] = diagnosis_address(spec.target_id, spec.run_id).folder
    result = run("pull", *ids, "--to", "here", "--json")
    assert result.status == 0
    assert json.loads(result.out)["copied"] == len(expected)
    copied = files(tmp_path / "here")
    assert copied == {path: files(store.uri)[path] for path in copied}
    assert {path.removesuffix("/manifest.json") for path in copied if path.endswith("/manifest.json")} == {
        places[name] for name in expected
    }


def test_gc(run, store, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", store.uri, copy], check=True)
    left = copy / run_address(RAW.target_id, RAW.run_id).folder / "checkpoint"
    left.write_bytes(bytes(10))
    assert run("gc", store_uri=str(copy)).out == f"0 leftovers of 0 bytes removed, in {copy}\n"
    would = f"would be removed: {left}, 10 bytes\n1 leftovers of 10 bytes would be removed, in {copy}\n"
    assert run("gc", "--dry-run", "--older-than", "0", store_uri=str(copy)).out == would
    assert left.exists()
    assert run("gc", "--older-than", "0", store_uri=str(copy)).out == would.replace("would be ", "")
    assert files(copy) == files(store.uri)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "run_0000000000000000"], ["fits none", "`lambda-hat ls` lists all"]),
        (["show", "run_"], [*RUNS, "must fit one artifact", "`lambda-hat ls`"]),
        (["show", "nonsense"], ["got 'nonsense'", "`lambda-hat ls` lists the ids"]),
        (["show", "run_../../etc"], ["got 'run_../../etc'", "`lambda-hat ls` lists the ids"]),
        (["show", ""], ["got ''", "`lambda-hat ls` lists the ids"]),
        (["results", "--format", "parquet"], ["needs --output FILE", "Add --output results.parquet"]),
        (["results", "--output", "no/such/folder/x"], ["--output must name a file", "no/such/folder/x"]),
        (["results", "--format", "parquet", "--output", "no/such/x"], ["--output must name a file", "no/such/x"]),
        (["results", "--where", "sampler.kin=hmc"], ["A condition is", "got 'sampler.kin=hmc'", "'sampler.kind'"]),
        (["results", "--where", "hmc"], ["A condition is", "got 'hmc'"]),
        (["results", "--sweep", RUNS[0]], ["A sweep's id begins with swp_", "`lambda-hat ls sweeps`"]),
        (["report", "swp_0000000000000000"], ["fits none"]),
        (["report", "--output", "no/such/x.html"], ["--output must name a file", "no/such/x.html"]),
        (["promote", "--plot", "nonsense"], ["There must be a plot", "--plot-name choose"]),
        (["promote", "--plot-name", "nonsense"], ["There must be a plot", "--plot-name choose"]),
        (["promote", "--samplers", "sgld,hcm"], ["A sampler must be one of the runs'; got 'hcm'. Did you mean 'hmc'?"]),
        (["promote", "--to", "settings.toml"], ["--to must name a folder", "settings.toml"]),
        (["pull", "--to", "settings.toml"], ["A local store is a folder", "settings.toml"]),
        (["pull", "run_0000000000000000", "--to", "here"], ["fits none"]),
        (["ls", "--settings", "absent.toml"], ["absent.toml", "Give the path of a settings.toml"]),
    ],
)
def test_refused(run, arguments, words):
    result = run(*arguments)
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert all(word in result.err for word in words), result.err


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("nothing://here", ["got 'nothing://here'", "Use a local path or s3://bucket/folder"]),
        ("s3://", ["got 's3://'", "use a path like ./artifacts"]),
        ("", ["got ''", "use a path like ./artifacts"]),
        ("settings.toml", ["got 'settings.toml', which is a file", "name another path"]),
    ],
)
@pytest.mark.parametrize(
    "command",
    [["ls"], ["show", "run_"], ["results"], ["report"], ["promote"], ["pull", "--to", "x"], ["verify"], ["gc"]],
    ids=lambda command: command[0],
)
def test_bad_store_is_refused(run, command, uri, words):
    result = run(*command, store_uri=uri)
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert all(word in result.err for word in words), result.err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (
            ["ls", "diagnoses"],
            "a kind is one of targets, runs, sweeps, trials, studies, entropy, entropy-studies; got 'diagnoses'",
        ),
        (["results", "--format", "xml"], "'xml' (choose from"),
        (["destroy"], "'destroy' (choose from"),
        (["show"], "required: ID"),
        (["pull"], "required: --to"),
        (["gc", "--older-than", "soon"], "hours are a number from 0 to a million; got 'soon'"),
        (["gc", "--older-than", "nan"], "got 'nan'"),
        (["gc", "--older-than=-1"], "got '-1'"),
        (["ls", "--jason"], "unrecognized arguments: --jason"),
        ([], "required: COMMAND"),
    ],
)
def test_malformed_command(run, arguments, word):
    result = run(*arguments, store_uri=None)
    assert (result.status, result.out) == (2, "")
    assert word in result.err


def test_empty_store(run, tmp_path):
    empty = str(tmp_path / "empty")
    assert run("ls", store_uri=empty).out.split() == [word for kind in KINDS for word in (kind, "(0)", "in", empty)]
    assert set(map(len, json.loads(run("ls", "--json", store_uri=empty).out).values())) == {0}
    assert run("results", store_uri=empty).out == f"no results in {empty}; python flows/sweep.py makes some\n"
    assert json.loads(run("results", "--format", "json", store_uri=empty).out) == []
    assert run("results", "--format", "csv", store_uri=empty).out == "id,target_id,created_at\n"
    result = run("verify", store_uri=empty)
    assert (result.status, result.out) == (2, "")
    assert f"there is none in {empty}. Name the store with --store URI" in result.err
    assert run("gc", store_uri=empty).out == f"0 leftovers of 0 bytes removed, in {empty}\n"
    result = run("pull", "--to", "here", store_uri=empty)
    assert result.status == 2
    assert f"there is none in {empty}" in result.err
    assert "there is none in" in run("report", store_uri=empty).err
    assert "There must be a plot" in run("promote", store_uri=empty).err
    result = run("show", RUNS[0], store_uri=empty)
    assert result.status == 2
    assert f"must fit one artifact in {empty}" in result.err
    assert not Path(empty).exists()


def test_store_of_the_settings(run, store, tmp_path, monkeypatch):
    assert (
        run("results", store_uri=None).out == f"no results in {tmp_path / 'default store'}; python flows/sweep.py makes some\n"
    )
    other = tmp_path / "other.toml"
    other.write_text(f'[store]\nuri = "{store.uri}"\n')
    assert run("results", "--settings", str(other), store_uri=None).out == run("results").out
    monkeypatch.setenv("LAMBDA_HAT_STORE__URI", store.uri)
    assert run("results", store_uri=None).out == run("results").out


@pytest.mark.parametrize(
    "command",
    [[], *([name] for name in ("ls", "show", "results", "report", "promote", "pull", "verify", "gc"))],
    ids=lambda command: " ".join(command),
)
def test_help(run, command):
    result = run(*command, "--help", store_uri=None)
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith(f"usage: {' '.join(['lambda-hat', *command])} [-h]")
    assert ("--store URI" in result.out) == bool(command)


def test_version_and_entry_point(run):
    from lambda_hat import __version__

    assert run("--version", store_uri=None).out == f"{__version__}\n"
    (script,) = entry_points(group="console_scripts", name="lambda-hat")
    assert script.load() is main


def test_a_reader_that_stops_early_is_no_error(store):
    command = [
        sys.executable,
        "-c",
        "import sys; from lambda_hat.cli import main; sys.exit(main())",
        "ls",
        "--store",
        store.uri,
    ]
    # Python's buffer delays the failure to the end of short output.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
