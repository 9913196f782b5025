"""Checkpoints as files: what is written, what is refused, what is kept. One rank, no training: real tensors through the real
writer and reader. With ranks and training: tests/faults, tests/distributed/test_same_run.py."""

import json
import os
import random
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from slm import checkpoint, saving, watchdog
from slm.engine import STATE_KINDS, Fragment
from slm.errors import CorruptArtefact, EnvironmentProblem, UserError
from slm.recipe import Checkpoint
from slm.saving import Checkpointer

SHAPES = {"a.weight": (40, 7), "b.weight": (13,)}


def fragments(value):
    """Live tensors of two parameters, the first in two pieces as two ranks would own it; filled with value + 0, 1, 2 …"""

    def some(first, length):
        return {k: torch.arange(first, first + length) + value + 1000.0 * i for i, k in enumerate(STATE_KINDS)}

    return [
        Fragment("a.weight", 0, some(0, 100)),
        Fragment("a.weight", 100, some(100, 180)),
        Fragment("b.weight", 0, some(0, 13)),
    ]


class Run:
    """A run directory with a saver, and what the saver told."""

    def __init__(self, folder, **settings):
        self.folder, self.events = folder, []
        self.saver = Checkpointer(folder, Checkpoint(**settings), lambda kind, **f: self.events.append((kind, f)))

    def save(self, step, value=None, wait=True, **options):
        state = {
            "global_step": step,
            "position": {"step": step},
            "recipe": {},
            "optimizer_steps": step,
            "loss_scale": None,
        }
        live = fragments(step if value is None else value)
        begun = self.saver.save(live, SHAPES, state, name=f"p-{step:08d}", **options)
        if wait:
            self.saver.wait()
        return begun, live

    def names(self):
        return sorted(p.name for p in (self.folder / "checkpoints").iterdir())

    @property
    def kinds(self):
        return [kind for kind, _ in self.events]


def weights_of(folder):
    return checkpoint.Reader(folder).weight("a.weight", (40, 7)).flatten()


def as_saved(folder):
    """The manifest says of every file what it now is, as if it had been saved so."""
    names = [entry["file"] for entry in checkpoint.read_manifest(folder)["files"]]
    files = [{"file": name, **checkpoint.file_digest(folder / name)} for name in names]
    rewrite(folder, lambda manifest: manifest.update(files=files))


def rewrite(folder, change):
    """Changes fields of a manifest as another program would that keeps its checksum."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(checkpoint.manifest_text(manifest))


def test_files_are_safetensors_and_pieces_are_joined(tmp_path):
    """safetensors' own reader finds every tensor; ours joins the pieces at any cut."""
    Run(tmp_path).save(5)
    folder = tmp_path / "checkpoints" / "p-00000005"
    with safe_open(folder / "rank-00000.safetensors", "pt") as file:
        assert len(file.keys()) == 9
        assert torch.equal(file.get_tensor("exp_avg/a.weight@100"), torch.arange(100, 280) + 5.0 + 1000)
    reader = checkpoint.Reader(folder)
    for start, length in ((0, 280), (0, 100), (99, 2), (100, 180), (279, 1), (37, 150)):
        expected = torch.arange(start, start + length) + 5.0 + 2000
        assert torch.equal(reader.read("exp_avg_sq", "a.weight", start, length), expected)
    with pytest.raises(CorruptArtefact, match="0 of the 1 elements"):
        reader.read("master", "a.weight", 280, 1)


def test_bytes_read_are_those_asked_for(tmp_path):
    """What the process reads (/proc/self/io) is the manifest, state.json, the header and the elements, and nothing else."""
    Run(tmp_path).save(5)
    folder = tmp_path / "checkpoints" / "p-00000005"
    begun = _bytes_read()
    overhead = _bytes_read() - begun  # of looking
    begun = _bytes_read()
    reader = checkpoint.Reader(folder)
    reader.read("master", "a.weight", 90, 20)
    found = _bytes_read() - begun - overhead
    beside = sum((folder / name).stat().st_size for name in ("manifest.json", "state.json"))
    header = reader.bytes_read - 20 * 4
    with open(folder / "rank-00000.safetensors", "rb") as file:
        assert header == 8 + int.from_bytes(file.read(8), "little")
    assert found == reader.bytes_read + beside


