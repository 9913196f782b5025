"""`slm` with faults in some ranks: what tests/faults start on each rank in place of slm.cli.

fault.py FAULTS COUNTS train RECIPE [OVERRIDES...]

FAULTS is a list, joined by commas, of WHAT-PLACE@RANK:CALL or WHAT-PLACE@RANK:CALL*TIMES: WHAT happens in rank RANK at the
CALLth call of PLACE in an attempt, counted from 1, at most TIMES times over all attempts (once if not said). The folder
COUNTS remembers how often it has. The product knows nothing of it: its functions are replaced here.
"""

import atexit
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import psutil


def main() -> None:
    faults, counts = sys.argv[1].split(","), Path(sys.argv[2])
    sys.argv = ["slm", *sys.argv[3:]]
    counts.mkdir(exist_ok=True)
    for fault in faults:
        match = re.fullmatch(r"(\w+)-(\w+)@(\d+):(\d+)(?:\*(\d+))?", fault)
        assert match, fault
        what, place, rank, call, times = match.groups()
        if os.environ.get("RANK", "0") == rank:
            arm(FAULTS[what], place, int(call), int(times or 1), counts / fault.replace("*", "x"))
    from slm.cli import main as slm

    slm()


def arm(fault, place: str, call: int, times: int, count: Path) -> None:
    """Replaces the function of `place` by one that counts its calls."""
    holder, name = place_of(place)
    original = getattr(holder, name)
    calls = 0

    def replaced(*arguments, **options):
        nonlocal calls
        calls += 1
        before = int(count.read_text()) if count.exists() else 0
        if calls == call and before < times:
            count.write_text(str(before + 1))
            if fault():
                return None  # the call is left out
        return original(*arguments, **options)

    setattr(holder, name, replaced)


def place_of(place: str) -> tuple[object, str]:
    if place in ("forward", "backward", "step"):
        from slm.engine import Engine

        return Engine, place
    if place == "data":
        from slm.data.batches import PhaseData

        return PhaseData, "step_batches"
    if place == "collective":
        import torch.distributed

        return torch.distributed, "all_reduce"
    if place == "eval":
        from slm.engine import Engine

        return Engine, "token_losses"
    if place == "write":  # of a checkpoint, in the saver's thread
        from slm import saving

        return saving, "write_tensors"
    if place == "compile":  # by torch.compile, of the first block that is called
        import torch._inductor.compile_fx

        return torch._inductor.compile_fx, "compile_fx"
    if place == "start":
        import slm.train

        return slm.train, "load_initial_state"
    raise SystemExit(f"{place}: no such place")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep_for_ever() -> None:
    while True:
        time.sleep(1000)


def hold_the_interpreter() -> None:
    """A call into C that never gives the interpreter's lock back."""
    import ctypes

    ctypes.PyDLL(None).pause()


def leave_out() -> bool:
    return True


def crash() -> None:
    raise RuntimeError("a fault was asked for here")


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def ask_twice() -> None:
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)


def ask_and_say_where() -> None:
    """FAULT_WHERE gets the stack at which the signal's handler runs, and whether the run has heard it there."""
    before = signal.getsignal(signal.SIGTERM)

    def note(number, frame):
        before(number, frame)
        Path(os.environ["FAULT_WHERE"]).write_text("".join(traceback.format_stack(frame)))

    signal.signal(signal.SIGTERM, note)
    ask_to_stop()
    signal.signal(signal.SIGTERM, before)


def ask_the_launcher(times: int = 1) -> None:
    arrived = threading.Event()
    before = signal.getsignal(signal.SIGTERM)

    def note(number, frame):
        before(number, frame)
        arrived.set()

    signal.signal(signal.SIGTERM, note)
    for process in psutil.Process().parents():
        if any(word.endswith("launch.py") and "launchers" in word for word in process.cmdline()):
            for _ in range(times):
                process.send_signal(signal.SIGTERM)
    assert arrived.wait(60)  # it is passed on


def ask_the_launcher_twice() -> None:
    ask_the_launcher(2)


def stay() -> None:
    """The process does not come to its end after the run."""
    from slm import watchdog

    watchdog.LEAVE_SECONDS = 2
    atexit.register(sleep_for_ever)


def rest() -> None:
    time.sleep(float(os.environ["FAULT_SECONDS"]))


def wait_for_the_word() -> None:
    while not Path(os.environ["FAULT_GO"]).exists():
        time.sleep(0.05)


def fill_the_disk_of_the_log() -> None:
    for handler in logging.getLogger("slm").handlers:
        if isinstance(handler, logging.FileHandler):
            handler.setStream(open("/dev/full", "w"))


def set_the_clock_back() -> None:
    now = time.time
    time.time = lambda: now() - 3600


def hang_up() -> None:
    os.kill(os.getpid(), signal.SIGHUP)


FAULTS = {
    "kill": kill,
    "stop": stop,
    "sleep": sleep_for_ever,
    "hold": hold_the_interpreter,
    "miss": leave_out,
    "crash": crash,
    "term": ask_to_stop,
    "term2": ask_twice,
    "termwhere": ask_and_say_where,
    "termlauncher": ask_the_launcher,
    "termlauncher2": ask_the_launcher_twice,
    "stay": stay,
    "rest": rest,
    "wait": wait_for_the_word,
    "logfull": fill_the_disk_of_the_log,
    "clock": set_the_clock_back,
    "hup": hang_up,
}


if __name__ == "__main__":
    main()
