"""SGLD against devinterp 1.3.2 and against this machine's matrix products: `python benchmarks/speed.py`.

Both sides sample the same ReLU network 32-64-64-64-1 (n = 20,000, batch 256, 4 chains, the same step size, nbeta, localization
and number of steps, a loss recorded every 10 steps), alternately in one run; then ours alone a network of a million
parameters, with batches of 256 and of 1024. Next to each measurement the peak is measured: the best rate of a large float32
matrix product, by JAX or NumPy.

chain-steps/s: SGLD steps of all chains per second of wall time, the best of the rounds. Ours of a whole call whose program was
compiled before; devinterp's of a call after a short first one, less, with several processes, the time of a run of a single
draw, in which each of them starts and imports torch.
share of peak: the floating-point operations of a step's matrix products - forward, weight gradients, input gradients but
the first layer's - times chain-steps/s, divided by the peak.

devinterp runs in a virtual environment of its own, made on the first call (--peer-env); its variants are DataLoader, as its
documentation has it, in one process or in as many as there are cores, and "tensors", a loader written here to spare it the
work that DataLoader has with each sample. The bound is against its defaults: DataLoader in one process.

On a GPU the same script measures ours alone (--no-peer is implied): `pip install -e .[cuda]`, then the same command. There 64
settings of the small network in one batched program must take at most twice the time of one.

Exit status 1 if a bound is missed: 15 times devinterp, half of the peak (small), 70 % of it (large, batches of 1024: a step of
256 samples reads and writes the million parameters too often for the products it does).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lambda_hat.compute.runtime import configure
from lambda_hat.llc.estimates import load_arviz
from lambda_hat.llc.sampling import Run, sample_runs
from lambda_hat.samplers.posterior import PosteriorSpec
from lambda_hat.samplers.sgld import SgldSpec
from lambda_hat.specs.settings import Runtime
from lambda_hat.targets.networks import ModelSpec, mlp
from lambda_hat.targets.target import Dataset, Objective

PEER = ["torch==2.13.0", "devinterp==1.3.2"]
SMALL, LARGE = (32, 64, 64, 64, 1), (32, 700, 700, 700, 1)
NUM_DATA, BATCH, CHAINS, THINNING = 20_000, 256, 4, 10
#: What ours is measured on: (widths, batch).
OURS = {"small": (SMALL, BATCH), "large, batch 256": (LARGE, BATCH), "large": (LARGE, 1024)}
#: A pull strong enough for the chains to forget where they began within the few thousand steps devinterp is given.
NBETA, LOCALIZATION = NUM_DATA / np.log(NUM_DATA), 1000.0
STEP_SIZE = {SMALL: 5e-7, LARGE: 5e-8}
#: (loader, processes) of devinterp.
PEERS = [("DataLoader", 1), ("DataLoader", os.cpu_count() or 1), ("tensors", os.cpu_count() or 1)]
#: A product on one core, whatever its size.
SINGLE = {"xla_cpu_multi_thread_eigen": False}
BOUNDS = {"ratio": 15.0, "small": 0.5, "large": 0.7, "batched": 2.0}

Arrays = dict[str, np.ndarray]


def network(widths: tuple[int, ...], seed: int = 0) -> Arrays:
    """He-normal weights w0, b0, w1, ..., inputs x and the network's own outputs y: a teacher at a zero of its loss."""
    rng = np.random.default_rng(seed)
    arrays: Arrays = {}
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        arrays[f"w{i}"] = (rng.standard_normal((a, b)) * np.sqrt(2 / a)).astype(np.float32)
        arrays[f"b{i}"] = np.zeros(b, np.float32)
    x = rng.standard_normal((NUM_DATA, widths[0])).astype(np.float32)
    h = x
    for i in range(len(widths) - 1):
        h = h @ arrays[f"w{i}"] + arrays[f"b{i}"]
        h = np.maximum(h, 0) if i < len(widths) - 2 else h
    return arrays | {"x": x, "y": h[:, 0]}


@functools.cache
def objective(widths: tuple[int, ...]) -> Objective:
    """Squared error of the library's own MLP."""
    apply = mlp(ModelSpec(widths=widths[1:-1]), 1).apply

    def per_sample_loss(params: Any, dataset: Dataset) -> jax.Array:
        return jnp.square(apply(params, dataset.samples["x"])[:, 0] - dataset.samples["y"])

    return Objective(per_sample_loss)


