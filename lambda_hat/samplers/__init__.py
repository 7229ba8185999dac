"""Samplers. A new one is one file here and one member of `AnySamplerSpec`; the conformance tests iterate the union."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lambda_hat.samplers.base import Info, Sampler, SamplerSpec
from lambda_hat.samplers.hmc import HmcSpec
from lambda_hat.samplers.mclmc import MclmcSpec
from lambda_hat.samplers.sgld import SgldSpec

AnySamplerSpec = Annotated[SgldSpec | HmcSpec | MclmcSpec, Field(discriminator="kind")]

__all__ = ["AnySamplerSpec", "Info", "Sampler", "SamplerSpec"]