def _bytes_read():
    return int(Path("/proc/self/io").read_text().split()[1])


def test_two_hundred_flipped_bits(tmp_path):
    """Row 9: one bit of one file of the newest, 200 times over all its files: each is detected, and the one before chosen."""
    run = Run(tmp_path)
    run.save(5)
    run.save(6)
    older, folder = (tmp_path / "checkpoints" / f"p-0000000{step}" for step in (5, 6))
    chance, detected = random.Random(0), 0
    files = sorted(folder.iterdir())
    assert [f.name for f in files] == ["manifest.json", "rank-00000.safetensors", "state.json"]
    for trial in range(200):
        file = files[trial % 3]
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        file.write_bytes(flipped)
        with pytest.raises(CorruptArtefact):
            checkpoint.verify(folder)
        detected += checkpoint.choose(tmp_path) == older
        file.write_bytes(whole)
    assert detected == 200
    assert checkpoint.choose(tmp_path) == folder


def test_cut_and_missing_files(tmp_path):
    """Row 8: each file at 0, half and one byte less, or gone, or without the right to be a file: the one before is chosen."""
    run = Run(tmp_path)
    run.save(5)
    run.save(6)
    older, folder = (tmp_path / "checkpoints" / f"p-0000000{step}" for step in (5, 6))
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        for length in (0, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:length])
            assert checkpoint.choose(tmp_path) == older, (file, length)
        file.unlink()
        assert checkpoint.choose(tmp_path) == older, file
        file.mkdir()
        assert checkpoint.choose(tmp_path) == older, file
        file.rmdir()
        file.write_bytes(whole)
    assert checkpoint.choose(tmp_path) == folder


