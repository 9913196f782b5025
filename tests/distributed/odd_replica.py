"""Run by ranks.run_ranks: tensors that every rank has a copy of, some of them not the same; prints what replicas.check says.

Arguments: for each case, which ranks hold another value, as "2" or "2,3"; "-" for none.
"""

import sys

import torch

from slm import parallel, replicas
from slm.runtime import discover_ranks
from slm.safety import ReplicasDiffer

if __name__ == "__main__":
    parallel.start(parallel.local_device(discover_ranks().local_rank))
    for case in sys.argv[1:]:
        odd = parallel.rank() in [int(rank) for rank in case.split(",") if rank != "-"]
        tensors = {"same": torch.arange(6.0), "weight": torch.linspace(0, 1, 1000).bfloat16()}
        if odd:
            tensors["weight"][123] *= 1.5
        try:
            replicas.check(tensors.items(), 7)
            said = "the same"
        except ReplicasDiffer as error:
            said = str(error).splitlines()[0]
        said_by_all = parallel.gather_objects(said)
        if parallel.rank() == 0:
            assert len(set(said_by_all)) == 1, said_by_all
            print(f"case {case}: {said}", flush=True)
    parallel.stop()
