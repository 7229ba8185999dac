"""The artifact store: results under their content's id, on any fsspec URI (a local folder, memory://, s3://, ...).

An artifact is data files in an attempt folder only one writer knows, and one manifest, written last, that names them with
their sizes and SHA-256. A reader starts from the manifest, so it sees a whole artifact or none, whatever killed the writer and
however many write at once: equal ids have equal content, and the last manifest wins. Attempts no manifest names are debris.

    <root>/targets/<target_id>/                            manifest.json  files/<attempt>/<name>
    <root>/targets/<target_id>/runs/<run_id>/              the same
    <root>/targets/<target_id>/runs/<run_id>/diagnosis-v2/ the same
    <root>/sweeps/<sweep_id>/                              the same
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from lambda_hat import __version__
from lambda_hat.manifest import (
    KINDS,
    Address,
    ArtifactError,
    Kind,
    Manifest,
    StoredFile,
    check_name,
    parse_manifest,
    sha256,
    sweep_address,
    target_address,
)
from lambda_hat.spec import ALGORITHM_VERSION, ID_PATTERN, InvalidInput, canonical_json

if TYPE_CHECKING:
    import pandas as pd

_PARALLEL_REQUESTS = 16  # a remote store answers in tens of milliseconds: one manifest at a time is slow


class Store:
    """Artifacts below one fsspec URI. `options` go to its filesystem (endpoint, credentials, ...).

    A relative local path is resolved once, here. Errors of the storage or the network other than "not there" pass through every
    method as the filesystem raises them.

    Raises:
      InvalidInput: the URI is empty or names no folder, its protocol is unknown, or the package for it is not installed.
    """

    def __init__(self, uri: str, options: dict[str, Any] | None = None) -> None:
        if not uri.strip() or uri.endswith("://"):
            raise InvalidInput(
                f"A store's URI names a folder; got {uri!r}: use a path like ./artifacts, or s3://bucket/folder."
            )
        try:
            # The cache of listings would hide what other processes publish.
            self._fs, path = url_to_fs(uri, **{**(options or {}), "use_listings_cache": False})
        except (ValueError, ImportError, TypeError) as error:
            raise InvalidInput(
                f"A store's URI must be one fsspec can open with its options; got {uri!r}: {error}. "
                "Use a local path or s3://bucket/folder, or install the package the message names."
            ) from error
        self._local = isinstance(self._fs, LocalFileSystem)
        if self._local and Path(path).exists() and not Path(path).is_dir():
            raise InvalidInput(f"A local store is a folder; got {uri!r}, which is a file: name another path.")
        self._root = path.rstrip("/")
        self.uri: str = self._shown(self._root)

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
                self._put(f"{folder}/{name}", data)
            maybe_named = not self._local  # a PUT that fails may still have arrived, a rename that fails has not happened
            self._put(self._path(address, "manifest.json"), text)
        except BaseException:
            if not maybe_named:
                with contextlib.suppress(Exception):
                    self._fs.rm(folder, recursive=True)
            raise
        return manifest

    def manifest(self, address: Address) -> Manifest | None:
        """The manifest; None unless it is whole and unedited and every file it names is there with its size."""
        try:
            return self._load(address)
        except ArtifactError:
            return None

    def exists(self, address: Address) -> bool:
        return self.manifest(address) is not None

    def read(self, address: Address, name: str) -> bytes:
        """The content of one file, its size and SHA-256 checked.

        Raises:
          ArtifactError: there is no valid artifact or no such file in it, or its bytes are not those that were published.
        """
        manifest = self._load(address)
        return self._read(manifest, manifest.file(name))

    def url(self, address: Address, name: str) -> str:
        """Where one published file lies, to show to people: a path in a local store, a URI elsewhere.

        Raises:
          ArtifactError: there is no valid artifact or no such file in it.
        """
        manifest = self._load(address)
        return self._shown(self._file_path(manifest, manifest.file(name)))

    def save_checkpoint(self, address: Address, data: bytes) -> None:
        """Replaces the checkpoint of unfinished work in one step: a reader sees the old one or the new one."""
        self._put(self._path(address, "checkpoint"), hashlib.sha256(data).digest() + data)

    def load_checkpoint(self, address: Address) -> bytes | None:
        """What `save_checkpoint` was given last; None when there is none or its checksum does not fit."""
        content = self._cat(self._path(address, "checkpoint")) or b""
        digest, data = content[:32], content[32:]
        return data if hashlib.sha256(data).digest() == digest else None

    def clear_checkpoint(self, address: Address) -> None:
        """Removes the checkpoint, if there is one."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(address, "checkpoint"))

    def catalogue(self, kind: Kind) -> pd.DataFrame:
        """One row for each valid artifact of a kind, oldest first.

        Columns: id, target_id (None for a sweep), created_at (ISO 8601, UTC, text); the spec's as "spec.sampler.kind"; the
        summary's under their own names, nested ones with dots, save any named like these. Lists become tuples.
        An empty or absent store gives no rows and the first three columns.
        """
        import pandas as pd

        with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
            manifests = [manifest for manifest in pool.map(self.manifest, self._addresses(kind)) if manifest is not None]
        rows = []
        for manifest in sorted(manifests, key=lambda manifest: (manifest.created_at, manifest.id)):
            head = manifest.model_dump(include={"id", "target_id", "created_at", "spec"})
            rows.append(head | manifest.summary | head)
        if not rows:
            return pd.DataFrame(columns=["id", "target_id", "created_at"])
        return pd.json_normalize(rows).map(lambda value: tuple(value) if isinstance(value, list) else value)

    def verify(self) -> Iterator[tuple[Address, str | None]]:
        """Checks every byte of everything that has a manifest, valid or not; yields its address and what is wrong, or None."""
        for kind in KINDS:
            for address in self._addresses(kind):
                if not self._fs.exists(self._path(address, "manifest.json")):
                    continue
                try:
                    manifest = self._load(address)
                    for file in manifest.files:
                        self._read(manifest, file)
                except ArtifactError as error:
                    yield address, str(error)
                else:
                    yield address, None

    def find(self, text: str) -> Address:
        """The target, run or sweep whose id is `text` or, it alone, begins with it. A run is found without its target's id.

        Raises:
          InvalidInput: `text` begins no id, or no valid artifact's, or several.
        """
        if not re.fullmatch(r"(tgt|run|swp)_[0-9a-f]{0,16}", text):
            raise InvalidInput(
                f"An id is tgt_, run_ or swp_ and 16 hexadecimal digits or fewer; got {text!r}. `lambda-hat ls` lists the ids."
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

    def _addresses(self, kind: Kind) -> list[Address]:
        """Of everything that has a folder, published or not."""
        if kind == "sweep":
            return [sweep_address(sweep_id) for sweep_id in self._ids("sweeps", "swp")]
        target_ids = self._ids("targets", "tgt")
        if kind == "target":
            return [target_address(target_id) for target_id in target_ids]
        with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
            run_ids = list(pool.map(lambda target_id: self._ids(f"targets/{target_id}/runs", "run"), target_ids))
        pairs = zip(target_ids, run_ids, strict=True)
        return [Address(kind, run_id, target_id) for target_id, ids in pairs for run_id in ids]

    def _ids(self, folder: str, prefix: str) -> list[str]:
        try:
            paths = self._fs.ls(f"{self._root}/{folder}", detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = (path.rstrip("/").rsplit("/", 1)[-1] for path in paths)
        return sorted(name for name in names if ID_PATTERN.fullmatch(name) and name.startswith(prefix))

    def _load(self, address: Address) -> Manifest:
        path = self._path(address, "manifest.json")
        text = self._cat(path)
        if text is None:
            raise ArtifactError(
                f"An artifact is there once its manifest is; found none at {self._shown(path)}. "
                "Compute it, or list what is there with `lambda-hat ls`."
            )
        try:
            manifest = parse_manifest(text, address)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(
                f"A manifest must be whole, unedited and in its place; {self._shown(path)} is not: {error}. Compute it again."
            ) from error
        for file in manifest.files:
            path = self._file_path(manifest, file)
            try:
                found = f"{self._fs.info(path)['size']} bytes"
            except (FileNotFoundError, NotADirectoryError):
                found = "no file"
            if found != f"{file.size} bytes":
                raise ArtifactError(
                    f"Every file of an artifact must have the size its manifest says, {file.size} bytes; "
                    f"found {found} at {self._shown(path)}. Compute it again."
                )
        return manifest

    def _read(self, manifest: Manifest, file: StoredFile) -> bytes:
        path = self._file_path(manifest, file)
        data = self._cat(path)
        if data is None or len(data) != file.size or sha256(data) != file.sha256:
            found = "no file" if data is None else f"{len(data)} bytes with {sha256(data)}"
            raise ArtifactError(
                f"A file must be as its manifest says, {file.size} bytes with SHA-256 {file.sha256}; "
                f"found {found} at {self._shown(path)}. "
                f"Delete {self._shown(self._path(manifest.address, 'manifest.json'))} and compute it again."
            )
        return data

    def _file_path(self, manifest: Manifest, file: StoredFile) -> str:
        return self._path(manifest.address, "files", manifest.attempt, file.name)

    def _path(self, address: Address, *parts: str) -> str:
        return "/".join([self._root, address.folder, *parts])

    def _shown(self, path: str) -> str:
        return path if self._local else self._fs.unstrip_protocol(path)

    def _cat(self, path: str) -> bytes | None:
        """None: there is no such file."""
        try:
            return self._fs.cat_file(path)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def _put(self, path: str, data: bytes) -> None:
        """Writes or replaces a file in one step for its readers."""
        if not self._local:
            self._fs.pipe_file(path, data)
            return
        temporary = Path(f"{path}.{uuid.uuid4().hex}.tmp")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # or a power cut could keep the manifest and lose what it names
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
