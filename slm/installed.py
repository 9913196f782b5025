"""Which versions are installed here, and how they stand to what setup.cfg allows and constraints.txt has tested.

Owns the reading of both files and of this clone's own code. Imports no torch, and no package that it tells the version of.

    facts()["torch"]            # "2.13.0", or "" where it is not installed
    for package in packages():  # of setup.cfg
        print(package.name, package.installed, package.allowed, package.tested)
"""

from __future__ import annotations

import configparser
import hashlib
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from slm import __version__

ROOT = Path(__file__).resolve().parents[1]

# What two machines of one run must have in common: the numbers of a run, or whether it can start, depend on them.
SHARED = ("python", "slm", "slm code", "torch", "deepspeed", "numpy", "safetensors", "tokenizers")


@dataclass(frozen=True)
class Package:
    name: str
    installed: str  # "" if it is not
    allowed: SpecifierSet  # by setup.cfg
    tested: str  # by constraints.txt; "" if it is not there, or not for this Python

    @property
    def is_allowed(self) -> bool:
        # A build's own label (2.13.0+cu130) is not a version that a range excludes.
        return bool(self.installed) and self.allowed.contains(self.installed.partition("+")[0], prereleases=True)


def facts() -> dict[str, str]:
    """The versions of SHARED, as they are here."""
    own = {"python": platform.python_version(), "slm": __version__, "slm code": code_hash()}
    return {name: own.get(name) or _version(name) for name in SHARED}


def code_hash() -> str:
    """Of every module of slm in this clone: two machines with the same number may have different branches."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "slm").rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def packages() -> list[Package]:
    """What setup.cfg requires; empty where this is no clone but an installed package."""
    setup = configparser.ConfigParser()
    if not setup.read(ROOT / "setup.cfg"):
        return []
    tested = _tested()
    required = [Requirement(line) for line in setup["options"]["install_requires"].split("\n") if line]
    return [Package(r.name, _version(r.name), r.specifier, tested.get(r.name.lower(), "")) for r in required]


def _tested() -> dict[str, str]:
    try:
        lines = (ROOT / "constraints.txt").read_text().splitlines()
    except OSError:
        return {}
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {
        pin.name.lower(): next(iter(pin.specifier)).version
        for pin in pins
        if pin.marker is None or pin.marker.evaluate()
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
