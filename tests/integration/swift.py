"""A real S3 server on this machine: OpenStack Swift with its S3 interface, in an environment and a folder of its own.

with swift(folder) as server: ...  # server.endpoint_url, server.key, server.secret; server.kill(), server.start()
"""

from __future__ import annotations

import contextlib
import getpass
import http.client
import os
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path

from programs import free_ports

RELEASE = "swift==2.38.3"

#: Rings of one device each: `python -c RINGS FOLDER PORT PORT PORT`.
RINGS = """
import sys
from swift.common.ring import RingBuilder
for name, port in zip(("account", "container", "object"), sys.argv[2:]):
    builder = RingBuilder(4, 1, 1)
    builder.add_dev({"region": 1, "zone": 1, "weight": 1, "ip": "127.0.0.1", "port": int(port), "device": "d1"})
    builder.rebalance()
    builder.get_ring().save(f"{sys.argv[1]}/{name}.ring.gz")
"""

COMMON = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}
user = {user}
workers = 0
log_address = /dev/null
"""

STORAGE = """
devices = {folder}/srv
mount_check = false
disable_fallocate = true
recon_cache_path = {folder}
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
container_update_timeout = 30
"""

PROXY = """
[pipeline:main]
pipeline = catch_errors proxy-logging healthcheck listing_formats bulk s3api tempauth slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:proxy-logging]
use = egg:swift#proxy_logging
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:bulk]
use = egg:swift#bulk
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
"""


class NotInstallable(Exception):
    """pip cannot install Swift here."""


class Swift:
    """The four servers; what they hold survives `kill` and `start`."""

    key, secret = "test:tester", "testing"

    def __init__(self, folder: Path, programs: Path) -> None:
        self._folder, self._programs = folder, programs
        self._ports = dict(zip(("account", "container", "object", "proxy"), free_ports(4), strict=True))
        self._processes: list[subprocess.Popen[bytes]] = []
        self.endpoint_url = f"http://127.0.0.1:{self._ports['proxy']}"
        (folder / "srv" / "d1").mkdir(parents=True)
        (folder / "swift.conf").write_text(
            "[swift-hash]\nswift_hash_path_prefix = ci\nswift_hash_path_suffix = ci\n"
            "[storage-policy:0]\nname = p0\ndefault = yes\n"
        )
        for name, port in self._ports.items():
            text = COMMON + (PROXY if name == "proxy" else STORAGE)
            (folder / f"{name}.conf").write_text(text.format(name=name, port=port, folder=folder, user=getpass.getuser()))
        storage = [str(self._ports[name]) for name in ("account", "container", "object")]
        subprocess.run([programs / "python", "-c", RINGS, folder, *storage], check=True, env=self._environment())

    @property
    def options(self) -> dict[str, str]:
        """For s3fs."""
        return {"endpoint_url": self.endpoint_url, "key": self.key, "secret": self.secret}

    @property
    def environment(self) -> dict[str, str]:
        """The same as AWS's own variables."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def _environment(self) -> dict[str, str]:
        return os.environ | {"SWIFT_DIR": str(self._folder)}

    def start(self) -> None:
        """Returns once all answer."""
        for name in self._ports:
            log = (self._folder / f"{name}.log").open("ab")
            with log:
                self._processes.append(
                    subprocess.Popen(
                        [self._programs / f"swift-{name}-server", self._folder / f"{name}.conf"],
                        stdout=log, stderr=log, env=self._environment(), start_new_session=True,
                    )
                )  # fmt: skip
        deadline = time.monotonic() + 60
        for name, port in self._ports.items():
            while not _answers(port, needs_200=name == "proxy"):
                if time.monotonic() > deadline or any(process.poll() is not None for process in self._processes):
                    logs = "\n".join(path.read_text()[-2000:] for path in self._folder.glob("*.log"))
                    self.kill()
                    raise RuntimeError(f"Swift's {name} server does not answer on port {port}:\n{logs}")
                time.sleep(0.1)

    def kill(self) -> None:
        """By SIGKILL, as a machine that loses power."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._processes.clear()


@contextlib.contextmanager
def swift(folder: Path) -> Iterator[Swift]:
    """A running server whose files are in `folder`; Swift itself is installed there too, once.

    Raises:
      NotInstallable: pip cannot install it.
    """
    environment = folder / "environment"
    programs = environment / "bin"
    if not (programs / "swift-proxy-server").exists():
        venv.create(environment, with_pip=True)
        command = [programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", RELEASE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotInstallable(f"pip cannot install {RELEASE}: {done.stderr.strip().splitlines()[-1]}")
    server = Swift(folder / "server", programs)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def _answers(port: int, needs_200: bool) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/healthcheck")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return status == 200 or not needs_200


if __name__ == "__main__":  # a server to try things by hand, until Enter
    with swift(Path(sys.argv[1])) as running:
        print("\n".join(f"export {name}={value}" for name, value in running.environment.items()), flush=True)
        sys.stdin.readline()