def test_a_reader_of_what_nobody_verified_looks_at_sizes_and_the_small_files(tmp_path):
    """As at the end of a phase, whose state goes on from the checkpoint just committed: a file that is cut, longer or gone, and
    any change of state.json."""
    Run(tmp_path).save(5)
    folder = tmp_path / "checkpoints" / "p-00000005"
    checkpoint.Reader(folder)
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        wrong = [whole[:-1], whole[: len(whole) // 2], whole + b"\0"]
        if file.suffix == ".json":
            wrong.append(whole.replace(b"5", b"6", 1))
        for data in wrong:
            file.write_bytes(data)
            with pytest.raises(CorruptArtefact):
                checkpoint.Reader(folder)
        file.unlink()
        with pytest.raises(CorruptArtefact):
            checkpoint.Reader(folder)
        file.write_bytes(whole)
    checkpoint.Reader(folder)


def test_latest_is_only_a_convenience(tmp_path):
    """Row 10: deleted, empty, garbage or of a folder that is gone: what is chosen is by manifest all the same."""
    Run(tmp_path).save(5)
    latest, folder = tmp_path / "latest", tmp_path / "checkpoints" / "p-00000005"
    assert latest.resolve() == folder
    latest.unlink()
    assert checkpoint.choose(tmp_path) == folder
    for content in ("", "garbage"):
        latest.write_text(content)
        assert checkpoint.choose(tmp_path) == folder
    latest.unlink()
    latest.symlink_to("checkpoints/p-00000099")
    assert checkpoint.choose(tmp_path) == folder
    run = Run(tmp_path)
    run.save(6)  # and it is mended by the next save
    assert latest.resolve().name == "p-00000006"


@pytest.mark.parametrize(
    "name", ["../p-00000005/state.json", "/etc/passwd", "a/b", "..", "", "a\x00b", "manifest.json/", ".x"]
)
def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path, name):
    """Also one whose checksum is right: it may come from anybody."""
    Run(tmp_path).save(5)
    folder = tmp_path / "checkpoints" / "p-00000005"
    rewrite(folder, lambda m: m["files"].append({"file": name, "bytes": 1, "sha256": "x"}))
    with pytest.raises(CorruptArtefact, match="no plain name"):
        checkpoint.verify(folder)
    with pytest.raises(CorruptArtefact, match="no plain name"):
        checkpoint.Reader(folder)


def test_a_link_in_place_of_a_file_is_refused_and_what_is_not_named_is_not_read(tmp_path):
    """Neither is in the folder as the manifest promises."""
    Run(tmp_path).save(5)
    folder = tmp_path / "checkpoints" / "p-00000005"
    stray = {f"{kind}/a.weight@0": torch.zeros(280) for kind in STATE_KINDS}
    save_file(stray, folder / "rank-00007.safetensors")
    checkpoint.verify(folder)
    assert torch.equal(weights_of(folder), torch.arange(280) + 5.0)
    (folder / "rank-00000.safetensors").rename(tmp_path / "elsewhere")
    (folder / "rank-00000.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptArtefact, match="is a link"):
        checkpoint.verify(folder)


def header_of(file):
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def write_with_header(file, header, values, num_bytes=None):
    text = json.dumps(header).encode()
    file.write_bytes((len(text) if num_bytes is None else num_bytes).to_bytes(8, "little") + text + values)
    as_saved(file.parent)


def test_pieces_that_overlap_and_headers_that_lie_are_refused(tmp_path):
    """Overlapping pieces add up to the right number of elements, and leave others as they were in memory before."""
    Run(tmp_path).save(5)
    folder = tmp_path / "checkpoints" / "p-00000005"
    file = folder / "rank-00000.safetensors"
    header, values = header_of(file)
    write_with_header(file, header, values)
    assert torch.equal(weights_of(folder), torch.arange(280) + 5.0)
    moved = {key.replace("master/a.weight@100", "master/a.weight@50"): tensor for key, tensor in header.items()}
    write_with_header(file, moved, values)
    with pytest.raises(CorruptArtefact, match="two pieces of master/a.weight overlap at element 50"):
        checkpoint.Reader(folder)
    for num_bytes in (2**62, 2**64 - 1, file.stat().st_size):
        write_with_header(file, header, values, num_bytes)
        with pytest.raises(CorruptArtefact, match="it says that its header has"):
            checkpoint.Reader(folder)
    for change in (
        {"shape": [2**60], "data_offsets": [0, 2**62]},
        {"shape": [-1], "data_offsets": [8, 4]},
        {"shape": [1], "data_offsets": [-4, 0]},
        {"shape": [1], "data_offsets": [0, 5]},
    ):
        write_with_header(file, {**header, "master/a.weight@0": {"dtype": "F32", **change}}, values)
        with pytest.raises(CorruptArtefact, match="lies outside its file|is not 1-D float32"):
            checkpoint.Reader(folder)
    file.write_bytes(b"abc")
    with pytest.raises(CorruptArtefact):
        checkpoint.Reader(folder)


def test_each_file_is_verified_by_exactly_one_rank(tmp_path):
    """The parts of 1, 2 and 3 ranks cover all files; of each flipped file just one rank knows."""
    Run(tmp_path).save(5)
    folder = tmp_path / "checkpoints" / "p-00000005"
    for n in (1, 2):
        content = torch.full((50 * n,), float(n))
        save_file({f"master/c@{n}": content}, folder / f"rank-0000{n}.safetensors")
        added = {"file": f"rank-0000{n}.safetensors", **checkpoint.file_digest(folder / f"rank-0000{n}.safetensors")}
        rewrite(folder, lambda m, added=added: m["files"].append(added))
    for world in (1, 2, 3, 7):
        for file in sorted(folder.glob("[!m]*")):
            whole = file.read_bytes()
            file.write_bytes(whole[:-1])
            knows = []
            for rank in range(world):
                try:
                    checkpoint.verify(folder, rank, world)
                except CorruptArtefact:
                    knows.append(rank)
            assert len(knows) == 1, (world, file, knows)
            file.write_bytes(whole)


def test_other_versions_are_refused_by_name_and_the_one_before_is_read(tmp_path, caplog):
    """Row 29: a newer format is no damage, and nothing older is gone on from behind the user's back; format 1 loads."""
    run = Run(tmp_path)
    run.save(5)
    run.save(6)
    older, folder = (tmp_path / "checkpoints" / f"p-0000000{step}" for step in (5, 6))
    rewrite(folder, lambda m: m.update(format="slm-checkpoint/3"))
    with pytest.raises(UserError) as caught:
        checkpoint.choose(tmp_path)
    for words in (
        "p-00000006/manifest.json has format 'slm-checkpoint/3'",
        "slm-checkpoint/2",
        "move that folder away",
    ):
        assert words in str(caught.value)
    rewrite(folder, lambda m: m.update(format="x"))
    assert checkpoint.choose(tmp_path) == older
    # As version 1 wrote it: by safetensors' own writer, no checksum of the manifest, no name of the optimiser.
    manifest, state = (json.loads((older / name).read_text()) for name in ("manifest.json", "state.json"))
    del manifest["sha256"], state["optimizer"]
    manifest["format"] = "slm-checkpoint/1"
    live = {f"{k}/{f.name}@{f.start}": v for f in fragments(7) for k, v in f.values.items()}
    save_file(live, older / "rank-00000.safetensors")
    (older / "state.json").write_text(json.dumps(state))
    manifest["files"] = [{"file": e["file"], **checkpoint.file_digest(older / e["file"])} for e in manifest["files"]]
    (older / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.choose(tmp_path) == older
    checkpoint.Reader(older).check_optimizer()
    assert torch.equal(weights_of(older), torch.arange(280) + 7.0)


def test_another_optimiser_or_missing_moments_are_refused(tmp_path):
    """The message names the folder, its format, what lacks and the option; with weights_only it passes."""
    run = Run(tmp_path)
    run.save(5)
    folder = tmp_path / "checkpoints" / "p-00000005"
    checkpoint.Reader(folder).check_optimizer()
    live = {f"{k}/{f.name}@{f.start}": v for f in fragments(5) for k, v in f.values.items() if k != "exp_avg_sq"}
    save_file(live, folder / "rank-00000.safetensors")
    as_saved(folder)
    with pytest.raises(UserError) as caught:
        checkpoint.Reader(folder).check_optimizer()
    for words in ("p-00000005 (slm-checkpoint/2) lacks 2", "exp_avg_sq/a.weight", "--fresh-optimizer"):
        assert words in str(caught.value)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "optimizer": "lion"}))
    as_saved(folder)
    with pytest.raises(UserError, match="the optimiser 'lion'"):
        checkpoint.Reader(folder).check_optimizer()
    checkpoint.Reader(folder, weights_only=True).check_optimizer()


