"""A run: one sampler on one target's posterior."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from lambda_hat.posterior import PosteriorSpec
from lambda_hat.samplers import AnySamplerSpec
from lambda_hat.spec import Spec, content_id
from lambda_hat.targets import AnyTargetSpec


class RunSpec(Spec):
    """Everything that decides the numbers of a run; its precision is the target's."""

    target: AnyTargetSpec
    posterior: PosteriorSpec = PosteriorSpec()
    sampler: AnySamplerSpec

    @model_validator(mode="after")
    def _batch_fits(self) -> Self:
        batch_size = getattr(self.sampler, "batch_size", 0)
        if batch_size > self.target.num_data:
            raise ValueError(f"sampler.batch_size must be at most data.n_data, {self.target.num_data}; got {batch_size}")
        return self

    @property
    def target_id(self) -> str:
        return self.target.target_id

    @property
    def run_id(self) -> str:
        return content_id("run", {"target_id": self.target_id} | self.model_dump(mode="json", exclude={"target"}))

    @property
    def nbeta(self) -> float:
        return self.posterior.resolve_nbeta(self.target.num_data)

    @property
    def fge(self) -> float:
        """Work of the run in full-data gradient equivalents, known before it starts."""
        return self.sampler.fge(self.target.num_data)
