"""Samplers. A new one is one file here and one member of `AnySamplerSpec`; the conformance tests iterate the union."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lambda_hat.samplers.adjusted_mclmc import AdjustedMclmcSpec
from lambda_hat.samplers.base import Info, Sampler, SamplerSpec, StepSize
from lambda_hat.samplers.hmc import HmcSpec
from lambda_hat.samplers.mala import MalaSpec
from lambda_hat.samplers.mclmc import MclmcSpec
from lambda_hat.samplers.nuts import NutsSpec
from lambda_hat.samplers.sghmc import SghmcSpec
from lambda_hat.samplers.sgld import SgldSpec
from lambda_hat.samplers.sgnht import SgnhtSpec
from lambda_hat.samplers.smc import SmcSpec
from lambda_hat.samplers.vi import ViSpec

AnySamplerSpec = Annotated[
    SgldSpec | SghmcSpec | SgnhtSpec | MalaSpec | HmcSpec | NutsSpec | MclmcSpec | AdjustedMclmcSpec | ViSpec | SmcSpec,
    Field(discriminator="kind"),
]

__all__ = ["AnySamplerSpec", "Info", "Sampler", "SamplerSpec", "StepSize"]
