"""Low-rank adapters (LoRA, arXiv 2106.09685): W + (alpha / rank) A B for named matrices W, of which A and B are trained."""

from __future__ import annotations

import fnmatch
import math

import jax
import numpy as np
from pydantic import Field

from lambda_hat.specs.spec import InvalidInput, Spec
from lambda_hat.targets.policies.decoder import Adapted
from lambda_hat.targets.target import Params, Shapes


class LoraSpec(Spec):
    """Which matrices have adapters, and of what rank."""

    rank: int = Field(4, ge=1, description="columns of A and rows of B")
    alpha: float = Field(8.0, gt=0, description="A B is multiplied by alpha / rank")
    matrices: tuple[str, ...] = Field(
        ("*/query", "*/value"), min_length=1, description="names of the modules of the matrices; * stands for any text"
    )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def adapter_shapes(spec: LoraSpec, params: Params) -> Shapes:
    """Shapes and dtypes {module: {"a": (in, rank), "b": (rank, out)}} of adapters to `params`, of which the shapes are enough.

    Raises:
      InvalidInput: a name in `spec.matrices` is of no matrix.
    """
    matrices = {module: leaves["w"] for module, leaves in params.items() if "w" in leaves}
    for pattern in spec.matrices:
        if not fnmatch.filter(matrices, pattern):
            raise InvalidInput(
                f"matrices of adapters must be modules of the network; got {pattern!r}, and there are {', '.join(matrices)}. "
                "Name some of these."
            )
    return {
        module: {
            "a": jax.ShapeDtypeStruct((w.shape[0], spec.rank), w.dtype),
            "b": jax.ShapeDtypeStruct((spec.rank, w.shape[1]), w.dtype),
        }
        for module, w in matrices.items()
        if any(fnmatch.fnmatch(module, pattern) for pattern in spec.matrices)
    }


def init_adapters(spec: LoraSpec, params: Params, seed: tuple[int, ...]) -> Params:
    """Adapters to `params`, as `adapter_shapes` has them: A from N(0, 1/in), B = 0, so that the network is at first the same.

    Raises:
      InvalidInput: a name in `spec.matrices` is of no matrix.
    """
    rng = np.random.default_rng(seed)
    adapters = {}
    for module, own in adapter_shapes(spec, params).items():
        a = rng.standard_normal(own["a"].shape) / math.sqrt(own["a"].shape[0])
        adapters[module] = {"a": a.astype(own["a"].dtype), "b": np.zeros(own["b"].shape, own["b"].dtype)}
    return adapters


def check_adapters(spec: LoraSpec, params: Params, adapters: Params) -> None:
    """Looks at shapes alone, so under jit too.

    Raises:
      InvalidInput: adapters are of a module that has no matrix, or not (in, rank) and (rank, out) of it: with another rank they
        would be scaled by another alpha / rank.
    """
    for module, leaves in adapters.items():
        if "w" not in params.get(module, {}):
            raise InvalidInput(
                f"Adapters must be of the network's matrices; got some of {module!r}, which has none. Take its own adapters."
            )
        width, out = params[module]["w"].shape
        shapes = {name: tuple(leaf.shape[-2:]) for name, leaf in leaves.items()}
        if shapes != {"a": (width, spec.rank), "b": (spec.rank, out)}:
            raise InvalidInput(
                f"Adapters of {module!r} must be a, {(width, spec.rank)}, and b, {(spec.rank, out)}, with rank={spec.rank}; "
                f"got {', '.join(f'{name}, {shape}' for name, shape in shapes.items())}. "
                "Set lora.rank to theirs, or take others."
            )


def joined(spec: LoraSpec | None, base: Params | None, params: Params) -> Params:
    """What a decoder's functions take as parameters: `params` themselves, or with a spec the frozen `base` with the adapters
    `params`. A B is never formed, so that many adapters side by side are cheap.

    Raises:
      InvalidInput: see `check_adapters`.
    """
    if spec is None:
        return params
    if base is not None:
        check_adapters(spec, base, params)
    return Adapted(base, {module: (leaves["a"], spec.scale * leaves["b"]) for module, leaves in params.items()})


def merge(spec: LoraSpec, params: Params, adapters: Params) -> Params:
    """Parameters of the network without adapters that computes the same: W + (alpha / rank) A B.

    Raises:
      InvalidInput: see `check_adapters`.
    """
    check_adapters(spec, params, adapters)
    merged = {module: dict(leaves) for module, leaves in params.items()}
    for module, leaves in adapters.items():
        merged[module]["w"] = merged[module]["w"] + spec.scale * (leaves["a"] @ leaves["b"])
    return merged
