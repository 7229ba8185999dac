"""A Slurm of one node on this machine, for tests: munged, slurmctld and slurmd on private ports, from a private folder."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from programs import free_ports

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch")

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """The programs that are not installed, as text; empty where all are."""
    return ", ".join(name for name in PROGRAMS if shutil.which(name, path=_path()) is None)


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


@contextlib.contextmanager
def running(folder: Path) -> Iterator[dict[str, str]]:
    """Yields the environment in which sbatch, squeue and scancel talk to it; at the end all of it is gone."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)  # or munged refuses its socket's folder
    host = socket.gethostname().split(".")[0]
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(host=host, folder=folder, user=getpass.getuser(), ports=free_ports(2)))
    environment = os.environ | {"PATH": _path(), "SLURM_CONF": str(configuration)}

    def call(*command: str) -> None:
        subprocess.run(command, env=environment, check=True, capture_output=True, text=True)

    key, socket_file = folder / "munge.key", folder / "munge.socket"
    try:
        call("mungekey", "--create", f"--keyfile={key}")
        call(
            "munged", "--force", f"--key-file={key}", f"--socket={socket_file}", f"--pid-file={folder}/munged.pid",
            f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed",
        )  # fmt: skip
        call("slurmctld", "-f", str(configuration))
        call("slurmd", "-f", str(configuration))
        _wait_until_idle(environment, folder)
        yield environment
    finally:
        for name in ("slurmd", "slurmctld", "munged"):
            _stop(folder / f"{name}.pid")


def _wait_until_idle(environment: dict[str, str], folder: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        shown = subprocess.run(
            ["timeout", "1", "sinfo", "-h", "-o", "%T"], env=environment, check=False, capture_output=True, text=True
        )
        if shown.stdout.strip() == "idle":
            return
        time.sleep(0.2)
    logs = "\n".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
    raise RuntimeError(f"Slurm did not start: {shown.stdout}{shown.stderr}\n{logs}")


def _stop(pid_file: Path) -> None:
    with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
        pid = int(pid_file.read_text())
        os.kill(pid, 15)
        for _ in range(100):
            os.kill(pid, 0)  # until there is none
            time.sleep(0.1)
        os.kill(pid, 9)
