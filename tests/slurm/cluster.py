"""A real SLURM on this machine: a controller and two nodes of Debian's packages, under a configuration of their own.

Owns its start and end. Needs root (munged runs as its own user, slurmd as root) and the packages slurm-wlm and munge.

    with Cluster(folder) as cluster:
        print(cluster.run("sinfo").stdout)
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
START_SECONDS = 120.0

# Two nodes on one host: Debian's slurmd is built for it. Accounting needs a database, so there is none. A job of partition
# `low` gives way to one of `high`, is told so by SIGTERM, and is put back into the queue; KillWait is for its last save.
CONFIGURATION = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=1
ReturnToService=2
SlurmctldPort={controller_port}
SlurmdParameters=config_overrides
JobRequeue=1
KillWait=60
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first_port}-{second_port}] CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
PartitionName=low Nodes=node[1-2] PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 MaxTime=INFINITE State=UP
PartitionName=high Nodes=node[1-2] PriorityTier=9 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no cluster here; empty if there can."""
    if os.geteuid() != 0:
        return "starting a SLURM needs root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"{', '.join(absent)} not installed (apt-get install slurm-wlm munge)" if absent else ""


class Cluster:
    """environment: of commands that are to speak to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        for name in ("state", "spool-node1", "spool-node2", "munge"):
            (self.folder / name).mkdir(parents=True)
        self._start_munge()
        host = socket.gethostname().partition(".")[0]
        ports = dict(zip(("controller_port", "first_port", "second_port"), _free_ports(), strict=True))
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, folder=self.folder, **ports))
        self._daemon("slurmctld")
        for node in ("node1", "node2"):
            self._daemon("slurmd", "-N", node)
        self.wait_until(lambda: self.run("sinfo", "-h", "-p", "main", "-o", "%T %D").stdout.split() == ["idle", "2"])

    def _start_munge(self) -> None:
        munge = self.folder / "munge"
        for parent in (munge, *munge.parents):  # munged refuses a socket that not all can reach
            if parent.stat().st_uid == os.geteuid():
                parent.chmod(parent.stat().st_mode | 0o011)
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o400)
        options = (f"--key-file={munge}/key", f"--socket={munge}/socket", f"--pid-file={munge}/pid")
        self._daemon("munged", "--force", *options, f"--log-file={munge}/log", f"--seed-file={munge}/seed")

    def _daemon(self, *command: str) -> None:
        """Each goes into the background by itself and leaves its pid."""
        done = subprocess.run(command, env=self.environment, stderr=subprocess.PIPE, text=True, timeout=START_SECONDS)
        assert done.returncode == 0, f"{command}: {done.stderr}"

    def run(self, *command: str, check: bool = True, **more) -> subprocess.CompletedProcess[str]:
        """A command that speaks to the cluster; its output is text."""
        env = {**self.environment, **more.pop("env", {})}
        return subprocess.run(command, env=env, check=check, capture_output=True, text=True, timeout=120, **more)

    def wait_until(self, condition, seconds: float = START_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain\n{self.told()}"
            time.sleep(0.2)

    def told(self) -> str:
        """What a failed test needs to see."""
        logs = [f"{path}:\n{path.read_text()[-2000:]}" for path in self.folder.glob("*.log")]
        return "\n".join([*logs, self.run("scontrol", "show", "job", check=False).stdout])

    def __exit__(self, *error: object) -> None:
        """Every job, then every daemon."""
        if (self.folder / "slurmctld.pid").exists():
            self.run("scancel", "--quiet", "-u", "root", "--signal=KILL", "--full", check=False)
            self.run("scancel", "--quiet", "-u", "root", check=False)
        pids = [*self.folder.glob("*.pid"), self.folder / "munge" / "pid"]
        found = [
            psutil.Process(int(p.read_text())) for p in pids if p.exists() and psutil.pid_exists(int(p.read_text()))
        ]
        for process in found:
            process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(found, timeout=20)
        steps = [p for p in psutil.process_iter() if _belongs(p, str(self.folder))]
        for process in [*alive, *steps]:
            process.kill()


def _belongs(process: psutil.Process, folder: str) -> bool:
    try:
        return process.pid != os.getpid() and process.environ().get("SLURM_CONF", "").startswith(folder)
    except psutil.Error:
        return False


def _free_ports() -> tuple[int, int, int]:
    """For the controller, and two in a row for the nodes."""
    for first in range(17001, 18000, 2):
        with socket.socket() as one, socket.socket() as two, socket.socket() as three:
            try:
                one.bind(("127.0.0.1", first))
                two.bind(("127.0.0.1", first + 1))
                three.bind(("127.0.0.1", 0))
            except OSError:
                continue
            return three.getsockname()[1], first, first + 1
    raise AssertionError("no free ports")
