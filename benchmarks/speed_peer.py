"""devinterp's side of `speed.py`, run by the Python of its own environment: one JSON request a line in, one answer a line out.

A request: {"file": arrays, "cores", "num_chains", "num_draws", "num_steps_bw_draws", "step_size", "nbeta", "localization",
"batch_size", "loader"}; the answer: {"seconds": [wall time of one draw, of all], "losses": file of the trace}.
Threads within a process are OMP_NUM_THREADS, which its worker processes inherit.
"""

from __future__ import annotations

import json
import sys
import time
import warnings

import numpy as np
import torch
from devinterp.optim.sgld import SGLD
from devinterp.slt.sampler import estimate_learning_coeff_with_summary
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")


class TensorLoader(DataLoader):
    """Shuffled batches cut from the tensors by one index: what a user could write to be rid of DataLoader's work per sample."""

    def __iter__(self):
        x, y = self.dataset.tensors
        for index in torch.randperm(len(x)).split(self.batch_size):
            yield x[index], y[index]


def evaluate(model: torch.nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, None]:
    x, y = data
    return torch.square(model(x)[:, 0] - y).mean(), None


def build(arrays: dict[str, np.ndarray]) -> torch.nn.Sequential:
    """The ReLU network of the weights w0, b0, w1, b1, ..."""
    layers: list[torch.nn.Module] = []
    depth = sum(name.startswith("w") for name in arrays)
    for i in range(depth):
        weight, bias = torch.tensor(arrays[f"w{i}"].T.copy()), torch.tensor(arrays[f"b{i}"])
        linear = torch.nn.Linear(*weight.T.shape)
        linear.weight.data, linear.bias.data = weight, bias
        layers += [linear, torch.nn.ReLU()] if i < depth - 1 else [linear]
    return torch.nn.Sequential(*layers)


def run(model: torch.nn.Module, loader: DataLoader, request: dict, num_draws: int) -> tuple[float, np.ndarray]:
    began = time.perf_counter()
    results = estimate_learning_coeff_with_summary(
        model, loader, evaluate=evaluate, sampling_method=SGLD,
        # devinterp drifts by lr/2 and adds noise of variance lr.
        optimizer_kwargs={"lr": 2 * request["step_size"], "nbeta": request["nbeta"], "localization": request["localization"]},
        num_draws=num_draws, num_chains=request["num_chains"], num_steps_bw_draws=request["num_steps_bw_draws"],
        num_burnin_steps=0, cores=request["cores"], seed=0, verbose=False,
    )  # fmt: skip
    return time.perf_counter() - began, results["loss/trace"]


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        arrays = dict(np.load(request["file"]))
        model = build(arrays)
        data = TensorDataset(torch.tensor(arrays["x"]), torch.tensor(arrays["y"]))
        loader = {"DataLoader": DataLoader, "tensors": TensorLoader}[request["loader"]](
            data, batch_size=request["batch_size"], shuffle=True
        )
        start, _ = run(model, loader, request, 1)
        whole, losses = run(model, loader, request, request["num_draws"])
        np.save(request["file"] + ".losses.npy", losses)
        print(json.dumps({"seconds": [start, whole], "losses": request["file"] + ".losses.npy"}), flush=True)


if __name__ == "__main__":
    main()
