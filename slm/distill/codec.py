"""How a teacher's entries are stored: 8-bit values, 17 or more bits of index, and back to log-masses on any device.

Owns the arithmetic between Entries and the planes of a cache, and the tag that ties a row to its token.

    planes = encode_entries(entries, vocab_size, "top_k", (1.0,))     # numpy, ready to be written
    index_NK, log_p_NK, log_tail_N = RawTargets(...).decode(temperature=1.0)

What is stored of an entry is how much less likely than the row's first it is: x nats become the byte round(255 sqrt(x / R));
x > R is taken for R. It costs about R / (6 * 255^2) nats for each nat of the entropy beyond the first entry's. R is 18
at T = 1 and grows with the highest temperature, at which unlikely entries matter more. Errors of the head do not move mass
to or from the tail, which is kept in float32: the head is scaled to what the tail leaves.

`N`, `C` tokens, `P` planes, `K` entries, `T` temperatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from slm.data.batches import tensors_on
from slm.data.order import GOLDEN, mix_many
from slm.distill.targets import Entries


def value_range(kind: str, temperatures: Sequence[float]) -> float:
    """R in nats. A sample's values are of their own temperature already."""
    return 18.0 + 6.0 * max(0.0, max(temperatures) - 1.0) if kind == "top_k" else 18.0


def encode_values(log_p: torch.Tensor, nats: float) -> torch.Tensor:
    """Logarithms of ratios to the first (<= 0, -inf allowed) -> uint8."""
    x = (-log_p.float()).clamp(0.0, nats)
    return (255 * (x / nats).sqrt()).round().to(torch.uint8)


def decode_values(codes: torch.Tensor, nats: float) -> torch.Tensor:
    """uint8 -> float32."""
    return codes.float().div_(255).square_().mul_(-nats)


def index_bits(vocab_size: int) -> int:
    """Bits of an index beyond 16."""
    return max(0, (vocab_size - 1).bit_length() - 16)


