"""The parts of slm doctor that read what others print, and the versions that it compares."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from slm import doctor, doctor_node, installed
from slm.checkpoint import FORMAT, manifest_text
from slm.doctor import _differences
from slm.installed import Package
from slm.recipe import load_recipe
from slm.room import check_room, room
from tests.faults.runs import write_recipe

ROOT = Path(__file__).parents[2]


def test_versions_are_those_of_pip():
    """Against pip itself, for every package of setup.cfg; the pins against constraints.txt, by a reading of their own."""
    listed = subprocess.check_output([sys.executable, "-m", "pip", "list", "--format", "json"], text=True)
    there = {re.sub("[-_.]+", "-", entry["name"]).lower(): entry["version"] for entry in json.loads(listed)}
    pins = (ROOT / "constraints.txt").read_text().lower()
    packages = installed.packages()
    assert len(packages) > 10
    for package in packages:
        assert package.installed == there[package.name.lower()]
        assert package.is_allowed
        if package.tested:
            assert f"\n{package.name.lower()}=={package.tested}" in pins


@pytest.mark.parametrize(
    ("found", "allowed"), [("2.13.0+cu130", True), ("2.10", True), ("2.9.1", False), ("", False), ("2.11.0rc1", True)]
)
def test_a_range_of_versions(found, allowed):
    """A build's own label does not count; what is missing is not allowed."""
    assert Package("torch", found, SpecifierSet(">=2.10"), "2.13.0").is_allowed is allowed


def test_facts_name_what_machines_must_share():
    """The code's own hash changes with any module of slm (here it is only looked at)."""
    facts = installed.facts()
    assert facts["torch"] == version("torch")
    assert facts["python"] == sys.version.split()[0]
    assert re.fullmatch("[0-9a-f]{12}", facts["slm code"])


def test_what_differs_names_the_nodes():
    """Of four ranks on three nodes, one node is another; where all are alike, one line says what was compared."""
    same, other = {"torch": "2.13.0", "numpy": "2.4"}, {"torch": "2.12.0", "numpy": "2.4"}
    (check,) = _differences([same, same, other, same], ["a", "a", "b", "c"])
    assert (check.state, check.measured) == ("wrong", "2.13.0 on a, c; 2.12.0 on b")
    (check,) = _differences([same, same], ["a", "b"])
    assert check.state == "ok"


SMI = """#!/bin/sh
case "$*" in
  *event_reasons*) echo 'Field "clocks_event_reasons.active" is not a valid field to query.'; exit 2 ;;
  *query-gpu*)
    echo 'NVIDIA H100 80GB HBM3, 525.60.13, 81559, 4, 0, 33, 0x0000000000000001'
    echo 'NVIDIA H100 80GB HBM3, 525.60.13, 81559, 70123, 2, 41, 0x0000000000000000'
    echo 'NVIDIA GeForce RTX 3090, 525.60.13, 24576, 4, [N/A], 88, 0x0000000000000040' ;;
  *compute-apps*) echo '4711, 70119' ;;
esac
"""


def test_nvidia_smis_answers_are_read(tmp_path, monkeypatch):
    """As an older driver prints them: idle clocks are no fault, wrong bits are, heat is worth a look, [N/A] is no number."""
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = {check.name: check for check in doctor_node.gpus()}
    assert [check.state for check in found.values()] == ["ok", "wrong", "warning", "warning"]
    assert "uncorrected ECC errors 2" in found["GPU 1"].measured
    assert "held back (0x40)" in found["GPU 2"].measured
    assert "process 4711 with 70119" in found["GPUs in use"].measured
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not talk to the driver'\nexit 9\n"
    )
    (broken,) = doctor_node.gpus()
    assert (broken.state, "could not talk" in broken.measured) == ("wrong", True)


def test_the_doctor_and_a_run_ask_for_the_same_room(tmp_path, caplog):
    """12 bytes a parameter, keep_last and the next one, and the ends of two phases before the last: more than any disk has, so
    both warn, of the same number; with one they do not."""
    phases = [{"name": n, "tokens": 512, "seq_len": 64, "batch_tokens": 256, "micro_batch": 2} for n in "abc"]

    def both(keep_last):
        recipe = load_recipe(write_recipe(tmp_path, phases=phases, checkpoint={"keep_last": keep_last}))
        caplog.clear()
        check_room(tmp_path, recipe, recipe.phases)
        assert (
            f"of {12 * recipe.model.num_parameters() / 2**30:.3g} GiB" in doctor._room_for_checkpoints(recipe).measured
        )
        return doctor._room_for_checkpoints(recipe), caplog.text

    found, said = both(10**12)
    assert found.state == "warning"
    assert f"{10**12 + 3} checkpoints of" in found.measured
    assert f"of the {10**12 + 3} that are to lie there at once" in said
    found, said = both(1)
    assert (found.state, said) == ("ok", "")
    assert "4 checkpoints of" in found.measured


def test_room_is_asked_for_what_a_whole_run_keeps(tmp_path):
    """Counted one by one over two phases of ten steps, with a save every second and the best at the third: the most that lie
    there at once is what the doctor asks room for. What lies there already needs no more room."""
    phases = [{"name": n, "tokens": 2560, "seq_len": 64, "batch_tokens": 256, "micro_batch": 2} for n in "ab"]
    checkpoint = {"keep_last": 1, "every_steps": 2, "keep_every_steps": 4}
    recipe = load_recipe(write_recipe(tmp_path, phases=phases, checkpoint=checkpoint, eval={"every_steps": 3}))
    lasting, passing, best, most = 0, [], None, 0
    for _ in phases:
        for step in range(1, 11):
            if step % 2 and step != 3:
                continue
            others = len(passing) + (best is not None and best not in passing)
            most = max(most, lasting + others + 1)
            if step % 4 == 0 or step == 10:
                lasting += 1
            else:
                passing = [object()]
                best = passing[0] if step == 3 else best
    assert most == recipe.most_checkpoints() == room(tmp_path, recipe, recipe.phases).num == 8
    files = [{"file": "state.json", "bytes": 2, "sha256": "x"}]
    for name, permanent in {"a-00000004": True, "a-00000006": False}.items():
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(
            manifest_text({"format": FORMAT, "global_step": 4, "permanent": permanent, "files": files})
        )
    assert room(tmp_path, recipe, recipe.phases).num == 6
    assert room(tmp_path, recipe, recipe.phases[1:]).num == 4
