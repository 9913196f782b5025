"""DeepSpeed's operators that are compiled on first use: in which folder, by whom, and what a killed build leaves.

Owns the folder and its lock; which operators a run wants is engine.py's, and which DeepSpeed would compile for nothing
(deepspeed_shm_comm) parallel.py's.

    load(CPUAdamBuilder(), "CPU Adam")

torch marks a build under way by a file that a killed one leaves behind, on which every later process would wait for
ever and without a word. So whoever loads an operator holds a lock that the kernel frees, and clears such files.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import platform
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import cpuinfo

from slm.errors import EnvironmentProblem

log = logging.getLogger("slm")

_SILENT_SECONDS = 3.0  # others wait so long before they say for whom
_SECONDS_BETWEEN_LINES = 60.0


def folder() -> Path:
    """Where compiled operators of exactly this environment live, in TORCH_EXTENSIONS_DIR or the user's cache: for other
    versions or CPUs it is another folder. Tells torch."""
    flags = next((x for x in _cpuinfo() if x.startswith("flags")), platform.processor())
    identity = [version("torch"), version("deepspeed"), platform.python_version(), flags, _ninja()]
    key = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    given = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "slm" / "torch_extensions")
    path = given if given.name == key else given / key  # else a process that we started would go one deeper
    os.environ["TORCH_EXTENSIONS_DIR"] = str(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


@cache
def _ninja() -> str:
    """The version of the ninja that torch will call: one builds anew what another has built."""
    try:
        return subprocess.run(["ninja", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def load(builder: Any, title: str) -> Any:
    """The operator of one of DeepSpeed's builders; compiled first if this machine has not yet, which it says.

    One process at a time; the others say for whom they wait. Raises EnvironmentProblem if the compiler fails.
    """
    home = folder()
    with open(home / "build.lock", "a+") as lock:
        _take(lock, title)
        for stale in home.glob("*/lock"):  # whoever builds holds our lock, and that is us
            log.warning("a build in %s was killed; it is done again", stale.parent)
            stale.unlink()
        built = any(home.glob(f"{builder.name}/*.so"))
        if not built:
            log.warning("compiling DeepSpeed's %s, once for this machine: 1 to 4 minutes (%s)", title, home)
        try:
            with _cpu_asked_once():
                operator = builder.load(verbose=False)
        except Exception as error:
            raise EnvironmentProblem(
                f"DeepSpeed's {title} could not be compiled: {str(error).strip().splitlines()[-1]}",
                fix="install a C++ compiler and ninja (apt-get install g++ ninja-build), or take a ds_configs file that "
                "does not need it",
            ) from error
        if not built:
            log.warning("compiled")
        return operator


@contextmanager
def _cpu_asked_once() -> Iterator[None]:
    """DeepSpeed asks py-cpuinfo twice (op_builder/builder.py, cpu_arch and simd_width), which each time starts a process that
    measures the clock for a second."""
    ask = cpuinfo.get_cpu_info
    cpuinfo.get_cpu_info = cache(ask)
    try:
        yield
    finally:
        cpuinfo.get_cpu_info = ask


def _take(lock: IO[str], title: str) -> None:
    began = said = time.monotonic()
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            now = time.monotonic()
            if now - began > _SILENT_SECONDS and (said == began or now - said > _SECONDS_BETWEEN_LINES):
                said = now
                log.warning(
                    "waiting since %.0f s for %s, which compiles DeepSpeed's operators (%s)",
                    now - began, _holder(lock), lock.name,
                )  # fmt: skip
            time.sleep(0.1)
        except OSError as error:  # some network file systems have no locks
            log.warning("%s cannot be locked (%s): start no second run while this one compiles", lock.name, error)
            break
    lock.truncate(0)
    lock.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "operator": title}))
    lock.flush()


def _holder(lock: IO[str]) -> str:
    lock.seek(0)
    try:
        holder = json.loads(lock.read())
        return f"process {holder['pid']} on host {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
