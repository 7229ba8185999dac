"""Memory of sampling a million parameters on a million points: `python benchmarks/memory.py`. Exit status 1 over the bound.

A ReLU network 32-700-700-700-1 with four chains, batches of 256 and n = 1e6 inputs of 32 numbers. Memory of sampling is the
peak of the process's resident memory during the call, by the operating system, less what it held just before: Python, JAX,
the programs, which an equal call before it compiled, and the caller's own parameters and data. The bound is three times the
size of what is sampled and what it is sampled on: parameters x chains + data. The copy of the data on the device counts. With
control variates, the default, a gradient over all the data is part of the call, and another on each minibatch.

Linux only: the peak is reset by /proc/self/clear_refs.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import subprocess
import sys
from pathlib import Path

BOUND = 3.0
MB = 2**20
WIDTHS, NUM_DATA, CHAINS, NUM_DRAWS = (32, 700, 700, 700, 1), 1_000_000, 4, 4


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (its peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status must have {field}; it has not: run this on Linux")


def sample(widths: tuple[int, ...], num_data: int, gradient: str) -> tuple[int, int, int]:
    """Samples a network made here; returns the bytes of parameters x chains + data, those held before and the peak."""
    import numpy as np
    from speed import objective

    from lambda_hat.llc.sampling import sample
    from lambda_hat.samplers.posterior import PosteriorSpec
    from lambda_hat.samplers.sgld import SgldSpec
    from lambda_hat.targets.target import Dataset

    rng = np.random.default_rng(0)
    layers = [*(f"hidden_{i}" for i in range(len(widths) - 2)), "output"]
    params = {
        layer: {
            "w": rng.standard_normal((a, b), np.float32) * np.float32((2 / a) ** 0.5),
            "b": np.zeros(b, np.float32),
        }
        for layer, a, b in zip(layers, widths, widths[1:], strict=False)
    }
    dataset = Dataset(
        {"x": rng.standard_normal((num_data, widths[0]), np.float32), "y": rng.standard_normal(num_data, np.float32)}, {}
    )
    size = sum(value.nbytes for value in dataset.samples.values())
    size += CHAINS * sum(value.nbytes for layer in params.values() for value in layer.values())
    sampler = SgldSpec(
        num_chains=CHAINS, num_draws=NUM_DRAWS, num_burnin_steps=0, num_steps_bw_draws=2, step_size=1e-8, gradient=gradient
    )
    sample(objective(widths), params, dataset, PosteriorSpec(), sampler)  # compiles
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is freed but kept for later would hide as much of the next call
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    sample(objective(widths), params, dataset, PosteriorSpec(), sampler)
    return size, before, resident("VmHWM")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", choices=["plain", "control_variates"], help="measure in this process")
    options = parser.parse_args(arguments)
    if options.child:
        print(*sample(WIDTHS, NUM_DATA, options.child))
        return 0
    missed = 0
    print("| gradient | parameters x chains + data | peak | held before | of sampling | times | bound |\n|" + "---|" * 7)
    for gradient in ("control_variates", "plain"):
        command = [sys.executable, __file__, "--child", gradient]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        size, before, peak = map(int, output.split()[-3:])
        times = (peak - before) / size
        missed += times > BOUND
        figures = [f"{value / MB:.0f} MiB" for value in (size, peak, before, peak - before)]
        print("| " + " | ".join([gradient, *figures, f"{times:.2f}", f"{BOUND:g}"]) + " |", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
