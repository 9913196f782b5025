"""runtime.py: ranks from every launcher's environment, the stop flag, the lock, exit.json and the log."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys

import pytest

from slm.errors import UserError
from slm.runtime import (
    EXIT_CODES,
    EXIT_FILE_VARIABLE,
    Ranks,
    RunLock,
    StopRequest,
    _expand_tasks_per_node,
    _first_host,
    atomic_write,
    discover_ranks,
    look_at_lock,
    setup_logging,
    write_exit,
)

TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def env(monkeypatch):
    """An environment without any launcher's variables; what discover_ranks sets is undone after the test."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI_", "MPI_", "LOCAL_SIZE")):
            monkeypatch.delenv(name)
    for name in (*TORCH_VARIABLES, EXIT_FILE_VARIABLE):
        monkeypatch.setenv(name, "")  # so that monkeypatch knows the name, then
        monkeypatch.delenv(name)

    def set_all(**variables: object) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return set_all


# ------------------------------------------------------------------------------------------- ranks
def test_importing_the_runtime_imports_no_torch():
    """A rank hears a stop request before the seconds that torch takes to import."""
    code = "import sys, slm.runtime, slm.metrics; print([m for m in ('torch', 'wandb') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_alone_is_one_rank_with_a_free_port(env):
    """Without a launcher DeepSpeed still finds the six variables, and a port on which one can listen."""
    assert discover_ranks() == Ranks(0, 1, 0, 1)
    assert [os.environ[name] for name in TORCH_VARIABLES[:5]] == ["0", "1", "0", "1", "127.0.0.1"]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))
    assert discover_ranks() == Ranks(0, 1, 0, 1)  # a second call finds what the first one set


def test_torchrun_and_deepspeed(env):
    """torchrun's variables are taken as they are; DeepSpeed's LOCAL_SIZE serves as LOCAL_WORLD_SIZE."""
    env(RANK=5, WORLD_SIZE=8, LOCAL_RANK=1, LOCAL_WORLD_SIZE=4, MASTER_ADDR="n0", MASTER_PORT=7)
    assert discover_ranks() == Ranks(5, 8, 1, 4)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("n0", "7")
    del os.environ["LOCAL_WORLD_SIZE"], os.environ["LOCAL_RANK"]
    env(LOCAL_SIZE=2)
    assert discover_ranks() == Ranks(5, 8, 1, 2)


def test_srun(env):
    """Ranks, this node's number of tasks, and an address and port that each task works out by itself."""
    env(SLURM_JOB_ID=77, SLURM_STEP_ID=0, SLURM_PROCID=4, SLURM_LOCALID=0, SLURM_NODEID=2)
    env(SLURM_STEP_NUM_TASKS=5, SLURM_NTASKS=5, SLURM_STEP_TASKS_PER_NODE="2(x2),1")
    env(SLURM_STEP_NODELIST="gpu[03-04],cpu1", SLURM_JOB_NODELIST="gpu[01-04],cpu1")
    assert discover_ranks() == Ranks(4, 5, 0, 1)
    assert os.environ["MASTER_ADDR"] == "gpu03"
    first = os.environ.pop("MASTER_PORT")
    for name in TORCH_VARIABLES[:4]:
        del os.environ[name]
    env(SLURM_STEP_ID=1)
    discover_ranks()
    assert first != os.environ["MASTER_PORT"]  # two steps of a job on one node
    assert 12000 <= int(first) < 32000


@pytest.mark.parametrize("step", [None, "4294967291", "4294967290"])
def test_a_batch_script_or_interactive_shell_is_alone(env, step):
    """SLURM sets SLURM_PROCID and SLURM_NTASKS there too, with no step or one of its reserved numbers."""
    env(SLURM_JOB_ID=77, SLURM_PROCID=0, SLURM_NTASKS=4, SLURM_LOCALID=0, SLURM_JOB_NODELIST="n1")
    if step:
        env(SLURM_STEP_ID=step)
    assert discover_ranks() == Ranks(0, 1, 0, 1)


def test_slurm_lists():
    """Against what `scontrol show hostnames` prints first, and the notation of SLURM_TASKS_PER_NODE."""
    assert [_first_host(text) for text in ("n1", "a[1-3,7],b2", "r[0-1]n[05-9]", "x-[2]-ib0,y")] == [
        "n1",
        "a1",
        "r0n05",
        "x-2-ib0",
    ]
    assert _expand_tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert _expand_tasks_per_node("8") == [8]


