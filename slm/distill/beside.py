"""Teachers in a student's step, before it costs anything: what they hold on a GPU and compute. Pure; imports no torch.

Owns the arithmetic of what student.py, models.py and losses.py make; docs/memory.md states it.

    found = teachers_of(recipe, phase)
    found.beside, found.not_counted             # shapes of those that run beside the student; what cannot be known, in words
    teacher_memory(found, config, tokens=8192)

Letters: `E`, `F`, `Q`, `J`, `V` as in activations.py, of the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slm.activations import chunk_tokens
from slm.fields import points
from slm.model.config import ModelConfig
from slm.model.shape import shape_of

if TYPE_CHECKING:
    from slm.distill.settings import TeacherCache
    from slm.recipe import Phase, Recipe

WEIGHT_BYTES = 2  # on a GPU a teacher is in bfloat16, whatever the student's precision (models.py)
_ONLINE_ENTRIES = 64  # student.py's k where the loss gives none


@dataclass(frozen=True)
class Teachers:
    """Of one phase's loss."""

    beside: tuple[ModelConfig, ...] = ()  # run beside the student, whole on each GPU
    not_counted: tuple[str, ...] = ()  # run too, but of unknown shape
    form: str = ""  # of the targets; "" without a teacher
    entries: tuple[int, ...] = ()  # a token's, of each sparse target
    second_chunk: bool = False  # the loss needs another buffer for the labels' softmax (losses._in_place)


@dataclass(frozen=True)
class TeacherMemory:
    """Bytes on one rank."""

    weights: int = 0  # always
    targets: int = 0  # from a micro-batch's forward pass of the teacher to the next one's
    working: int = 0  # in the teacher's forward pass
    chunk: int = 0  # in the loss, beside the student's chunk of logits; without 32 bytes an entry of the chunk


def teachers_of(recipe: Recipe, phase: Phase) -> Teachers:
    if phase.loss.type != "distill":
        return Teachers()
    loss = phase.loss
    used = {name: recipe.teacher[name] for name in loss.mixing(recipe.teacher)}
    form = loss.form(recipe.teacher)
    beside, unknown, entries = [], [], []
    for name, teacher in used.items():
        if form != "full":
            entries.append(loss.k or _ONLINE_ENTRIES if teacher.cache is None else teacher.cache.k)
        if teacher.cache is not None:
            continue
        shape = shape_of(Path(teacher.model))
        if shape is not None:
            beside.append(shape)
            continue
        why = "is not of a shape that this plan can read" if Path(teacher.model).exists() else "is not on this machine"
        unknown.append(
            f"the teacher{'' if name == 'teacher' else ' ' + name} runs beside the student, and {teacher.model} {why}: on every "
            "GPU its weights (2 bytes each) and what it works with come on top of this memory, and its forward pass (2 FLOPs a "
            "weight and token, and attention) on top of this time"
        )
    at_one = all(value == 1 for _, value in points(loss.temperature))
    return Teachers(tuple(beside), tuple(unknown), form, tuple(entries), len(used) > 1 or not at_one)


def cache_bytes_per_token(cache: TeacherCache, vocab_size: int) -> int:
    """Of a file of cache.py (planes; held together by a test): an entry has two bytes of its index, a bitmap for each further bit
    of it, and one of its value; a token four bytes a temperature for the rest, and four for label and tag."""
    sets = len(cache.temperatures) if cache.kind == "sampled" else 1
    more_bits = max(0, (vocab_size - 1).bit_length() - 16)
    entries = sets * (3 * cache.k + more_bits * -(-cache.k // 8))
    return entries + 4 * len(cache.temperatures) + 4 + (sets if cache.kind == "sampled" else 0)


def teacher_memory(
    teachers: Teachers, student: ModelConfig, tokens: int, value_bytes: int = 2, device: str = "cuda"
) -> TeacherMemory:
    """tokens: of one micro-batch on this rank. value_bytes: of a teacher's weight (on a CPU 4)."""
    if not teachers.form:
        return TeacherMemory()
    b = value_bytes
    weights = sum(shape.num_parameters() for shape in teachers.beside) * b
    chunk = min(tokens, chunk_tokens(student.vocab_size, device)) * student.vocab_size
    second = 4 * chunk if teachers.second_chunk else 0
    if teachers.form == "full":  # its hidden states; each chunk's p of every teacher, and log p of one
        targets = sum(tokens * shape.hidden_size * b for shape in teachers.beside)
        num = len(teachers.beside)
        second += 4 * chunk * (num + 1) if num else 0
    else:  # an index of 8 bytes and a float32 an entry, and the rest's float32
        targets = sum((12 * k + 4) * tokens for k in teachers.entries)
    working = max((_forward_bytes(shape, teachers.form, tokens, b, device) for shape in teachers.beside), default=0)
    return TeacherMemory(weights, targets, working, second)


def _forward_bytes(config: ModelConfig, form: str, tokens: int, b: int, device: str) -> int:
    """Without gradients: in a block its input, the sum after attention, a norm and one half's products (of the MLP's width
    four, as measured on a CPU), beside cosines and sines; or a chunk of logits on the way to its likeliest k."""
    E, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    Q, J = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    block = tokens * ((3 * E + max(2 * Q + 2 * J, 4 * F)) * b + 4 * config.head_dim)
    if form == "full":
        return block
    # targets.top_k: as they come and divided by T; in float32 log p, scaled and, for the entropy, the product and its sum's
    # terms, with a mask.
    return max(block, tokens * E * b + min(tokens, chunk_tokens(V, device)) * V * (2 * b + 17))


def forward_flops(config: ModelConfig, seq_len: int) -> tuple[float, float]:
    """Of one token: (2 a weight in matrix products, 4 a query-key pair and head's dimension of whole squares)."""
    attention = 4.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq_len
    return 2.0 * config.matmul_parameters(), attention
