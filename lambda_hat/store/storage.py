"""The storage below a store: one folder of any fsspec filesystem; its files appear whole, its errors say what to do."""

from __future__ import annotations

import functools
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from lambda_hat.specs.spec import InvalidInput
from lambda_hat.store.manifest import StoreUnavailable

_S3 = ("s3://", "s3a://")
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)

T = TypeVar("T")


class Storage:
    """Files below one URI; paths are the filesystem's own and begin with `root`. S3 is asked once here, before any work.

    uri: as people write it, absolute. local: whether it is a folder of this machine.

    Every method raises StoreUnavailable where the storage fails.

    Raises:
      InvalidInput: the URI is empty or names no folder, its protocol or one of the options is unknown, or the package for it is
        not installed.
      StoreUnavailable: S3 does not answer, refuses the credentials, or has no such bucket.
    """

    def __init__(self, uri: str, options: dict[str, Any]) -> None:
        if not uri.strip() or uri.endswith("://"):
            raise InvalidInput(
                f"A store's URI names a folder; got {uri!r}: use a path like ./artifacts, or s3://bucket/folder."
            )
        try:
            self._fs, path = url_to_fs(uri, **_with_defaults(uri, options))
            self.local = isinstance(self._fs, LocalFileSystem)
            self.root = path.rstrip("/")
            self.uri: str = self.shown(self.root)
            if uri.startswith(_S3):
                self._check_access(url_to_fs(uri, **_with_defaults(uri, options, retries=1))[0])
        except (ValueError, ImportError, TypeError, KeyError) as error:
            raise InvalidInput(
                f"A store's URI must be one fsspec can open with its options; got {uri!r}: {error}. "
                "Use a local path or s3://bucket/folder, correct [store.options], or install the package the message names."
            ) from error
        if self.local and self._call(os.path.exists, path) and not os.path.isdir(path):
            raise InvalidInput(f"A local store is a folder; got {uri!r}, which is a file: name another path.")

    def shown(self, path: str) -> str:
        return path if self.local else self._fs.unstrip_protocol(path)

    def read(self, path: str) -> bytes | None:
        """None: there is no such file."""
        try:
            return self._call(self._fs.cat_file, path)
        except _ABSENT:
            return None

    def write(self, path: str, data: bytes) -> None:
        """Writes or replaces a file in one step for its readers."""
        try:
            if self.local:
                self._call(write_file, Path(path), data)
            else:
                self._call(self._fs.pipe_file, path, data)
        except _ABSENT as error:  # no bucket, or a file where a folder is needed
            raise self._unavailable(error) from error

    def check_writable(self) -> None:
        """Raises InvalidInput or StoreUnavailable where nothing can be written below the root. Leaves nothing behind, no empty
        folder either: a folder that is not there yet is tried where it would be made."""
        if not self.local:
            probe = f"{self.root}/.probe-{uuid.uuid4().hex}"
            self.write(probe, b"")
            self.remove(probe, [probe])
            return
        try:
            folder = next(folder for folder in (Path(self.root), *Path(self.root).parents) if os.path.lexists(folder))
            if not folder.is_dir():
                raise InvalidInput(
                    f"A local store is a folder; got {self.root!r}, but {folder} is no folder: name another path."
                )
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"0")
        except OSError as error:
            raise self._unavailable(error) from error

    def remove(self, path: str, files: Iterable[str]) -> None:
        """A file, or a folder and the files in it."""
        if self.local:
            self._call(self._fs.rm, path, recursive=True)
        else:
            for file in files:  # `rm` would take a * or [ in the store's own name for a pattern
                self._call(self._fs.rm_file, file)

    def sizes(self, paths: Sequence[str]) -> list[int | None]:
        """None: there is no such file."""
        try:
            return self._call(self._fs.sizes, list(paths))
        except _ABSENT:
            return [self._size(path) for path in paths]

    def _size(self, path: str) -> int | None:
        try:
            return self._call(self._fs.size, path)
        except _ABSENT:
            return None

    def modified(self, path: str) -> datetime:
        """Raises FileNotFoundError."""
        return self._call(self._fs.modified, path)

    def names(self, folder: str) -> list[str]:
        """Of what is in a folder; none where there is no such folder."""
        try:
            paths = self._call(self._fs.ls, folder, detail=False)
        except _ABSENT:
            return []
        return [path.rstrip("/").rsplit("/", 1)[-1] for path in paths]

    def files(self) -> list[str]:
        """All files below the root."""
        return self._call(self._fs.find, self.root)

    def uploads(self) -> Iterator[tuple[str, datetime, Callable[[], Any]]]:
        """Uploads to S3 below the root that nobody finished: how they are shown, when they were begun, what ends them."""
        if not self.uri.startswith(_S3):
            return
        bucket, _, prefix = self.root.partition("/")
        for upload in self._call(self._fs.list_multipart_uploads, bucket):
            key, number = upload["Key"], upload["UploadId"]
            if key.startswith(f"{prefix}/" if prefix else ""):
                abort = functools.partial(self._call, self._fs.abort_mpu, bucket, key, number)
                yield f"s3://{bucket}/{key}, upload {number}", upload["Initiated"], abort

    def _check_access(self, probe: AbstractFileSystem) -> None:
        """A missing bucket would look like an empty store."""
        bucket, _, prefix = self.root.partition("/")
        probe.retries = 1  # s3fs's own, around those of botocore
        try:
            self._call(probe.call_s3, "list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)
        except FileNotFoundError as error:
            raise self._unavailable(error) from error

    def _call(self, operation: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """What an operation of the filesystem returns. "Not there" is no failure and passes."""
        try:
            return operation(*arguments, **options)
        except (*_ABSENT, TypeError, ValueError):
            raise
        except Exception as error:  # each filesystem has its own, which need not be OSErrors
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        kind = type(error).__name__
        if self.local:
            remedy = "Check the folder's permissions and the space on its disk, or name another folder."
        elif isinstance(error, PermissionError) or "Credential" in kind or "Profile" in kind or "Token" in kind:
            remedy = (
                "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or key and secret in [store.options], "
                "that they may list, read and write there, and the endpoint."
            )
        elif isinstance(error, FileNotFoundError) or kind == "ParamValidationError":
            bucket = self.root.partition("/")[0]
            remedy = f"Correct the bucket's name or the endpoint, or make the bucket: aws s3 mb s3://{bucket}."
        else:
            remedy = (
                "Check the network, endpoint and region (AWS_ENDPOINT_URL, AWS_DEFAULT_REGION, or endpoint_url in "
                "[store.options]), and call again: what is finished is kept."
            )
        what = " ".join(str(error).split()).rstrip(".") or kind
        return StoreUnavailable(f"The storage of a store must answer and grant access; {self.uri} does not: {what}. {remedy}")


def _with_defaults(uri: str, options: dict[str, Any], retries: int = 5) -> dict[str, Any]:
    """Options of the filesystem. The cache of listings would hide what other processes publish. On S3, short timeouts and, with
    pauses that grow to 16 s, retries that outlast a server's restart, unless the options or AWS's variables ask for others."""
    options = options | {"use_listings_cache": False}
    if uri.startswith(_S3):
        config: dict[str, Any] = {"connect_timeout": 3, "read_timeout": 20}
        if not {"AWS_RETRY_MODE", "AWS_MAX_ATTEMPTS"} & os.environ.keys():
            config["retries"] = {"mode": "standard", "max_attempts": retries}
        options["config_kwargs"] = config | options.get("config_kwargs", {})
    return options


def write_file(path: Path, data: bytes) -> None:
    """Writes or replaces a local file in one step for its readers."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
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