def slowly(monkeypatch):
    """Makes writing wait for the event that is returned."""
    go_on, write = threading.Event(), saving.write_tensors

    def held(path, pieces):
        assert go_on.wait(30)
        return write(path, pieces)

    monkeypatch.setattr(saving, "write_tensors", held)
    return go_on


def test_training_goes_on_and_the_copy_does_not_change(tmp_path, monkeypatch):
    """Row 25: while the writer is held up the live state is changed; the file is what the state was when save returned. The
    next save waits for it, and uses the same memory again."""
    go_on = slowly(monkeypatch)
    run = Run(tmp_path, keep_last=3)
    _, live = run.save(5, wait=False)
    for fragment in live:
        for value in fragment.values.values():
            value.fill_(-1)
    memory = run.saver._copy._memory.data_ptr()
    assert run.names() in ([], [f".staging-p-00000005-{run.saver._attempt}"])
    threading.Timer(0.2, go_on.set).start()
    run.save(6)
    for step in (5, 6):
        assert torch.equal(weights_of(tmp_path / "checkpoints" / f"p-0000000{step}"), torch.arange(280) + float(step))
    assert run.saver._copy._memory.data_ptr() == memory
    assert run.saver._copy._memory.nbytes == 12 * (280 + 13)  # one copy, no more
    assert run.kinds == ["saved", "saved"]


