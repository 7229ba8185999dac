"""The artifact store: results under their content's id, on any fsspec URI (a local folder, memory://, s3://, ...).

An artifact is data files in an attempt folder only one writer knows, and one manifest, written last, that names them with
their sizes and SHA-256. A reader starts from the manifest, so it sees a whole artifact or none, whatever killed the writer and
however many write at once: equal ids have equal content, and the last manifest wins. Attempts no manifest names are debris.

    <root>/targets/<target_id>/                            manifest.json  files/<attempt>/<name>
    <root>/targets/<target_id>/runs/<run_id>/              the same
    <root>/targets/<target_id>/runs/<run_id>/diagnosis-v2/ the same
    <root>/targets/<target_id>/curvature-v1/               the same
    <root>/sweeps/<sweep_id>/                              the same
    <root>/trials/<trials_id>/                             the same
    <root>/studies/<study_id>/                             the same
    <root>/entropy/<entropy_id>/                           the same
    <root>/entropy_studies/<study_id>/                     the same
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lambda_hat import __version__
from lambda_hat.specs.spec import ALGORITHM_VERSION, ID_PATTERN, ID_PREFIXES, InvalidInput, canonical_json
from lambda_hat.store.manifest import (
    KINDS,
    Address,
    ArtifactError,
    Kind,
    Manifest,
    StoredFile,
    check_name,
    curvature_address,
    diagnosis_address,
    entropy_address,
    parse_manifest,
    run_address,
    sha256,
    target_address,
    trials_address,
)
from lambda_hat.store.storage import Storage, write_file

if TYPE_CHECKING:
    import pandas as pd

_PARALLEL_REQUESTS = 16  # a remote store answers in tens of milliseconds: one manifest at a time is slow
_PARALLEL_FILES = 4  # each is in memory as a whole

#: What work that was killed may leave behind. `clean` looks at nothing else.
_LEFT = re.compile(
    r"(?P<folder>targets/tgt_[0-9a-f]{16}(/curvature[^/]*|/runs/run_[0-9a-f]{16}(/diagnosis[^/]*)?)?"
    r"|(sweeps/swp|trials/trl|studies/sty|entropy/ent|entropy_studies/ens)_[0-9a-f]{16})"
    r"/(?P<what>files/[0-9a-f]{32}(?=/)|checkpoint$|(manifest\.json|checkpoint)\.[0-9a-f]{32}\.tmp$)"
)


class Store:
    """Artifacts below one fsspec URI. `options` go to its filesystem (endpoint, credentials, ...).

    A relative local path is resolved once, here. Files of targets that are read from a remote store are kept in this machine's
    folder `cache` under their SHA-256, which is checked whenever they are read from there; "" keeps none.

    Every method raises StoreUnavailable where the storage fails. S3 is asked once here, before any work.

    Raises:
      InvalidInput: the URI is empty or names no folder, its protocol or one of the options is unknown, or the package for it is
        not installed.
      StoreUnavailable: S3 does not answer, refuses the credentials, or has no such bucket.
    """

    def __init__(self, uri: str, options: dict[str, Any] | None = None, cache: str = "~/.cache/lambda_hat/targets") -> None:
        self._storage = Storage(uri, options or {})
        self.uri: str = self._storage.uri
        self._cache = Path(cache).expanduser() if cache and not self._storage.local else None

    def check_writable(self) -> None:
        """Raises InvalidInput or StoreUnavailable where nothing can be published here; leaves nothing behind."""
        self._storage.check_writable()

    def publish(
        self, address: Address, files: Mapping[str, bytes], *, spec: dict[str, Any], summary: dict[str, Any]
    ) -> Manifest:
        """Publishes `files` (name -> content) with `spec` and `summary`, all JSON's own types; NaN and infinities become None.

        If the artifact is already there, writes nothing and returns its manifest. Otherwise it becomes visible whole, in the
        last step, or not at all. Any number of processes may publish one address at once; no data file is ever overwritten.

        Raises:
          InvalidInput: a file's name is not plain and relative.
          TypeError: JSON cannot hold `spec` or `summary`.
        """
        if (published := self.manifest(address)) is not None:
            return published
        attempt = uuid.uuid4().hex
        content = {
            **asdict(address),
            "created_at": datetime.now(UTC).isoformat(timespec="microseconds"),
            "lambda_hat_version": __version__,
            "algorithm_version": ALGORITHM_VERSION,
            "spec": spec,
            "summary": summary,
            "attempt": attempt,
            "files": [{"name": check_name(name), "size": len(data), "sha256": sha256(data)} for name, data in files.items()],
        }
        content = json.loads(json.dumps(content), parse_constant=lambda _: None)
        text = canonical_json({**content, "manifest_sha256": sha256(canonical_json(content).encode())}).encode()
        manifest = parse_manifest(text, address)
        folder = self._path(address, "files", attempt)
        maybe_named = False
        try:
            for name, data in files.items():
                self._storage.write(f"{folder}/{name}", data)
            maybe_named = (
                not self._storage.local
            )  # a PUT that fails may still have arrived, a rename that fails has not happened
            self._storage.write(self._path(address, "manifest.json"), text)
        except BaseException:
            if not maybe_named:
                with contextlib.suppress(Exception):
                    self._storage.remove(folder, [f"{folder}/{name}" for name in files])
            raise
        return manifest

    def manifest(self, address: Address) -> Manifest | None:
        """The manifest; None unless it is whole and unedited and every file it names is there with its size."""
        try:
            return self._load(address)
        except ArtifactError:
            return None

    def manifests(self, addresses: Iterable[Address]) -> list[Manifest]:
        """Of those artifacts that are there, in this order."""
        with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
            return [manifest for manifest in pool.map(self.manifest, addresses) if manifest is not None]

    def exists(self, address: Address) -> bool:
        return self.manifest(address) is not None

    def read(self, address: Address, name: str) -> bytes:
        """The content of one file, its size and SHA-256 checked.

        Raises:
          ArtifactError: there is no valid artifact or no such file in it, or its bytes are not those that were published.
        """
        manifest = self._load(address)
        file = manifest.file(name)
        if self._cache is None or address.kind != "target":
            return self._read(manifest, file)
        cached = self._cache / file.sha256
        with contextlib.suppress(OSError):
            data = cached.read_bytes()
            if sha256(data) == file.sha256:
                return data
        data = self._read(manifest, file)
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not the run
            write_file(cached, data)
        return data

    def url(self, address: Address, name: str) -> str:
        """Where one published file lies, to show to people: a path in a local store, a URI elsewhere.

        Raises:
          ArtifactError: there is no valid artifact or no such file in it.
        """
        manifest = self._load(address)
        return self._storage.shown(self._file_path(manifest, manifest.file(name)))

    def save_checkpoint(self, address: Address, data: bytes) -> None:
        """Replaces the checkpoint of unfinished work in one step: a reader sees the old one or the new one."""
        self._storage.write(self._path(address, "checkpoint"), hashlib.sha256(data).digest() + data)

    def load_checkpoint(self, address: Address) -> bytes | None:
        """What `save_checkpoint` was given last; None when there is none or its checksum does not fit."""
        content = self._storage.read(self._path(address, "checkpoint")) or b""
        digest, data = content[:32], content[32:]
        return data if hashlib.sha256(data).digest() == digest else None

    def clear_checkpoint(self, address: Address) -> None:
        """Removes the checkpoint, if there is one."""
        with contextlib.suppress(FileNotFoundError):
            path = self._path(address, "checkpoint")
            self._storage.remove(path, [path])

    def catalogue(self, kind: Kind) -> pd.DataFrame:
        """One row for each valid artifact of a kind, oldest first.

        Columns: id, target_id (None for a sweep), created_at (ISO 8601, UTC, text); the spec's as "spec.sampler.kind"; the
        summary's under their own names, nested ones with dots, save any named like these. Lists become tuples.
        An empty or absent store gives no rows and the first three columns.
        """
        import pandas as pd

        rows = []
        for manifest in sorted(self.manifests(self._addresses(kind)), key=lambda manifest: (manifest.created_at, manifest.id)):
            head = manifest.model_dump(include={"id", "target_id", "created_at", "spec"})
            rows.append(head | manifest.summary | head)
        if not rows:
            return pd.DataFrame(columns=["id", "target_id", "created_at"])
        return pd.json_normalize(rows).map(lambda value: tuple(value) if isinstance(value, list) else value)

    def verify(self) -> Iterator[tuple[Address, str | None]]:
        """Checks every byte of everything that has a manifest, valid or not; yields its address and what is wrong, or None."""
        addresses = self.addresses()
        with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
            for address, (is_there, problem) in zip(addresses, pool.map(self._verify, addresses), strict=True):
                if is_there:
                    yield address, problem

    def _verify(self, address: Address) -> tuple[bool, str | None]:
        """Whether it has a manifest, and what is wrong."""
        text = self._storage.read(self._path(address, "manifest.json"))
        if text is None:
            return False, None
        try:
            manifest = self._check(address, text)
            for file in manifest.files:
                self._read(manifest, file)
        except ArtifactError as error:
            return True, str(error)
        return True, None

    def copy(self, address: Address, source: Store) -> int | None:
        """Copies another store's artifact as it is, its manifest last; returns how many bytes it took, None where it is here.

        Raises:
          ArtifactError: the other store has no such artifact, or it is damaged.
        """
        if self.exists(address):
            return None
        text, num_bytes = source._text(address), 0
        manifest = source._check(address, text)
        for file in manifest.files:
            try:
                self._read(manifest, file)  # a copy that was cut off has left it
            except ArtifactError:
                self._storage.write(self._file_path(manifest, file), source._read(manifest, file))
                num_bytes += file.size
        self._storage.write(self._path(address, "manifest.json"), text)
        return num_bytes

    def clean(self, hours: float, dry_run: bool = False) -> Iterator[tuple[str, int]]:
        """Removes what killed work has left and nobody wrote to for so many hours: attempts no manifest names, temporary files,
        checkpoints of finished work, unfinished uploads to S3. With `dry_run` it only names them.

        What a manifest names stays, checkpoints of unfinished work stay, and so does everything the store did not write.

        Yields:
          Path and bytes of each thing removed; an unfinished upload's bytes are not known, and 0.
        """
        before = datetime.now(UTC) - timedelta(hours=hours)
        for path, files in self._left_behind():
            with contextlib.suppress(FileNotFoundError):  # its writer was faster
                if max(self._storage.modified(file) for file in files) > before:
                    continue
                num_bytes = sum(size or 0 for size in self._storage.sizes(files))
                if not dry_run:
                    self._storage.remove(path, files)
                yield self._storage.shown(path), num_bytes
        for shown, begun, abort in self._storage.uploads():
            if begun <= before:
                with contextlib.suppress(FileNotFoundError):  # finished or ended meanwhile
                    if not dry_run:
                        abort()
                    yield shown, 0

    def _left_behind(self) -> Iterator[tuple[str, list[str]]]:
        """Files and folders of attempts that no manifest names or needs, and the files in each."""
        found: dict[str, dict[str, list[str]]] = {}
        for path in self._storage.files():
            if match := _LEFT.match(path[len(self._storage.root) + 1 :]):
                found.setdefault(match["folder"], {}).setdefault(match["what"], []).append(path)
        with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
            for (folder, left), unneeded in zip(found.items(), pool.map(self._unneeded, found, found.values()), strict=True):
                for what in unneeded:
                    yield f"{self._storage.root}/{folder}/{what}", left[what]

    def _unneeded(self, folder: str, left: Collection[str]) -> list[str]:
        """Of what is left in an artifact's folder, what its manifest does not name, or nothing will go on from."""
        text = self._storage.read(f"{self._storage.root}/{folder}/manifest.json")
        if text is None:
            return [what for what in left if what != "checkpoint"]
        try:
            content = json.loads(text)
            needed = {f"files/{content['attempt']}"}
            address = Address(content["kind"], content["id"], content["target_id"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return []  # it is damaged and does not say what it names
        if "checkpoint" in left and not self.exists(address):
            needed.add("checkpoint")  # its files are gone: it is being computed again
        return [what for what in left if what not in needed]

    def find(self, text: str) -> Address:
        """The artifact whose id is `text` or, it alone, begins with it. A run is found without its target's id.

        Raises:
          InvalidInput: `text` begins no id, or no valid artifact's, or several.
        """
        if not re.fullmatch(rf"({ID_PREFIXES})_[0-9a-f]{{0,16}}", text):
            raise InvalidInput(
                f"An id is one of {ID_PREFIXES.replace('|', ', ')}, _ and 16 hexadecimal digits or fewer; got {text!r}. "
                "`lambda-hat ls` lists the ids."
            )
        kind = next(kind for kind, (prefix, _) in KINDS.items() if text.startswith(prefix))
        candidates = [address for address in self._addresses(kind) if address.id.startswith(text)]
        found = [address for address in candidates if self.exists(address)]
        if len(found) != 1:
            names = ", ".join(address.id for address in found) or "none"
            raise InvalidInput(
                f"An id or its beginning must fit one artifact in {self.uri}; {text!r} fits {names}. `lambda-hat ls` lists all."
            )
        return found[0]

    def related(self, address: Address) -> list[Address]:
        """An artifact with what it is made from and what is made from it, published or not: a target with its curvature, its
        runs and their diagnoses, a run with its target and its diagnosis, a measured update of a policy with its target, a
        sweep or a study with all it compares.
        """
        found, runs = {address: None}, []
        if address.kind == "target":
            runs = [run_address(address.id, run_id) for run_id in self._ids(f"{address.folder}/runs", "run")]
            found[curvature_address(address.id)] = None
        elif address.kind == "run":
            runs = [address]
        elif address.kind == "entropy":
            found[target_address(self._load(address).summary["target_id"])] = None
        elif address.kind in ("sweep", "study", "entropy_study"):
            spec = self._load(address).spec
            found |= dict.fromkeys(map(entropy_address, spec.get("entropy_ids", [])))
            runs = [run for run in self._addresses("run") if run.id in set(spec["run_ids"])]
            found |= dict.fromkeys(map(trials_address, spec.get("trials_ids", [])))
            for target_id in spec.get("target_ids", []):
                found |= dict.fromkeys([target_address(target_id), curvature_address(target_id)])
        for run in runs:
            target_id = str(run.target_id)
            found |= dict.fromkeys([target_address(target_id), run, diagnosis_address(target_id, run.id)])
        return list(found)

    def addresses(self, *kinds: Kind) -> list[Address]:
        """Of everything of these kinds, of all if there are none, that has a folder, published or not."""
        return [address for kind in kinds or KINDS for address in self._addresses(kind)]

    def _addresses(self, kind: Kind) -> list[Address]:
        prefix, folder = KINDS[kind]
        if not folder.startswith("targets/"):
            return [Address(kind, id, None) for id in self._ids(folder.partition("/")[0], prefix)]
        target_ids = self._ids("targets", "tgt")
        if prefix == "tgt":
            return [Address(kind, target_id, target_id) for target_id in target_ids]
        with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
            run_ids = list(pool.map(lambda target_id: self._ids(f"targets/{target_id}/runs", "run"), target_ids))
        pairs = zip(target_ids, run_ids, strict=True)
        return [Address(kind, run_id, target_id) for target_id, ids in pairs for run_id in ids]

    def _ids(self, folder: str, prefix: str) -> list[str]:
        names = self._storage.names(f"{self._storage.root}/{folder}")
        return sorted(name for name in names if ID_PATTERN.fullmatch(name) and name.startswith(prefix))

    def _load(self, address: Address) -> Manifest:
        return self._check(address, self._text(address))

    def _text(self, address: Address) -> bytes:
        path = self._path(address, "manifest.json")
        text = self._storage.read(path)
        if text is None:
            raise ArtifactError(
                f"An artifact is there once its manifest is; found none at {self._storage.shown(path)}. "
                "Compute it, or list what is there with `lambda-hat ls`."
            )
        return text

    def _check(self, address: Address, text: bytes) -> Manifest:
        """Parses a manifest, and looks for every file it names."""
        try:
            manifest = parse_manifest(text, address)
        except (ValueError, RecursionError) as error:
            path = self._storage.shown(self._path(address, "manifest.json"))
            raise ArtifactError(
                f"A manifest must be whole, unedited and in its place; {path} is not: {error}. Compute it again."
            ) from error
        paths = [self._file_path(manifest, file) for file in manifest.files]
        sizes = self._storage.sizes(paths)
        for path, file, size in zip(paths, manifest.files, sizes, strict=True):
            if size != file.size:
                found = "no file" if size is None else f"{size} bytes"
                raise ArtifactError(
                    f"Every file of an artifact must have the size its manifest says, {file.size} bytes; "
                    f"found {found} at {self._storage.shown(path)}. Compute it again."
                )
        return manifest

    def _read(self, manifest: Manifest, file: StoredFile) -> bytes:
        path = self._file_path(manifest, file)
        data = self._storage.read(path)
        if data is None or len(data) != file.size or sha256(data) != file.sha256:
            found = "no file" if data is None else f"{len(data)} bytes with {sha256(data)}"
            raise ArtifactError(
                f"A file must be as its manifest says, {file.size} bytes with SHA-256 {file.sha256}; "
                f"found {found} at {self._storage.shown(path)}. "
                f"Delete {self._storage.shown(self._path(manifest.address, 'manifest.json'))} and compute it again."
            )
        return data

    def _file_path(self, manifest: Manifest, file: StoredFile) -> str:
        return self._path(manifest.address, "files", manifest.attempt, file.name)

    def _path(self, address: Address, *parts: str) -> str:
        return "/".join([self._storage.root, address.folder, *parts])