def pack_index(index: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 [..., K] -> the low 16 bits (uint16 [..., K]) and a bitmap of each further one (uint8 [..., bits, ceil(K / 8)])."""
    low = (index & 0xFFFF).astype(np.uint16)
    bits = [np.packbits((index >> (16 + b)) & 1, axis=-1, bitorder="little") for b in range(index_bits(vocab_size))]
    empty = np.zeros((*index.shape[:-1], 0, -(-index.shape[-1] // 8)), np.uint8)
    return low, np.stack(bits, axis=-2).astype(np.uint8) if bits else empty


def unpack_index(low_NK: torch.Tensor, high_NbY: torch.Tensor) -> torch.Tensor:
    """int16 (the bytes of uint16) [N, K] and uint8 [N, bits, ceil(K / 8)] -> int64 [N, K], on their device."""
    index_NK = low_NK.long() & 0xFFFF
    k = index_NK.shape[1]
    eight = torch.arange(8, device=low_NK.device, dtype=torch.uint8)
    for b in range(high_NbY.shape[1]):
        bit_NK = ((high_NbY[:, b, :, None] >> eight) & 1).flatten(1)[:, :k]
        index_NK += bit_NK.long() << (16 + b)
    return index_NK


def encode_entries(
    entries: Entries, vocab_size: int, kind: str, temperatures: Sequence[float]
) -> dict[str, np.ndarray]:
    """The planes of C tokens, by name; without the tags, which are of the tokens and not of the teacher."""
    low, high = pack_index(entries.index_CPK.cpu().numpy(), vocab_size)
    planes = {
        "idx_lo": low,
        "idx_hi": high,
        "val": encode_values(entries.log_p_CPK - entries.log_p_CPK[..., :1], value_range(kind, temperatures))
        .cpu()
        .numpy(),
        "log_tail": entries.log_tail_CT.cpu().numpy(),
        "label": entries.label_log_p_C.cpu().numpy().astype(np.float16),
    }
    if entries.heads_CP is not None:
        planes["heads"] = entries.heads_CP.cpu().numpy().astype(np.uint8)
    return planes


def token_tags(tokens: np.ndarray, following: np.ndarray, places: np.ndarray) -> np.ndarray:
    """uint16 [N]: a hash of each token, the next one (-1 for none) and the token's place in its shard."""
    with np.errstate(over="ignore"):
        x = tokens.astype(np.uint64) + following.astype(np.int64).view(np.uint64) * np.uint64(GOLDEN)
        x ^= places.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
    return (mix_many(x, np.uint64(0)) >> np.uint64(48)).astype(np.uint16)


@dataclass(frozen=True)
class RawTargets:
    """Rows of N tokens as they stand in a cache; decoded where they are needed, so that a GPU gets the few bytes."""

    kind: str
    temperatures: tuple[float, ...]
    idx_lo_NPK: torch.Tensor  # int16, the bytes of uint16
    idx_hi_NPbY: torch.Tensor  # uint8
    val_NPK: torch.Tensor  # uint8
    log_tail_NT: torch.Tensor  # float32
    heads_NP: torch.Tensor | None = None  # uint8

    @classmethod
    def of(cls, kind: str, temperatures: tuple[float, ...], planes: dict[str, np.ndarray]) -> RawTargets:
        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.require(array, requirements=["C", "W"]))  # a map is copied

        return cls(
            kind,
            temperatures,
            tensor(planes["idx_lo"].view(np.int16)),
            tensor(planes["idx_hi"]),
            tensor(planes["val"]),
            tensor(planes["log_tail"]),
            tensor(planes["heads"]) if kind == "sampled" else None,
        )

    def to(self, device: torch.device | str) -> RawTargets:
        if torch.device(device).type == "cpu":
            return self
        return tensors_on(self, device)

    def decode(
        self, temperature: float, k: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(index_NK int64, log-mass of the entries at the temperature, log-mass of the rest or None for a sample).

        The masses add up to 1. A smaller k takes the likeliest of a top_k row; the mass of the others goes to the rest.
        Raises ValueError for what the rows do not hold.
        """
        if temperature not in self.temperatures:
            raise ValueError(f"temperature {temperature} is not among the cache's {self.temperatures}")
        t = self.temperatures.index(temperature)
        stored = self.val_NPK.shape[2]
        if k is not None and (k > stored or (k < stored and self.kind == "sampled")):
            raise ValueError(f"{k} entries cannot be had from a {self.kind} cache of {stored}")
        plane = t if self.kind == "sampled" else 0
        index_NK = unpack_index(self.idx_lo_NPK[:, plane], self.idx_hi_NPbY[:, plane])
        value_NK = decode_values(self.val_NPK[:, plane], value_range(self.kind, self.temperatures))
        log_tail_N = self.log_tail_NT[:, t]
        log_head_N = torch.log1p(-log_tail_N.exp().clamp(max=1.0))
        if self.kind == "sampled":
            return index_NK, self._sampled(value_NK, log_tail_N, log_head_N, plane), None
        log_p_NK = (value_NK / temperature).log_softmax(1) + log_head_N[:, None]
        if k is not None and k < stored:
            log_tail_N = torch.logaddexp(log_tail_N, log_p_NK[:, k:].logsumexp(1))
            index_NK, log_p_NK = index_NK[:, :k], log_p_NK[:, :k]
        return index_NK, log_p_NK, log_tail_N

    def plausible(self, labels_N: torch.Tensor, label_log_p_N: torch.Tensor, vocab_size: int, most: float) -> bool:
        """Whether the rows fit the teacher's own log-probability of the labels, which is stored beside them: entries are
        tokens, different ones; a label among them is as likely as it should be, and one that is not is no likelier than
        the last. Without T = 1 among the temperatures, only the former."""
        for plane in range(self.val_NPK.shape[1]):
            index_NK = unpack_index(self.idx_lo_NPK[:, plane], self.idx_hi_NPbY[:, plane])
            if int(index_NK.max()) >= vocab_size or bool((index_NK.sort(1).values.diff(dim=1) == 0).any()):
                return False
        if 1.0 not in self.temperatures:
            return True
        index_NK, log_p_NK, _ = self.decode(1.0)
        certain_NK = torch.ones_like(index_NK, dtype=torch.bool)
        if self.heads_NP is not None:
            heads_N = self.heads_NP[:, self.temperatures.index(1.0)].long()
            certain_NK = torch.arange(index_NK.shape[1]) < heads_N[:, None]
        is_label_NK = (index_NK == labels_N[:, None]) & certain_NK
        found_N = is_label_NK.any(1)
        log_p_N = torch.where(is_label_NK, log_p_NK, 0.0).sum(1)
        least_N = torch.where(certain_NK, log_p_NK, torch.inf).amin(1)
        # Beyond the range of the bytes all entries look alike.
        clamped_N = label_log_p_N < log_p_NK.amax(1) - value_range(self.kind, self.temperatures) + 1
        fits_N = torch.where(found_N, (log_p_N - label_log_p_N).abs() <= most, label_log_p_N <= least_N + most)
        return bool((fits_N | clamped_N).all())

    def _sampled(
        self, value_NK: torch.Tensor, log_tail_N: torch.Tensor, log_head_N: torch.Tensor, plane: int
    ) -> torch.Tensor:
        """The exact heads scaled to what the rest leaves; the drawn ones share the rest."""
        assert self.heads_NP is not None
        k = value_NK.shape[1]
        heads_N = self.heads_NP[:, plane].long()
        is_head_NK = torch.arange(k, device=value_NK.device) < heads_N[:, None]
        head_NK = torch.where(is_head_NK, value_NK, -torch.inf)
        scale_N = torch.where(heads_N > 0, log_head_N - head_NK.logsumexp(1), 0.0)
        each_N = log_tail_N - torch.log((k - heads_N).float())
        return torch.where(is_head_NK, value_NK + scale_N[:, None], each_N[:, None])