def test_a_long_wait_for_the_save_before_is_said(tmp_path, monkeypatch, caplog):
    """In the log and events, with its seconds; a short one is not."""
    go_on = slowly(monkeypatch)
    run = Run(tmp_path)
    run.save(5, wait=False)
    threading.Timer(1.3, go_on.set).start()
    run.save(6)
    run.save(7, wait=False)
    run.save(8)
    assert run.kinds == ["saved", "save waited", "saved", "saved", "saved"]
    _, said = run.events[1]
    assert said["name"] == "p-00000006"
    assert 1 < said["seconds"] < 10
    assert "for the save before, until p-00000006 could begin" in caplog.text


def test_a_save_may_be_skipped_but_not_a_phase_end(tmp_path, monkeypatch, caplog):
    """when_busy skip: said in the log and events; a phase's end, the best and a stop wait all the same."""
    go_on = slowly(monkeypatch)
    run = Run(tmp_path, when_busy="skip", keep_last=9)
    assert run.save(5, wait=False)[0]
    assert not run.save(6, wait=False)[0]
    assert run.events[-1][0] == "save skipped"
    assert "p-00000006 is skipped" in caplog.text
    threading.Timer(0.2, go_on.set).start()
    for step, why in ((7, "permanent"), (8, "best"), (9, "required")):
        assert run.save(step, wait=False, **{why: True})[0]
    run.saver.wait()
    assert run.names() == [f"p-0000000{step}" for step in (5, 7, 8, 9)]


def test_what_is_kept(tmp_path, monkeypatch):
    """The newest keep_last, the best, phase ends and every keep_every_steps; the manifest of what goes is removed first."""
    removed, rmtree = [], shutil.rmtree

    def watched(folder, **options):
        assert not (Path(folder) / "manifest.json").exists()
        removed.append(Path(folder).name)
        rmtree(folder, **options)

    monkeypatch.setattr(saving.shutil, "rmtree", watched)
    run = Run(tmp_path, keep_last=2, keep_every_steps=4)
    for step in range(1, 11):
        run.save(step, best=step == 3, permanent=step == 5)
    assert run.names() == [f"p-{step:08d}" for step in (3, 4, 5, 8, 9, 10)]
    assert removed == [f"p-{step:08d}" for step in (1, 2, 6, 7)]
    assert (tmp_path / "best").resolve().name == "p-00000003"


def test_the_best_is_kept_without_its_link(tmp_path, monkeypatch):
    """The link removed, or never made because of a kill: the newest best stays; an older one goes."""
    run = Run(tmp_path, keep_last=1)
    run.save(1, best=True)
    (tmp_path / "best").unlink()
    run.save(2)
    run.save(3)
    assert run.names() == ["p-00000001", "p-00000003"]
    point = saving._point
    monkeypatch.setattr(saving, "_point", lambda link, target: None if link.name == "best" else point(link, target))
    run.save(4, best=True)
    run.save(5)
    run.save(6)
    assert run.names() == ["p-00000004", "p-00000006"]


def test_of_a_linked_checkpoint_only_the_link_is_removed(tmp_path):
    """By retention, and where its name is saved again."""
    other = Run(tmp_path / "other", keep_last=9)
    other.save(1)
    other.save(2)
    run = Run(tmp_path / "run", keep_last=1)
    for name in ("p-00000001", "p-00000002"):
        (tmp_path / "run" / "checkpoints" / name).symlink_to(tmp_path / "other" / "checkpoints" / name)
    run.save(2)
    assert run.names() == ["p-00000002"]
    assert not (tmp_path / "run" / "checkpoints" / "p-00000002").is_symlink()
    for name in ("p-00000001", "p-00000002"):
        checkpoint.verify(tmp_path / "other" / "checkpoints" / name)


