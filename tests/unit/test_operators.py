"""operators.py: compiled operators in a folder of their environment, behind one lock; what a killed build leaves."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slm import operators

ROOT = Path(__file__).parents[2]

# A builder like DeepSpeed's, over torch's real loader, of an operator so small that its compiler is a moment's work.
BUILDER = """
import logging, os, pathlib, sys, time
logging.basicConfig(level="WARNING", format="%(message)s")
from slm import operators
source = pathlib.Path(sys.argv[1]) / "tiny.c"
source.write_text("#include <Python.h>\\nstatic struct PyModuleDef tiny = {PyModuleDef_HEAD_INIT, \\"tiny\\"};"
                  "PyMODINIT_FUNC PyInit_tiny(void) { return PyModule_Create(&tiny); }")
class Tiny:
    name = "tiny"
    def load(self, verbose):
        from torch.utils import cpp_extension
        (pathlib.Path(sys.argv[1]) / "building").write_text(str(os.getpid()))
        if "slowly" in sys.argv:
            build = cpp_extension._write_ninja_file_and_build_library
            cpp_extension._write_ninja_file_and_build_library = lambda *a, **k: (print("held", flush=True), time.sleep(1000))
        return cpp_extension.load(name="tiny", sources=[str(source)], verbose=verbose)
operators.load(Tiny(), "tiny one")
print("loaded", flush=True)
"""


@pytest.fixture
def env(tmp_path):
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "MAX_JOBS": "1",
    }


def test_a_folder_for_each_environment(tmp_path, monkeypatch):
    """Within the one that the user names; a process that this one starts finds the same."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "mine"))
    folder = operators.folder()
    assert folder.parent == tmp_path / "mine"
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(folder)
    assert operators.folder() == folder
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "mine"))
    monkeypatch.setattr(operators, "version", lambda name: "another")
    assert operators.folder().name != folder.name


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_a_killed_build_is_waited_for_and_then_recovered(tmp_path, env):
    """While it builds, another says for which process it waits; killed, torch's own lock file stays and the other builds."""
    command = [sys.executable, "-c", BUILDER, str(tmp_path)]
    first = subprocess.Popen([*command, "slowly"], env=env, stdout=subprocess.PIPE, text=True)
    second = None
    try:
        assert first.stdout.readline() == "held\n"
        (left,) = (tmp_path / "extensions").glob("*/tiny/lock")
        with open(tmp_path / "said", "w") as said:
            second = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=said, text=True)
        deadline = time.monotonic() + 60
        while f"for process {first.pid} on host" not in (tmp_path / "said").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert second.stdout.readline() == "loaded\n", (tmp_path / "said").read_text()
        assert second.wait(60) == 0
        assert f"a build in {left.parent} was killed" in (tmp_path / "said").read_text()
        assert not left.exists()
    finally:
        for process in (first, second):
            if process is not None:
                process.kill()
                process.wait()
