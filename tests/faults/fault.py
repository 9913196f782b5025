"""`slm` with a fault in one rank: what tests/faults start on each rank in place of slm.cli.

fault.py WHAT RANK STEP COUNT_FILE[*TIMES] train RECIPE [OVERRIDES...]

WHAT happens in rank RANK at the STEPth call of this attempt, counted from 1, at most TIMES times over all attempts (which
COUNT_FILE counts; once if not said). The product knows nothing of it: its functions are replaced here.
"""

import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    what, rank, step, counted = sys.argv[1:5]
    count_file, _, times = counted.partition("*")
    sys.argv = ["slm", *sys.argv[5:]]
    if os.environ.get("RANK", "0") == rank:
        arm(what, int(step), Path(count_file), int(times or 1))
    from slm.cli import main as slm

    slm()


def arm(what: str, step: int, count_file: Path, times: int) -> None:
    """Replaces the function in which WHAT happens by one that counts its calls."""
    fault, _, place = what.partition("-")
    holder, name = place_of(place)
    original = getattr(holder, name)
    calls = 0

    def replaced(*arguments, **options):
        nonlocal calls
        calls += 1
        before = int(count_file.read_text()) if count_file.exists() else 0
        if calls == step and before < times:
            count_file.write_text(str(before + 1))
            if FAULTS[fault]():
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
        from slm import checkpoint

        return checkpoint, "save_file"
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


def rest() -> None:
    time.sleep(float(os.environ["FAULT_SECONDS"]))


FAULTS = {
    "kill": kill,
    "stop": stop,
    "sleep": sleep_for_ever,
    "hold": hold_the_interpreter,
    "miss": leave_out,
    "crash": crash,
    "sigterm": ask_to_stop,
    "sigterm2": ask_twice,
    "rest": rest,
}


if __name__ == "__main__":
    main()
