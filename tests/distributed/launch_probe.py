"""What the launcher's tests start on each rank: ranks that meet in all_reduce until told to stop.

launch_probe.py RUN_DIR NUM_STEPS [EXIT_CODE]
"""

import os
import sys
import time
from pathlib import Path

from slm.runtime import StopRequest, discover_ranks, write_exit


def main() -> int:
    run_dir, num_steps, code = Path(sys.argv[1]), int(sys.argv[2]), int((sys.argv[3:] or ["0"])[0])
    stop = StopRequest()
    ranks = discover_ranks()
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        for step in range(num_steps):
            stop_asked = torch.tensor([float(stop.signal_name is not None)])
            dist.all_reduce(stop_asked)
            if step == 0:
                facts = [os.getpid(), os.environ["OMP_NUM_THREADS"], os.environ["MASTER_PORT"]]
                (run_dir / f"rank-{ranks.rank}").write_text(" ".join(str(fact) for fact in facts))
            if stop_asked:
                code, deadline = (
                    75,
                    time.monotonic() + 5,
                )  # the other rank may have been told a moment earlier
                while stop.signal_name is None and time.monotonic() < deadline:
                    time.sleep(0.01)
                (run_dir / f"signal-{ranks.rank}").write_text(str(stop.signal_name))
                break
            time.sleep(0.02)
    except RuntimeError as error:  # gloo: the other rank is gone
        write_exit(run_dir, 5, f"rank {ranks.rank} lost the others: {error}")
        return 5
    if ranks.rank == 0:
        write_exit(run_dir, code, "the probe ended in order")
    dist.barrier()
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