def test_what_a_resume_passed_over_does_not_count(tmp_path, caplog):
    """It is renamed, said and kept; others who look for a checkpoint only pass over it; where none is whole all stay."""
    run = Run(tmp_path, keep_last=2)
    for step in (5, 6, 7):
        run.save(step)
    root = tmp_path / "checkpoints"
    state = root / "p-00000007" / "state.json"
    whole = state.read_text()
    state.write_text(whole + " ")
    assert checkpoint.choose(tmp_path).name == "p-00000006"
    assert run.names() == ["p-00000006", "p-00000007"]
    assert checkpoint.choose_together(tmp_path).name == "p-00000006"
    assert "p-00000007 is kept as p-00000007.damaged" in caplog.text
    run = Run(tmp_path, keep_last=2)
    run.save(7)
    assert run.names() == ["p-00000006", "p-00000007", "p-00000007.damaged"]
    state.write_text(whole + " ")
    assert checkpoint.choose(tmp_path, own=True).name == "p-00000006"
    assert run.names() == ["p-00000006", "p-00000007.damaged", "p-00000007.damaged-2"]
    (root / "p-00000006" / "state.json").write_text("torn")
    with pytest.raises(CorruptArtefact, match="none of the 1"):
        checkpoint.choose_together(tmp_path)
    assert "p-00000006" in run.names()


def test_a_reader_of_latest_stays_with_one_checkpoint(tmp_path):
    """Though the run saves on and the folder goes while it reads: init_from may name a run that trains."""
    run = Run(tmp_path, keep_last=1)
    run.save(5)
    reader = checkpoint.Reader(tmp_path / "latest")
    run.save(6)
    assert run.names() == ["p-00000006"]
    assert torch.equal(reader.weight("b.weight", (13,)), torch.arange(13) + 5.0)


