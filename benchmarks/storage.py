"""What the store costs on S3: `python benchmarks/storage.py`. Prints a Markdown table.

Uploads and downloads a target of 64 MiB through the store and by plain s3fs, in turns, against one S3 server on this machine
(OpenStack Swift, installed by pip into a temporary folder). The store writes a manifest and its checksums besides, and reads
them again; on a machine that read the target before, it comes from the cache.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
from results import table

from lambda_hat.store.manifest import target_address
from lambda_hat.store.store import Store

sys.path.append(str(Path(__file__).parent.parent / "tests" / "integration"))
from swift import swift

ADDRESSES = [target_address(f"tgt_{number:016x}") for number in range(100)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64, help="size of the target (default: 64)")
    parser.add_argument("--repeats", type=int, default=7, choices=range(1, len(ADDRESSES)), metavar="N", help="default: 7")
    options = parser.parse_args()
    data = os.urandom(options.mib << 20)
    with tempfile.TemporaryDirectory() as folder, swift(Path(folder)) as server:
        os.environ |= server.environment
        fs = fsspec.filesystem("s3", use_listings_cache=False)
        fs.mkdir("bucket")
        store, cached = Store("s3://bucket/store", cache=""), Store("s3://bucket/store", cache=f"{folder}/cache")
        times: dict[str, list[tuple[float, float]]] = {"upload": [], "download": [], "download again on this machine": []}
        for number in range(options.repeats + 1):
            address, path = ADDRESSES[number], f"bucket/plain/{number}"
            upload, plain_upload = _in_turns(
                number,
                functools.partial(store.publish, address, {"params.npz": data}, spec={}, summary={}),
                functools.partial(fs.pipe_file, path, data),
            )
            download, plain_download = _in_turns(
                number, functools.partial(store.read, address, "params.npz"), functools.partial(fs.cat_file, path)
            )
            cached.read(address, "params.npz")
            again = _seconds(functools.partial(cached.read, address, "params.npz"))
            if number:  # the first warms up connections and the server
                measured = (upload, plain_upload), (download, plain_download), (again, plain_download)
                for name, pair in zip(times, measured, strict=True):
                    times[name].append(pair)
    rows = []
    for name, pairs in times.items():
        ours, plain_s3fs = (statistics.median(each) for each in zip(*pairs, strict=True))
        ratio = statistics.median(mine / theirs for mine, theirs in pairs)
        rows.append([name, f"{options.mib / ours:.0f} MiB/s", f"{options.mib / plain_s3fs:.0f} MiB/s", f"{ratio:.2f}"])
    print(table([f"{options.mib} MiB", "store", "plain s3fs", "time, store over s3fs"], rows))
    return 0


def _in_turns(number: int, ours: Callable[[], object], plain: Callable[[], object]) -> tuple[float, float]:
    """Seconds of both; which goes first changes from number to number."""
    if number % 2:
        seconds = _seconds(ours)
        return seconds, _seconds(plain)
    seconds = _seconds(plain)
    return _seconds(ours), seconds


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
