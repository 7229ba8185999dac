"""Artifacts by name: addresses that cannot lead out of a store, and manifests that say what an artifact is."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from lambda_hat.specs.spec import InvalidInput, canonical_json, check_id

Kind = Literal["target", "run", "diagnosis", "curvature", "sweep", "trials", "study", "entropy", "entropy_study"]

#: Part of where diagnoses lie and of sweeps' ids. Raise it when estimates, verdicts or plots change: draws stay, and the next
#: sweep over them diagnoses them anew.
DIAGNOSIS_VERSION = 2
#: The same of curvatures, and of studies' tables, plots and pages.
STUDY_VERSION = 1

KINDS: dict[Kind, tuple[str, str]] = {  # the prefix of its ids, its folder below the root
    "target": ("tgt", "targets/{id}"),
    "run": ("run", "targets/{target_id}/runs/{id}"),
    "diagnosis": ("run", f"targets/{{target_id}}/runs/{{id}}/diagnosis-v{DIAGNOSIS_VERSION}"),
    "curvature": ("tgt", f"targets/{{id}}/curvature-v{STUDY_VERSION}"),
    "sweep": ("swp", "sweeps/{id}"),
    "trials": ("trl", "trials/{id}"),
    "study": ("sty", "studies/{id}"),
    "entropy": ("ent", "entropy/{id}"),
    "entropy_study": ("ens", "entropy_studies/{id}"),
}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


class ArtifactError(Exception):
    """An artifact is absent or damaged. The message states the rule, what was found and the remedy."""


class StoreUnavailable(Exception):
    """The storage below a store does not answer, or refuses access. The message states the rule, what failed and the remedy."""


@dataclass(frozen=True)
class Address:
    """Where an artifact is, checked so that no id can lead out of the store. Made by the functions below.

    id: the run's for a diagnosis, the target's for a curvature. target_id: None for what is in no target.
    """

    kind: Kind
    id: str
    target_id: str | None

    def __post_init__(self) -> None:
        _check_prefix(self.id, KINDS[self.kind][0])
        if self.kind in ("run", "diagnosis"):
            _check_prefix(self.target_id, "tgt")
        elif self.target_id != (self.id if KINDS[self.kind][0] == "tgt" else None):
            raise InvalidInput(f"A {self.kind} is in no other target; got {self.target_id!r}: use {self.kind}_address.")

    @property
    def folder(self) -> str:
        """Path below the store's root."""
        return KINDS[self.kind][1].format(id=self.id, target_id=self.target_id)


def target_address(target_id: str) -> Address:
    return Address("target", target_id, target_id)


def run_address(target_id: str, run_id: str) -> Address:
    return Address("run", run_id, target_id)


def diagnosis_address(target_id: str, run_id: str) -> Address:
    """A run's derived results: an artifact of its own, so that it can be redone without sampling again."""
    return Address("diagnosis", run_id, target_id)


def curvature_address(target_id: str) -> Address:
    return Address("curvature", target_id, target_id)


def sweep_address(sweep_id: str) -> Address:
    return Address("sweep", sweep_id, None)


def trials_address(trials_id: str) -> Address:
    """Of trials that were trained by one program."""
    return Address("trials", trials_id, None)


def study_address(study_id: str) -> Address:
    return Address("study", study_id, None)


def entropy_address(entropy_id: str) -> Address:
    """Of an update of a policy that was taken apart."""
    return Address("entropy", entropy_id, None)


def entropy_study_address(study_id: str) -> Address:
    return Address("entropy_study", study_id, None)


def _check_prefix(text: Any, prefix: str) -> None:
    if not check_id(text).startswith(prefix):
        raise InvalidInput(f"This id must start with {prefix}_; got {text!r}: pass the id of the right kind.")


def check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            "A file's name is words of letters, digits, '_', '.' and '-' joined by '/', none beginning with '.' or '-'; "
            f"got {name!r}: rename the file."
        )
    return name


class StoredFile(BaseModel):
    """size in bytes; sha256 in hexadecimal."""

    model_config = ConfigDict(frozen=True)

    name: Annotated[str, AfterValidator(check_name)]
    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """What a published artifact is: its spec, its summary and its files.

    created_at: ISO 8601, UTC. attempt: the folder of the files, below files/.
    """

    model_config = ConfigDict(frozen=True)

    kind: Kind
    id: str
    target_id: str | None
    created_at: str
    lambda_hat_version: str
    algorithm_version: int
    spec: dict[str, Any]
    summary: dict[str, Any]
    attempt: str = Field(pattern=r"^[0-9a-f]{32}$")
    files: tuple[StoredFile, ...]

    @property
    def address(self) -> Address:
        return Address(self.kind, self.id, self.target_id)

    def file(self, name: str) -> StoredFile:
        """Raises ArtifactError if the artifact has no such file."""
        for file in self.files:
            if file.name == name:
                return file
        names = ", ".join(file.name for file in self.files) or "none"
        raise ArtifactError(
            f"An artifact has the files its manifest names; got {name!r}, {self.id} has {names}: name one of these."
        )


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def parse_manifest(text: bytes, address: Address) -> Manifest:
    """Raises ValueError or RecursionError if this is not the manifest of `address` as it was written."""
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    checksum = content.pop("manifest_sha256", None)
    if checksum != sha256(canonical_json(content).encode()):
        raise ValueError("its own checksum does not fit")
    manifest = Manifest.model_validate(content)
    if manifest.address != address:
        raise ValueError(f"it is the manifest of {manifest.address.folder}")
    return manifest