def test_mpich_and_intel_mpi_names(env):
    """Their process manager sets PMI_*; here with an address given, so that no MPI library is needed."""
    env(PMI_RANK=3, PMI_SIZE=4, MPI_LOCALRANKID=1, MPI_LOCALNRANKS=2, MASTER_ADDR="h", MASTER_PORT=7)
    assert discover_ranks() == Ranks(3, 4, 1, 2)


def test_real_mpirun(env, tmp_path):
    """Two ranks of the real mpirun agree on rank 0's free port through mpi4py."""
    mpirun = os.path.join(os.path.dirname(sys.executable), "mpirun")
    if not os.path.exists(mpirun):
        pytest.skip("no mpirun beside this Python")
    code = (
        "import os, pathlib, sys; from slm.runtime import discover_ranks; r = discover_ranks();"
        "text = f'{r} ' + os.environ['MASTER_ADDR'] + ':' + os.environ['MASTER_PORT'];"
        "pathlib.Path(sys.argv[1], str(r.rank)).write_text(text)"
    )
    command = [mpirun, "--allow-run-as-root", "--oversubscribe", "-n", "2"]
    subprocess.run([*command, sys.executable, "-c", code, tmp_path], check=True, timeout=60)
    texts = [(tmp_path / rank).read_text() for rank in ("0", "1")]
    assert [text.rpartition(" ")[0] for text in texts] == [str(Ranks(0, 2, 0, 2)), str(Ranks(1, 2, 1, 2))]
    assert texts[0].split()[-1] == texts[1].split()[-1]
    assert texts[0].split()[-1].startswith("127.0.0.1:")


