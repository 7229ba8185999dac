"""lambda_hat: software for people who study how neural networks learn."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lambda_hat.llc.api import LLCEstimate, estimate_llc, estimate_llcs, plot_estimates

__version__ = "0.1.0"
__all__ = ["LLCEstimate", "estimate_llc", "estimate_llcs", "plot_estimates"]

#: Modules that users import, and documents show, by a name without their folder.
PUBLIC = {
    "gallery": "store.gallery",
    "observables": "llc.observables",
    "policies": "targets.policies",
    "posterior": "samplers.posterior",
    "sampling": "llc.sampling",
    "theory": "targets.theory",
}


class _PublicModules(MetaPathFinder, Loader):
    """Gives the modules of `PUBLIC`, and those inside them, under their public names: the same objects."""

    def find_spec(self, fullname: str, _path: Any, _target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return spec_from_loader(fullname, self) if package == __name__ and name.partition(".")[0] in PUBLIC else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        name, _, inside = spec.name.removeprefix(f"{__name__}.").partition(".")
        module = import_module(".".join(filter(None, (__name__, PUBLIC[name], inside))))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None  # that of the public name, which Python has just set
        module.__spec__ = module.__spec__.loader_state  # it has been executed under its own


sys.meta_path.insert(0, _PublicModules())  # before a package under its public name finds its files a second time


def __getattr__(name: str) -> Any:
    """The Python interface, on first use: its imports (JAX, Matplotlib) take seconds."""
    if name in __all__:
        return getattr(import_module("lambda_hat.llc.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
