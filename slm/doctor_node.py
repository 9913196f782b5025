"""What one machine has for a run: each check measures something, says what it found, and what would mend it.

Owns the checks that need no other rank. Imports torch only in children (`apart`), so that no measurement can hang or upset
the doctor itself. Joining and printing are doctor.py's; what is between ranks, doctor_ranks.py's.

    for check in look(Path("runs")):
        print(check.name, check.state, check.measured, check.fix)
"""

from __future__ import annotations

import ctypes
import fcntl
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from slm import installed
from slm.memory import STATE_BYTES

OK: Literal["ok"] = "ok"
WARNING: Literal["warning"] = "warning"
WRONG: Literal["wrong"] = "wrong"

_GIB = 2**30
_TRIED_BYTES = 256 * 2**20  # written and read to know a disk
_BLOCK_BYTES = 4 * 2**20
_FEW_FILES = 4096  # open at once: shards, workers, sockets of every pair of ranks
_SMALL_SHM_BYTES = _GIB  # NCCL's and data workers' buffers; 64 MiB is Docker's default
_LITTLE_DISK_BYTES = 10 * _GIB
_SLOW_LOOKUP_SECONDS = 1.0


@dataclass
class Check:
    name: str
    state: Literal["ok", "warning", "wrong"]
    measured: str
    fix: str = ""
    values: dict[str, Any] = field(default_factory=dict)  # the same for programs; units in the names