def step_flops(widths: tuple[int, ...], batch_size: int) -> float:
    """Of one step of one chain; a multiplication and an addition are two."""
    products = [(2 if i == 0 else 3) * a * b for i, (a, b) in enumerate(itertools.pairwise(widths))]
    return 2.0 * batch_size * sum(products)


def peak_flops() -> float:
    """Of the best of a few large float32 matrix products by JAX and, on CPUs, NumPy."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    matrix = jnp.full((size, size), 0.5, jnp.float32)
    product = jax.jit(jnp.matmul)
    times = [_seconds(lambda: jax.block_until_ready(product(matrix, matrix))) for _ in range(8)][1:]
    if jax.default_backend() == "cpu":
        host = np.asarray(matrix)
        times += [_seconds(lambda: host @ host) for _ in range(3)]
    return 2.0 * size**3 / min(times)


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def sample_ours(arrays: Arrays, name: str, num_draws: int, settings: int = 1) -> tuple[float, np.ndarray]:
    """Seconds and the trace of L(w) - L(w*), (chain, draw), of the first of `settings` runs in one batched program."""
    widths, batch_size = OURS[name]
    layers = [*(f"hidden_{i}" for i in range(len(widths) - 2)), "output"]
    params = {layer: {"w": arrays[f"w{i}"], "b": arrays[f"b{i}"]} for i, layer in enumerate(layers)}
    dataset = Dataset({"x": arrays["x"], "y": arrays["y"]}, {})
    runs = [
        Run(
            PosteriorSpec(nbeta=NBETA, localization=LOCALIZATION),
            SgldSpec(
                num_chains=CHAINS, num_draws=num_draws, num_burnin_steps=0, num_steps_bw_draws=THINNING, seed=seed,
                step_size=STEP_SIZE[widths] * (1 - 0.5 * seed / settings), batch_size=batch_size, gradient="plain",
            ),
        )
        for seed in range(settings)
    ]  # fmt: skip
    traces: list[Any] = []
    seconds = _seconds(lambda: traces.extend(sample_runs(objective(widths), params, dataset, runs)))
    return seconds, traces[0].draws["loss_difference"]


class Peer:
    """devinterp in a process of its own environment."""

    def __init__(self, python: Path) -> None:
        self.processes = {
            cores: subprocess.Popen(
                [str(python), str(Path(__file__).with_name("speed_peer.py"))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                # One thread a process: with more, torch's threads wait for each other longer than these products take.
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for cores in sorted({cores for _, cores in PEERS})
        }  # fmt: skip

    def sample(self, file: str, loader: str, cores: int, num_draws: int) -> tuple[float, np.ndarray]:
        """Chain-steps per second and the trace of the minibatches' losses, (chain, draw)."""
        request = {
            "file": file, "loader": loader, "cores": cores, "num_chains": CHAINS, "num_draws": num_draws,
            "num_steps_bw_draws": THINNING, "step_size": STEP_SIZE[SMALL], "nbeta": NBETA, "localization": LOCALIZATION,
            "batch_size": BATCH,
        }  # fmt: skip
        process = self.processes[cores]
        process.stdin.write(json.dumps(request) + "\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        answer = json.loads(process.stdout.readline())  # type: ignore[union-attr]
        start, whole = answer["seconds"]
        rate = num_draws / whole if cores == 1 else (num_draws - 1) / (whole - start)
        return CHAINS * THINNING * rate, np.load(answer["losses"])

    def close(self) -> None:
        for process in self.processes.values():
            process.stdin.close()  # type: ignore[union-attr]
            process.wait()


@contextlib.contextmanager
def peer(folder: Path) -> Iterator[Peer]:
    """devinterp's processes; its environment is made in `folder` unless it is there."""
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        print(f"installing {' and '.join(PEER)} in {folder}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for package in PEER:  # torch first, so that devinterp takes the one that is there
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", package], check=True)
        (folder / "installed").touch()
    processes = Peer(python)
    try:
        yield processes
    finally:
        processes.close()


def effective(llc: np.ndarray) -> dict[str, float]:
    """Mean, effective sample size and Monte Carlo standard error of llc values, (chain, draw), by ArviZ."""
    az = load_arviz()
    return {
        "llc": float(np.mean(llc)), "ess": float(az.ess(llc, method="mean")), "mcse": float(az.mcse(llc, method="mean")),
    }  # fmt: skip


def products_share(name: str, peak: float) -> float:
    """Share of the peak that a hidden layer's three products reach by themselves, two chains to a core, on all cores."""
    cores, ((_, width, *_), batch_size) = os.cpu_count() or 1, OURS[name]
    h, w = jnp.full((2, batch_size, width), 0.5, jnp.float32), jnp.full((2, width, width), 0.5, jnp.float32)
    products = [("cbi,cij->cbj", h, w), ("cbj,cij->cbi", h, w), ("cbi,cbj->cij", h, h)]
    repeats = max(4, int(2e9 / (batch_size * width**2)))

    def repeated(subscripts: str, a: jax.Array, b: jax.Array) -> Callable[[], Any]:
        def step(_: int, a: jax.Array) -> jax.Array:  # each depends on the one before, so that none is left out
            return a.at[0, 0, 0].add(1e-9 * jnp.einsum(subscripts, a, b)[0, 0, 0])

        program = jax.jit(lambda a: jax.lax.fori_loop(0, repeats, step, a), compiler_options=SINGLE)
        jax.block_until_ready(program(a))
        return lambda: [*threads.map(lambda _: jax.block_until_ready(program(a)), range(cores))]

    with ThreadPoolExecutor(cores) as threads:
        seconds = sum(min(_seconds(call) for _ in range(5)) for call in [repeated(*product) for product in products])
    return cores * 3 * 2 * 2 * batch_size * width**2 * repeats / seconds / peak


def report(figures: dict[str, Any]) -> list[str]:
    """Prints the tables; returns the bounds that are missed."""
    gpu, peak, missed = figures["platform"] != "cpu", figures["peak_gflops"], []

    def check(name: str, value: float, least: bool = True) -> str:
        bound = BOUNDS[name]
        if (value < bound) if least else (value > bound):
            missed.append(f"{name}: {value:.3g}, bound {bound:g}")
        return f"{value:.3g}"

    print(f"\n{figures['device']}, {figures['cores']} cores; peak {peak:.0f} GFLOP/s (float32 product by JAX or NumPy)\n")
    print("| network | batch | sampler | chain-steps/s | GFLOP/s | share of peak |\n|" + "---|" * 6)
    for name, (widths, batch_size) in OURS.items():
        rate = figures[name]["chain_steps_per_second"]
        gflops = rate * step_flops(widths, batch_size) / 1e9
        share = gflops / peak
        figures[name] |= {"share_of_peak": share}
        if name in BOUNDS and (not gpu or name == "large"):
            check(name, share)
        print(f"| {'-'.join(map(str, widths))} | {batch_size} | lambda_hat | {rate:.0f} | {gflops:.0f} | {share:.1%} |")
    for key, found in figures["peers"].items():
        print(f"| {'-'.join(map(str, SMALL))} | {BATCH} | devinterp, {key} | {found['chain_steps_per_second']:.0f} | | |")
    rate = figures["small"]["chain_steps_per_second"]
    if figures["peers"]:
        times = {key: rate / found["chain_steps_per_second"] for key, found in figures["peers"].items()}
        check("ratio", next(iter(times.values())))
        print("\nTimes devinterp: " + "; ".join(f"{key}: {value:.3g}" for key, value in times.items()))
        print(
            "\nESS of the llc, the second half of equally many draws at equal settings:\n\n"
            "| sampler | llc | MCSE | ESS | ESS/s | 1/(MCSE² s) |\n|" + "---|" * 6
        )
        for key, found in {"lambda_hat": figures["small"], **figures["peers"]}.items():
            of = found["effective"]
            seconds = figures["ess_chain_steps"] / found["chain_steps_per_second"]
            found |= {"ess_per_second": of["ess"] / seconds, "precision_per_second": 1 / (of["mcse"] ** 2 * seconds)}
            row = [key, f"{of['llc']:.1f}", f"{of['mcse']:.2g}", f"{of['ess']:.0f}", f"{found['ess_per_second']:.3g}"]
            print("| " + " | ".join([*row, f"{found['precision_per_second']:.3g}"]) + " |")
    ratio = figures["batched"]["time_ratio"]
    if gpu:
        check("batched", ratio, least=False)
    settings = figures["batched"]["settings"]
    print(f"\n{settings} settings of the small network in one program take {ratio:.1f} times the time of one")
    if "products" in figures:
        shares = ", ".join(f"{share:.0%} ({name})" for name, share in figures["products"].items())
        print(
            f"\nWhat bounds: a hidden layer's three products alone, two chains to a core, reach {shares} of the peak; the rest "
            "of a step is random numbers, gathering the batch, activations and the update, bound by memory if large. "
            "devinterp is bound by Python: one chain and one operation at a time, a tensor per sample in DataLoader."
        )
    return missed


def measure(options: argparse.Namespace, sampled: Peer | None, folder: Path) -> dict[str, Any]:
    gpu = jax.default_backend() != "cpu"
    arrays = {name: network(widths) for name, (widths, _) in OURS.items()}
    file = str(folder / "small.npz")
    np.savez(file, **arrays["small"])
    scale = 10 if options.quick else 1
    draws = {"small": 4000 // scale, "large, batch 256": 40 // scale, "large": 20 // scale, "peer": 400 // scale}
    rates: dict[str, list[float]] = {}
    traces: dict[str, np.ndarray] = {}
    peaks = [peak_flops()]

    def ours(name: str) -> None:
        seconds, traces[name] = sample_ours(arrays[name], name, draws[name])
        rates.setdefault(name, []).append(CHAINS * THINNING * draws[name] / seconds)
        peaks.append(peak_flops())

    for name in OURS:  # compiles
        sample_ours(arrays[name], name, 4)
        print(f"{name}: compiled", file=sys.stderr, flush=True)
    for turn in range(options.rounds):
        ours("small")
        if sampled is not None:
            for loader, cores in PEERS:
                key = f"{loader}, {cores} process{'es' if cores > 1 else ''}"
                rate, traces[key] = sampled.sample(file, loader, cores, draws["peer"])
                rates.setdefault(key, []).append(rate)
        ours("small")
        ours("large, batch 256")
        ours("large")
        best = ", ".join(f"{key} {values[-1]:.0f}" for key, values in rates.items())
        print(f"round {turn + 1}: chain-steps/s {best}; peak {max(peaks) / 1e9:.0f} GFLOP/s", file=sys.stderr, flush=True)

    settings, few = 64, draws["small"] // 4 if gpu else 20
    times = {}
    for number in (1, settings):
        sample_ours(arrays["small"], "small", 4, number)
        times[number] = min(sample_ours(arrays["small"], "small", few, number)[0] for _ in range(2))

    half = draws["peer"] // 2

    def found(key: str) -> dict[str, Any]:
        return {
            "chain_steps_per_second": max(rates[key]), "rounds": rates[key],
            "effective": effective(NBETA * traces[key][:, half : draws["peer"]].astype(np.float64)),
        }  # fmt: skip

    peak = max(peaks)
    figures: dict[str, Any] = {
        "platform": jax.default_backend(), "device": jax.devices()[0].device_kind, "cores": os.cpu_count(),
        "versions": {"jax": jax.__version__, "numpy": np.__version__, "python": platform.python_version()},
        "peak_gflops": peak / 1e9, "small": found("small"),
        **{name: {"chain_steps_per_second": max(rates[name]), "rounds": rates[name]} for name in OURS if name != "small"},
        "peers": {key: found(key) for key in rates if key not in OURS},
        "ess_chain_steps": CHAINS * THINNING * half,
        "batched": {"settings": settings, "seconds": times, "time_ratio": times[settings] / times[1]},
    }  # fmt: skip
    if not gpu:
        figures["products"] = {name: products_share(name, peak) for name in OURS}
    return figures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the work: for trying, not for figures")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each, alternating; the best count (default 3)")
    parser.add_argument("--no-peer", action="store_true", help="measure ours alone")
    parser.add_argument(
        "--peer-env", type=Path, default=Path(tempfile.gettempdir()) / "lambda_hat-devinterp-1.3.2",
        help="folder of devinterp's virtual environment, made if it is not there (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args(arguments)
    configure(Runtime())
    alone = options.no_peer or jax.default_backend() != "cpu"
    with tempfile.TemporaryDirectory() as folder, contextlib.nullcontext() if alone else peer(options.peer_env) as sampled:
        figures = measure(options, sampled, Path(folder))
    missed = report(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    for line in missed:
        print(f"missed: {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