def test_leftovers_of_a_killed_save_are_swept(tmp_path):
    """A staging folder is no checkpoint, and the next attempt removes it: without a manifest, with a file that is not whole, or
    beside a checkpoint of its name."""
    Run(tmp_path).save(5)
    folder = tmp_path / "checkpoints" / "p-00000005"
    for name, lacking in (("p-00000006", "manifest.json"), ("p-00000007", "state.json"), ("p-00000005", None)):
        torn = tmp_path / "checkpoints" / f".staging-{name}-0123dead"
        shutil.copytree(folder, torn)
        if lacking:
            (torn / lacking).unlink()
    assert checkpoint.choose(tmp_path).name == "p-00000005"
    assert Run(tmp_path).names() == ["p-00000005"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("killed_at", [1, 2])
def test_a_name_saved_again_is_never_without_a_checkpoint(tmp_path, monkeypatch, caplog, killed_at):
    """Killed at the first or the second of the two renames: the next start goes on from the old one or the new one."""
    Run(tmp_path).save(5, value=1)
    run, rename, calls = Run(tmp_path), Path.rename, []

    def dies(path, target):
        calls.append(path)
        if len(calls) >= killed_at:
            raise SystemExit  # not an Exception, and ends the thread: nothing is tidied up
        return rename(path, target)

    monkeypatch.setattr(saving.Path, "rename", dies)
    run.save(5, value=2, wait=False)
    run.saver._thread.join()
    monkeypatch.undo()
    assert len(calls) == killed_at
    chosen = checkpoint.choose_together(tmp_path)
    assert chosen.name == "p-00000005"
    assert torch.equal(weights_of(chosen), torch.arange(280) + float(killed_at))
    assert ("is put in place" in caplog.text) == (killed_at == 2)
    assert Run(tmp_path).names() == ["p-00000005"]


def test_what_was_replaced_comes_back_where_the_new_one_is_torn(tmp_path):
    """The sweep of the saver does it too, for those who choose by themselves."""
    Run(tmp_path).save(5, value=1)
    root = tmp_path / "checkpoints"
    shutil.copytree(root / "p-00000005", root / ".staging-p-00000005-00000001")
    (root / ".staging-p-00000005-00000001" / "state.json").write_text("torn")
    (root / "p-00000005").rename(root / ".staging-replaced-p-00000005-00000002")
    assert Run(tmp_path).names() == ["p-00000005"]
    checkpoint.verify(root / "p-00000005")


@pytest.mark.parametrize("still_seconds", [60.0, 0.1])
def test_a_run_that_fails_gives_its_save_the_time(tmp_path, monkeypatch, still_seconds):
    """finish: the save under way is committed before the process ends, also where no bytes come for longer than other ranks are
    waited for: an fsync of many GB adds none."""
    monkeypatch.setattr(saving, "_PEERS_STILL_SECONDS", still_seconds)
    go_on = slowly(monkeypatch)
    run = Run(tmp_path)
    run.save(5, wait=False)
    threading.Timer(1.0, go_on.set).start()
    run.saver.finish(30)
    assert run.names() == ["p-00000005"]


def with_another_rank(monkeypatch, run, process):
    """Begins a save of two ranks, of which the other, that process, writes nothing."""
    monkeypatch.setattr(saving.parallel, "world_size", lambda: 2)
    for name, alone in LOCAL.items():
        monkeypatch.setattr(saving.parallel, name, alone)
    run.saver._processes = [watchdog.myself(), process]
    run.save(5, wait=False)


LOCAL = {
    "agree": bool,
    "reduce_sum": list,
    "first_rank_decides": lambda function, *arguments: function(*arguments),
    "together": lambda function, *arguments: function(*arguments),
    "broadcast": lambda value: value,
}


def test_a_rank_that_was_killed_is_not_waited_for(tmp_path, monkeypatch, caplog):
    """Also while nobody has asked how it ended; one that is only slow is waited for."""
    child = subprocess.Popen(["sleep", "60"])
    _, pid, began = watchdog.myself()
    process = (watchdog.myself()[0], child.pid, watchdog._began(child.pid))
    assert not watchdog.is_gone(process)
    assert watchdog.is_gone((process[0], pid, began + "0"))  # an id that is used again
    assert not watchdog.is_gone(("elsewhere", pid, began + "0"))
    run = Run(tmp_path)
    with_another_rank(monkeypatch, run, process)
    run.saver._thread.join(1.5)
    assert run.saver._thread.is_alive()
    child.kill()
    run.saver.finish(30)
    assert not run.saver._thread.is_alive()
    assert "rank 1 has gone before its part was written" in caplog.text
    assert watchdog.is_gone(process)
    child.wait()
    assert watchdog.is_gone(process)
    assert checkpoint.choose(tmp_path) is None


def test_a_rank_elsewhere_is_given_up_when_it_writes_no_more(tmp_path, monkeypatch, caplog):
    """Of its process nothing is known."""
    monkeypatch.setattr(saving, "_PEERS_STILL_SECONDS", 1.0)
    run = Run(tmp_path)
    with_another_rank(monkeypatch, run, ("elsewhere", 1, "1"))
    part = run.saver._save.staging / "rank-00001.safetensors"
    for n in range(1, 4):
        threading.Timer(0.5 * n, part.write_bytes, [bytes(n)]).start()
    begun = time.monotonic()
    run.saver.finish(30)
    assert 2 < time.monotonic() - begun < 10
    assert "is given up" in caplog.text
    run.saver._abandoned.set()
    run.saver._thread.join(10)


def test_a_folder_that_cannot_be_made_is_said_by_the_first_rank_to_all(tmp_path, monkeypatch):
    """Raised where rank 0's outcome is shared, not before a barrier in which the others would wait."""
    decided, decide = [], saving.parallel.first_rank_decides

    def watched(function, *arguments):
        decided.append(function.__name__)
        return decide(function, *arguments)

    monkeypatch.setattr(saving.parallel, "first_rank_decides", watched)
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(EnvironmentProblem, match="cannot be written, so no checkpoint could be saved"):
        Run(tmp_path)
    assert decided == ["_begin"]


def test_a_recipe_keeps_only_what_it_saves():
    """keep_every_steps must be a multiple of every_steps."""
    from slm.recipe import load_recipe

    os.chdir(Path(__file__).parents[2])
    with pytest.raises(UserError, match=r"keep_every_steps is 30, no multiple of checkpoint.every_steps 20.*try 40"):
        load_recipe("recipes/demo.yaml", ["checkpoint.keep_every_steps=30"])
