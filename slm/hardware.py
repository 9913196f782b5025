"""The GPUs that `slm plan --gpu` knows: makers' figures, and what of them is taken for granted. A table; no torch.

    gpu = find_gpu("h200")

Peaks are dense (without sparsity) and of bfloat16. Memory is what CUDA reports for the card, not the maker's decimal figure.
"""

from __future__ import annotations

from dataclasses import dataclass

from slm.errors import UserError

# Of a GPU's memory, what the plan fills with tensors: the rest is for the CUDA context, NCCL, cuBLAS and fragmentation. Published
# long-context runs end at 0.91 to 0.98 of 80 and 141 GB cards (ArcticTraining, projects/sequence-parallelism: 71.9 and 137 GB).
USABLE = 0.92

# What the CPUs of a node read and write, shared by its GPUs; what of its printed bandwidth a GPU reaches to and from host memory
# that is page-locked, and that is not (ds_configs/: pin_memory false), which the driver copies once more. Assumptions, of which
# nothing was measured here: two sockets of eight channels of DDR4-3200, as of a DGX A100, have 410 GB/s, and 0.45 of it.
HOST_MEMORY_BANDWIDTH = 180e9
PINNED, PAGEABLE = 0.8, 0.4
# Memory of a server, beyond which a setting is taken only if nothing else fits: how much yours has is not known here. A DGX H100
# has 2 TB (its data sheet), most have less.
HOST_MEMORY = 2e12


@dataclass(frozen=True)
class GPU:
    name: str
    memory_gib: float
    peak_flops: float  # bfloat16, dense
    float32_flops: float  # without tensor cores: torch's default, which slm leaves
    memory_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s to the others of its node, one way: half of what makers print
    network_bandwidth: float  # bytes/s of the network card that a server of the kind has for each GPU
    host_bandwidth: float  # bytes/s from and to host memory, one way
    matmul_efficiency: float  # see slm/forecast.py
    attention_efficiency: float
    efficiency_from: str  # where these two come from, in words

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_gib * USABLE * 2**30)


# Efficiencies: fitted to published runs on Ampere and on Hopper (forecast.py, benchmarks/published_speeds.py); for other kinds
# nobody's runs were at hand, and Hopper's are taken as they are.
_RUNS = "from what published runs reached on"
_OTHER = "with the H100's efficiencies: no runs on this kind were at hand, so that they may be far off"
_A100_80, _H100 = (0.62, 0.525, f"{_RUNS} this kind"), (0.447, 0.30, f"{_RUNS} this kind")
_A100_40 = (*_A100_80[:2], f"{_RUNS} the a100-80, whose compute it has (one run on this kind agrees within 8 %)")
_H200 = (*_H100[:2], f"{_RUNS} the h100, whose compute it has")
_BORROWED = (*_H100[:2], _OTHER)
_GB, _NIC_400, _NIC_200 = 1e9, 50e9, 25e9

GPUS = {
    gpu.name: gpu
    for gpu in (
        # nvidia.com/en-us/data-center/a100 (data sheet r4): 312 TFLOP/s, 1,555 and 2,039 GB/s, NVLink 600 GB/s, PCIe 4; in a
        # DGX A100 200 Gb/s a GPU.
        GPU("a100-40", 39.4, 312e12, 19.5e12, 1555 * _GB, 300 * _GB, _NIC_200, 25 * _GB, *_A100_40),
        GPU("a100-80", 79.1, 312e12, 19.5e12, 2039 * _GB, 300 * _GB, _NIC_200, 25 * _GB, *_A100_80),
        # nvidia.com/en-us/data-center/h100 (SXM): 989 TFLOP/s, 3.35 TB/s, NVLink 900 GB/s, PCIe 5; DGX H100: 400 Gb/s a GPU.
        GPU("h100", 79.1, 989e12, 67e12, 3350 * _GB, 450 * _GB, _NIC_400, 50 * _GB, *_H100),
        # nvidia.com/en-us/data-center/h200 (SXM): the same compute, 4.8 TB/s.
        GPU("h200", 139.8, 989e12, 67e12, 4800 * _GB, 450 * _GB, _NIC_400, 50 * _GB, *_H200),
        # nvidia.com/en-us/data-center/dgx-b200, for 8: 72 PFLOP/s of FP8, so 2,250 TFLOP/s each; 64 TB/s, NVLink 14.4 TB/s.
        GPU("b200", 178.0, 2250e12, 75e12, 8000 * _GB, 900 * _GB, _NIC_400, 50 * _GB, *_BORROWED),
        # nvidia.com/en-us/data-center/l40s: 362 TFLOP/s, 864 GB/s; no NVLink: PCIe 4, which is its way to the network too.
        GPU("l40s", 44.4, 362e12, 91.6e12, 864 * _GB, 25 * _GB, 12.5 * _GB, 25 * _GB, *_BORROWED),
        # nvidia.com/en-us/geforce/graphics-cards/40-series/rtx-4090 (Ada white paper): 165 TFLOP/s, 1,008 GB/s, PCIe 4.
        GPU("rtx4090", 23.6, 165e12, 82.6e12, 1008 * _GB, 25 * _GB, 12.5 * _GB, 25 * _GB, *_BORROWED),
    )
}


def find_gpu(name: str) -> GPU:
    """By name, in any case. Raises UserError."""
    if name.lower() not in GPUS:
        raise UserError(f"--gpu is {name!r}, of which nothing is known here", fix=f"use one of {', '.join(GPUS)}")
    return GPUS[name.lower()]