@pytest.mark.parametrize("broken", [{"MASTER_PORT": 7}, {"LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 1}, {"RANK": 2}])
def test_a_contradictory_environment_is_refused(env, broken):
    """No rank waits ten minutes for others that cannot come."""
    env(**{"RANK": 1, "WORLD_SIZE": 2, **broken})
    with pytest.raises(UserError, match=r"Fix: (set both|unset RANK)"):
        discover_ranks()


# ----------------------------------------------------------------------------------------- signals
def test_signals_leave_a_note_and_are_given_back():
    """SIGTERM, SIGUSR1, SIGHUP and SIGINT do not interrupt; a second SIGINT does; close() restores the handlers."""
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
    names = ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT")
    before = {name: signal.getsignal(getattr(signal, name)) for name in names}
    stop = StopRequest()
    try:
        assert stop.signal_name is None
        for name in names:
            os.kill(os.getpid(), getattr(signal, name))
            assert stop.signal_name == name
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        stop.close()
    assert {name: signal.getsignal(getattr(signal, name)) for name in names} == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    try:
        os.kill(os.getpid(), signal.SIGHUP)  # as under nohup
        assert stop.signal_name is None
    finally:
        stop.close()
        signal.signal(signal.SIGHUP, hangup)


# ------------------------------------------------------------------------------------ run directory
def test_atomic_write_replaces_all_or_nothing(tmp_path):
    """A failed write leaves the old content and no temporary file."""
    path = tmp_path / "file"
    atomic_write(path, "old")
    atomic_write(path, b"new")
    with pytest.raises(UnicodeEncodeError):
        atomic_write(path, "\ud800")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_second_job_is_refused_by_name(tmp_path):
    """It is told the host and process that hold the directory; after that one's close it may have it."""
    with RunLock(tmp_path), pytest.raises(UserError, match="in use by another job") as error:
        RunLock(tmp_path)
    assert str(os.getpid()) in str(error.value)
    assert socket.gethostname() in str(error.value)
    RunLock(tmp_path).close()


def test_a_look_at_the_lock_takes_nothing(tmp_path):
    """It refuses with the holder's name while the directory is held; else, or where there is none, it leaves all as it was."""
    look_at_lock(tmp_path / "none")
    with RunLock(tmp_path):
        before = (tmp_path / "lock").read_bytes()
        with pytest.raises(UserError, match=f"is held by process {os.getpid()}"):
            look_at_lock(tmp_path)
    look_at_lock(tmp_path)
    assert not (tmp_path / "none").exists()
    assert (tmp_path / "lock").read_bytes() == before
    RunLock(tmp_path).close()


def test_the_lock_of_a_killed_job_is_taken_over(tmp_path):
    """Held by another process it refuses; after that process's SIGKILL the left-over file does not matter."""
    code = (
        "import sys, time; from slm.runtime import RunLock;"
        "lock = RunLock(sys.argv[1]); print(1, flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"1\n"
    with pytest.raises(UserError, match=f"held by process {holder.pid}"):
        RunLock(tmp_path)
    holder.kill()
    holder.wait()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_run_directory_that_cannot_be_made(tmp_path):
    """A mistake of the user, not a traceback."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        RunLock(tmp_path / "file" / "run")


def test_the_first_failure_stays_in_exit_json(env, tmp_path):
    """Also for the launcher's copy; a new attempt, which takes the lock, starts without a record."""
    run_dir, copy = tmp_path / "run", tmp_path / "copy.json"
    env(SLM_EXIT_FILE=copy, RANK=1)
    write_exit(run_dir, 0, "done")
    write_exit(run_dir, 77, "out of memory", step=12)
    write_exit(run_dir, 5, "lost the other rank")
    record = json.loads((run_dir / "exit.json").read_text())
    assert (record["code"], record["reason"], record["step"], record["rank"]) == (77, "out of memory", 12, 1)
    assert record["meaning"] == EXIT_CODES[77]
    assert json.loads(copy.read_text())["code"] == 77
    RunLock(run_dir).close()
    assert not (run_dir / "exit.json").exists()


def test_a_rank_of_the_attempt_before_writes_nothing_into_this_one(env, tmp_path):
    """It dies after the next attempt has taken the lock; its own launcher still hears of it."""
    env(SLM_EXIT_FILE=tmp_path / "second.json")
    RunLock(tmp_path / "run").close()
    env(SLM_EXIT_FILE=tmp_path / "first.json")
    write_exit(tmp_path / "run", 5, "lost the other rank")
    assert not (tmp_path / "run" / "exit.json").exists()
    assert json.loads((tmp_path / "first.json").read_text())["code"] == 5
    env(SLM_EXIT_FILE=tmp_path / "second.json")
    write_exit(tmp_path / "run", 0, "done")
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 0


def test_a_failure_before_there_is_a_run_directory(env, tmp_path):
    """The launcher still learns the code."""
    env(SLM_EXIT_FILE=tmp_path / "copy.json")
    write_exit(None, 2, "unknown key")
    assert json.loads((tmp_path / "copy.json").read_text())["code"] == 2


# ----------------------------------------------------------------------------------------- logging
@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_keeps_a_file_and_rank_0_speaks(tmp_path, capsys, rank):
    """Other ranks reach the screen with warnings only; a second set-up does not double the lines."""
    try:
        setup_logging(rank, tmp_path)
        setup_logging(rank, tmp_path)
        logging.getLogger("slm.data").info("loaded")
        logging.getLogger("slm").warning("slow")
    finally:
        for handler in logging.getLogger("slm").handlers[:]:
            logging.getLogger("slm").removeHandler(handler)
            handler.close()
    lines = (tmp_path / "logs" / f"rank-{rank}.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["INFO slm.data: loaded", "WARNING slm: slow"]
    screen = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 1)[1] for line in screen] == (
        ["INFO loaded", "WARNING slow"] if rank == 0 else ["[rank 1] WARNING slow"]
    )


def test_a_log_that_cannot_be_written_is_said_once(tmp_path, capsys):
    """A full disk: one line on the screen, no traceback, and what follows is on the screen too."""
    try:
        log = setup_logging(0, tmp_path)
        log.handlers[-1].setStream(open("/dev/full", "w"))
        log.info("one")
        log.info("two")
        setup_logging(0, tmp_path)  # closes what it cannot write
    finally:
        for handler in logging.getLogger("slm").handlers[:]:
            logging.getLogger("slm").removeHandler(handler)
            handler.close()
    screen = capsys.readouterr().err
    assert screen.count("rank-0.log cannot be written, the run goes on without") == 1
    assert "two" in screen
    assert "Traceback" not in screen


def test_a_screen_without_a_log_file_is_redacted_too(tmp_path, capsys, monkeypatch):
    """The folder cannot be made, and what follows may hold a secret."""
    monkeypatch.setenv("PGPASSWORD", "hunter2hunter2")
    (tmp_path / "logs").write_text("")
    try:
        setup_logging(0, tmp_path).error("refused: hunter2hunter2")
    finally:
        for handler in logging.getLogger("slm").handlers[:]:
            logging.getLogger("slm").removeHandler(handler)
    screen = capsys.readouterr().err
    assert "refused: ***" in screen
    assert "hunter2" not in screen