def apart(seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) in a child, which is killed after so many seconds: TimeoutError. What it raises is raised as
    RuntimeError, with its text. By fork: what is imported stays so; no CUDA and no process group may be here before."""
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe(duplex=False)

    def child() -> None:
        with suppress(OSError, AttributeError):  # dies with its parent, where there is prctl(2)
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        try:
            outcome = (True, function(*arguments))
        except BaseException as error:
            outcome = (False, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
        its.send(outcome)
        its.close()
        os._exit(0)  # a process group that waits for its peers' end would hold it

    process = context.Process(target=child, daemon=True)
    process.start()
    its.close()
    try:
        if not mine.poll(seconds):
            raise TimeoutError(f"no result in {seconds:.0f} s")
        succeeded, result = mine.recv()
    except EOFError:
        process.join(5)
        raise RuntimeError(f"the process that tried it ended with code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        mine.close()
    if not succeeded:
        raise RuntimeError(result)
    return result


def look(folder: Path) -> list[Check]:
    """Every check of this machine; folder: where runs are written, made if it is not there."""
    checks = [versions(), compiler(), *gpus(), *limits(), memory(), shared_memory()]
    return [*checks, host_name(), ports(), *disk(folder)]


# --- software ------------------------------------------------------------------------------------------------


def versions() -> Check:
    packages = installed.packages()
    values = installed.facts()
    if not packages:
        return Check("versions", WARNING, "setup.cfg is not here to compare with", "run it from the clone", values)
    told = f"Python {values['python']}, torch {values['torch'] or 'none'}, deepspeed {values['deepspeed'] or 'none'}"
    if bad := [p for p in packages if not p.is_allowed]:
        listed = ", ".join(f"{p.name} {p.installed or 'is missing'} ({p.allowed})" for p in bad)
        return Check("versions", WRONG, f"{told}; {listed}", "pip install -c constraints.txt -e .", values)
    untested = [p for p in packages if p.tested and p.installed.partition("+")[0] != p.tested]
    if untested:
        listed = ", ".join(f"{p.name} {p.installed} (tested: {p.tested})" for p in untested)
        return Check("versions", WARNING, f"{told}; allowed, but not tested: {listed}", "see constraints.txt", values)
    return Check("versions", OK, f"{told}; {len(packages)} packages as in setup.cfg and constraints.txt", "", values)


def compiler() -> Check:
    """By compiling: a compiler without its headers is none. torch.compile and DeepSpeed's operators want it."""
    name = os.environ.get("CXX", "c++")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    fix = "apt-get install g++ ninja-build python3-dev (torch.compile and offload need them; other runs do not)"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "tried.cpp"
        source.write_text("#include <vector>\nint main() { return std::vector<int>(3).size() - 3; }\n")
        try:
            began = time.monotonic()
            subprocess.run([name, "-fopenmp", str(source), "-o", f"{folder}/tried"], check=True, capture_output=True)
            subprocess.run([f"{folder}/tried"], check=True)
            seconds = time.monotonic() - began
            ninja = subprocess.run(["ninja", "--version"], check=True, capture_output=True, text=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", b"") or str(error).encode()
            text = said.decode(errors="replace") if isinstance(said, bytes) else said
            return Check("compiler", WARNING, text.strip().splitlines()[0], fix)
    if not headers.exists():
        return Check("compiler", WARNING, f"{name} compiles, ninja {ninja}; {headers} is missing", fix)
    return Check(
        "compiler", OK, f"{name} compiled and ran a program in {seconds:.1f} s; ninja {ninja}; Python.h is there"
    )


def operators(zero_sections: list[dict[str, Any]]) -> Check:
    """Builds, as a run would, what these "zero_optimization" sections need; without any, says what stands built."""
    from slm import operators as compiled

    home = compiled.folder()
    if not zero_sections:
        built = sorted({path.parent.name for path in home.glob("*/*.so")})
        return Check(
            "DeepSpeed operators", OK, f"compiled in {home}: {', '.join(built) or 'none, and none is asked for'}"
        )
    from slm.engine import build_operators

    began = time.monotonic()
    try:
        for zero in zero_sections:
            apart(900, build_operators, zero)
    except (RuntimeError, TimeoutError) as error:
        return Check(
            "DeepSpeed operators", WRONG, str(error), "apt-get install g++ ninja-build, or a JSON without offload"
        )
    return Check("DeepSpeed operators", OK, f"those of the recipe load ({time.monotonic() - began:.1f} s), from {home}")


# --- devices -------------------------------------------------------------------------------------------------

_QUERY = {
    "name": "name",
    "driver": "driver_version",
    "total_mib": "memory.total",
    "used_mib": "memory.used",
    "ecc_errors": "ecc.errors.uncorrected.volatile.total",
    "celsius": "temperature.gpu",
    "throttled": "clocks_event_reasons.active",
}
_OLDER_QUERY = _QUERY | {"throttled": "clocks_throttle_reasons.active"}  # its name before driver 535
# Reasons that are no fault: idle, clocks asked for by applications, and the usual power cap (nvml.h).
_HARMLESS_THROTTLING = 0x1 | 0x2 | 0x4 | 0x100


def gpus() -> list[Check]:
    """What nvidia-smi says of each GPU: none where there is no nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return [Check("GPUs", OK, "no nvidia-smi here: a CPU machine", "", {"num_gpus": 0})]
    try:
        try:
            rows = _nvidia_smi("gpu", list(_QUERY.values()))
        except subprocess.CalledProcessError:
            rows = _nvidia_smi("gpu", list(_OLDER_QUERY.values()))
        busy = _nvidia_smi("compute-apps", ["pid", "used_memory"])
    except (OSError, subprocess.SubprocessError) as error:
        return [Check("GPUs", WRONG, f"nvidia-smi fails: {_said(error)}", "see whether the driver is loaded (dmesg)")]
    checks = []
    for number, row in enumerate(rows):
        found: dict[str, Any] = dict(zip(_QUERY, row, strict=True))
        told = f"{found['name']}, driver {found['driver']}, {found['used_mib']} of {found['total_mib']} MiB used, "
        told += f"{found['celsius']} °C, uncorrected ECC errors {found['ecc_errors']}"
        throttled = int(found["throttled"], 16) & ~_HARMLESS_THROTTLING if found["throttled"].startswith("0x") else 0
        state, fix = OK, ""
        if found["ecc_errors"].isdigit() and int(found["ecc_errors"]):
            state, fix = WRONG, "take this GPU out of service: its memory returns wrong bits"  # type: ignore[assignment]
        elif throttled:
            told += f", clocks held back (0x{throttled:x})"
            state, fix = WARNING, "see nvidia-smi -q -d PERFORMANCE: heat or power"  # type: ignore[assignment]
        checks.append(Check(f"GPU {number}", state, told, fix, found))
    if busy:
        listed = ", ".join(f"process {pid} with {used}" for pid, used in busy)
        checks.append(Check("GPUs in use", WARNING, listed, "end what is not yours to keep, or take other GPUs"))
    return checks


def _said(error: Exception) -> str:
    output = f"{getattr(error, 'stdout', '') or ''}{getattr(error, 'stderr', '') or ''}".strip()
    return output.splitlines()[0] if output else str(error)


def _nvidia_smi(what: str, fields: list[str]) -> list[list[str]]:
    words = ["nvidia-smi", f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"]
    said = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout
    return [[cell.strip() for cell in line.split(",")] for line in said.splitlines() if line.strip()]


# --- what the system allows ----------------------------------------------------------------------------------


def limits() -> list[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fix = f"ulimit -n {hard if 0 < hard < 1 << 20 else 65536} (limits.conf, or LimitNOFILE of the service)"
    files = Check("open files", OK if soft >= _FEW_FILES or soft < 0 else WARNING, f"{_size(soft)} allowed", fix)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    has_infiniband = any(Path("/sys/class/infiniband").glob("*"))
    told = (
        f"{'unlimited' if locked < 0 else f'{locked / 2**20:.0f} MiB'}; InfiniBand: {'yes' if has_infiniband else 'no'}"
    )
    short = locked >= 0 and has_infiniband
    pinned = Check(
        "locked memory", WARNING if short else OK, told, "ulimit -l unlimited: InfiniBand registers its buffers"
    )
    core, _ = resource.getrlimit(resource.RLIMIT_CORE)
    dumps = Check("core dumps", OK, "off" if core == 0 else f"up to {_size(core)} bytes")
    for check in (files, pinned, dumps):
        if check.state == OK:
            check.fix = ""
    return [files, pinned, dumps]


def _size(value: int) -> str:
    return "unlimited" if value < 0 else f"{value:,}"


def memory() -> Check:
    found = psutil.virtual_memory()
    load, cores = (
        os.getloadavg()[0],
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    )
    told = f"{found.available / _GIB:.1f} of {found.total / _GIB:.1f} GiB free; {cores} cores, load {load:.1f}"
    values = {"available_bytes": found.available, "total_bytes": found.total, "cores": cores, "load": load}
    if found.available < 2 * _GIB:
        return Check(
            "memory",
            WARNING,
            told,
            "end what else runs here",
            values,
        )
    if load > 2 * (cores or 1):
        return Check("memory", WARNING, told, "something else runs here, and every rank waits for the slowest", values)
    return Check("memory", OK, told, "", values)


def shared_memory() -> Check:
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError as error:
        return Check("/dev/shm", WARNING, str(error), "mount it: NCCL and data workers exchange through it")
    told = f"{free / _GIB:.2f} GiB free"
    if free < _SMALL_SHM_BYTES:
        return Check("/dev/shm", WARNING, told, "docker run --shm-size=8g, or --ipc=host", {"free_bytes": free})
    return Check("/dev/shm", OK, told, "", {"free_bytes": free})


def host_name() -> Check:
    """What gloo announces to the others unless it is told an interface: the address of the host's own name."""
    name, began = socket.gethostname(), time.monotonic()
    try:
        addresses = sorted({entry[4][0] for entry in socket.getaddrinfo(name, None)})
        told = f"{name} is {', '.join(map(str, addresses))}"
    except OSError as error:
        addresses, told = [], f"{name} has no address ({error.strerror})"
    try:
        back = socket.gethostbyaddr(str(addresses[0]))[0] if addresses else ""
    except OSError:
        back = ""
    seconds = time.monotonic() - began
    told += f"; back: {back or 'no name'}; {seconds:.2f} s"
    values = {"host": name, "addresses": addresses, "seconds": seconds}
    if seconds > _SLOW_LOOKUP_SECONDS:
        fix = "mend DNS, or put every node into /etc/hosts: ranks look each other up when they meet"
        return Check("host name", WARNING, told, fix, values)
    if not addresses and not os.environ.get("GLOO_SOCKET_IFNAME"):
        fix = "put it into /etc/hosts, or set GLOO_SOCKET_IFNAME to the interface that the other nodes reach"
        return Check("host name", WARNING, told, fix, values)
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        told += f"; GLOO_SOCKET_IFNAME {os.environ['GLOO_SOCKET_IFNAME']}"
    return Check("host name", OK, told, "", values)


def ports() -> Check:
    """Ranks listen on ports that the system chooses: one is listened on, and reached."""
    try:
        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                pass
        low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    except OSError as error:
        return Check(
            "ports", WRONG, f"none can be listened on: {error}", "see the firewall, or the container's network"
        )
    return Check("ports", OK, f"listened on {port} and reached it; the system chooses from {low} to {high}")


# --- where runs are written ----------------------------------------------------------------------------------


def disk(folder: Path) -> list[Check]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as scratch:
            free = shutil.disk_usage(scratch).free
            return [
                _free_space(folder, free),
                _throughput(Path(scratch), free),
                _rename(Path(scratch)),
                _lock(Path(scratch)),
            ]
    except OSError as error:
        fix = "give runs another folder: output in the recipe, or --folder"
        return [Check("run folder", WRONG, f"{folder}: {error.strerror}", fix)]


def _free_space(folder: Path, free: int) -> Check:
    told = f"{free / _GIB:.1f} GiB free in {folder.absolute()}"
    if free < _LITTLE_DISK_BYTES:
        return Check(
            "disk", WARNING, told, f"free space: a checkpoint has {STATE_BYTES} bytes a parameter", {"free_bytes": free}
        )
    return Check("disk", OK, told, "", {"free_bytes": free})


def _throughput(folder: Path, free: int) -> Check:
    """Written with fsync; read after the pages were dropped, as far as the kernel follows that advice."""
    num_blocks = max(1, min(_TRIED_BYTES, free // 20) // _BLOCK_BYTES)
    block, path = os.urandom(_BLOCK_BYTES), folder / "throughput"
    began = time.monotonic()
    with open(path, "wb") as file:
        for _ in range(num_blocks):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        wrote = time.monotonic() - began
    began = time.monotonic()
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.monotonic()
        same = all(file.read(_BLOCK_BYTES) == block for _ in range(num_blocks))
        read = time.monotonic() - began
    path.unlink()
    num_bytes = num_blocks * _BLOCK_BYTES
    told = f"{num_bytes >> 20} MiB written at {num_bytes / wrote / 1e6:.0f} MB/s (with fsync), "
    told += f"read at {num_bytes / read / 1e6:.0f} MB/s"
    values = {"write_bytes_per_second": num_bytes / wrote, "read_bytes_per_second": num_bytes / read}
    if not same:
        return Check(
            "disk speed", WRONG, f"{told}; what was read is not what was written", "do not use this disk", values
        )
    return Check("disk speed", OK, told, "", values)


def _rename(folder: Path) -> Check:
    """A name is taken over by a rename: whoever opens it meanwhile finds one whole file or the other."""
    path, other = folder / "name", folder / "other"
    path.write_text("old")
    other.write_text("new")
    held = open(path)  # noqa: SIM115 - of the file that loses its name
    try:
        os.replace(other, path)
        if path.read_text() != "new" or held.read() != "old" or other.exists():
            return Check("rename", WRONG, "a rename does not replace a file at once", "give runs another file system")
    finally:
        held.close()
    return Check("rename", OK, "replaces a file at once, and who had it open reads on")


def _lock(folder: Path) -> Check:
    fix = "give runs a file system with locks (NFS 4, Lustre with -o flock): two jobs could write into one run"
    with open(folder / "lock", "w") as first, open(folder / "lock", "w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return Check("flock", WARNING, str(error), fix)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Check("flock", OK, "a second lock is refused")
    return Check("flock", WRONG, "two locks on one file were both given", fix)
