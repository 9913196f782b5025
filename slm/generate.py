"""Generation: token ids in, their continuations out, with a key/value cache, in a batch, stopped by ids or by length.

Owns the choice of the next token and the loop. The model and its cache are llama.py's, the fast step for one token a row
model/decode.py's, text completion.py's. Under ZeRO-3, where every forward is a collective, all ranks do equally many, whatever
prompts each of them has.

    ids = generate(model, input_ids, max_new_tokens=64, temperature=0.8, top_p=0.95, eos_token_id=2, seed=0)

`B` prompts, `T` their width, `C` of a chunk, `V` vocabulary. Inside, every row starts at slot 0 of the cache: what stands behind
a shorter row is not seen, and overwritten as the row grows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Iterator, Sequence

import torch

from slm import parallel
from slm.errors import UserError
from slm.model.attention import padded_bounds
from slm.model.decode import DecodeStep
from slm.model.llama import KVCache, SLMForCausalLM, uncompiled
from slm.model.rope import follows_length

log = logging.getLogger("slm")

DEFAULT_NEW_TOKENS = 128
# Prompt tokens (of all rows) per forward: bounds the logits and the attention mask of a long prompt.
PREFILL_TOKENS = 1024

OnTokens = Callable[[list[int | None]], None]


# --- choosing a token ---------------------------------------------------------------------------------------


def filter_logits(
    logits_BV: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> torch.Tensor:
    """Scaled float32 logits, -inf for what must not be drawn; order and ties as in transformers' warpers.

    top_k: only the k likeliest (0: all).
    top_p: the fewest likeliest that reach this probability (arXiv 1904.09751).
    """
    logits_BV = logits_BV.float() / temperature
    if 0 < top_k < logits_BV.shape[-1]:
        smallest_B1 = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, -torch.inf)
    if top_p < 1.0:
        ascending_BV, order_BV = logits_BV.sort()
        drop_BV = ascending_BV.softmax(-1).cumsum(-1) <= 1 - top_p
        drop_BV[:, -1] = False  # the likeliest always stays
        logits_BV = logits_BV.masked_fill(drop_BV.scatter(1, order_BV, drop_BV), -torch.inf)
    return logits_BV


def sample(
    logits_BV: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(a number, ids) [B] drawn from the softmax of `filter_logits`; the number is NaN where there is no softmax.

    The largest p/q with exponential q is such a draw (the Gumbel trick), and unlike torch.multinomial it does
    not wait for the device to check the probabilities.
    """
    p_BV = filter_logits(logits_BV, temperature, top_k, top_p).softmax(-1)
    q_BV = torch.empty_like(p_BV).exponential_(generator=generator)
    # q can round to 0, and 0/0 would win.
    return (p_BV / q_BV.clamp_min_(torch.finfo(q_BV.dtype).tiny)).max(-1)


# --- the loop -----------------------------------------------------------------------------------------------


def generate(
    model: SLMForCausalLM,
    input_ids: torch.Tensor,
    *,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = 0,
    top_p: float = 1.0,
    do_sample: bool = True,
    pad_token_id: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    attention_mask: torch.Tensor | None = None,
    seed: int | None = None,
    use_cache: bool = True,
    compiled: bool = False,
    num_tokens: int | None = None,
    on_tokens: OnTokens | None = None,
) -> torch.Tensor:
    """Continues prompts [B, T]; returns int64 [B, up to max_length]: the prompts with what was added.

    Prompts of different lengths: padded on either side, marked by attention_mask [B, T], or by pad_token_id
    unless that is a stop id too. Greedily each is continued as if it were alone. New tokens follow the prompt's own
    last token, and what remains of a row is pad_token_id (else the first stop id, else 0).

    max_length: of a row, prompt and padding on its left included.
    max_new_tokens: of a row; the smaller counts if both are given, 128 (or what has room) if neither is.
    do_sample: draw by temperature, top_k and top_p (see filter_logits); else the likeliest token.
    eos_token_id: one or several stop ids; the one found stays in the row.
    seed: for the same draws again; None takes torch's own generator.
    use_cache: False computes everything anew for each token; for checks.
    compiled: each step by torch.compile, which takes half a minute or more once for a shape; for a GPU (model/decode.py).
    num_tokens: ids from here on (rows that only fill up the embedding) are never chosen.
    on_tokens: called after each token with the new id of every row, None for finished ones.
    Raises UserError.
    """
    first = next(model.parameters())
    device = first.device
    partitioned = hasattr(
        first, "ds_id"
    )  # ZeRO-3: a module's forward gathers its weights, which are not here otherwise
    collective = partitioned and parallel.world_size() > 1
    any_rank: Callable[[bool], bool] = parallel.agree if collective else bool
    eos = () if eos_token_id is None else eos_token_id
    stop_ids = [eos] if isinstance(eos, int) else list(eos)

    problem: UserError | None = None
    try:
        _check_sampling(temperature, top_k, top_p, do_sample)
        real_BT = _real_tokens(input_ids, attention_mask, pad_token_id, stop_ids)
        starts, lengths = _spans(input_ids, real_BT, model.config.vocab_size)
        limits = _limits(starts, lengths, max_length, max_new_tokens, model.config.max_position_embeddings)
        if compiled and follows_length(model.config):
            raise UserError(
                "a step cannot be compiled for rotary angles that follow the length (dynamic, longrope)",
                fix="leave --compile (compiled=True) out",
            )
    except UserError as error:
        problem = error
    if any_rank(problem is not None):
        raise problem or UserError("another rank refused its prompts or options", fix="see its message")

    generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    def choose(logits_BV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits_BV = logits_BV[:, :num_tokens]
        if not do_sample:
            return logits_BV.max(-1)
        return sample(logits_BV, temperature, top_k or 0, top_p, generator)

    rows = [
        input_ids[row, start : start + length].tolist()
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]
    lean = use_cache and not partitioned and not follows_length(model.config)
    compiled = compiled and lean
    forwards = _forwards(model, rows, limits, choose, set(stop_ids), on_tokens, use_cache, lean, compiled)

    # Not first in inference mode: training could not use them afterwards.
    model._inv_freq_R = model._inv_freq_R.to(device)
    was_training = model.training
    model.eval()
    try:
        # Blocks that are compiled for training would be compiled anew for every length of the cache.
        stance = torch.compiler.set_stance("default") if compiled else uncompiled()
        with torch.inference_mode() if lean else torch.no_grad(), stance:
            wants = True
            while True:
                if wants:
                    try:
                        wants = next(forwards, False)
                    except UserError as error:
                        problem, wants = error, False
                else:  # only to take part in gathering the weights for the other ranks
                    model(torch.zeros(1, 1, dtype=torch.long, device=device))
                if not any_rank(wants):
                    break
    finally:
        model.train(was_training)
    if problem is not None:
        raise problem

    width = max((start + len(ids) for start, ids in zip(starts, rows, strict=True)), default=0)
    fill = pad_token_id if pad_token_id is not None else next(iter(stop_ids), 0)
    out = torch.full((len(rows), width), fill, dtype=torch.long)
    for row, (start, ids) in enumerate(zip(starts, rows, strict=True)):
        out[row, :start] = input_ids[row, :start]
        out[row, start : start + len(ids)] = torch.tensor(ids)
    return out.to(input_ids.device)


def _forwards(
    model: SLMForCausalLM,
    rows: list[list[int]],
    limits: list[int],
    choose: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    stops: set[int],
    on_tokens: OnTokens | None,
    use_cache: bool,
    lean: bool,
    compiled: bool,
) -> Iterator[bool]:
    """Extends the rows in place until all are finished; yields True before every forward.

    Finished rows go through them as they are, and what comes out is not looked at. Per token the host waits once, for the ids.
    """
    if not rows:
        return
    weight = next(model.parameters())
    device = weight.device
    done = [False] * len(rows)
    cache, step = None, None
    if use_cache:
        slots = -(-max(limits) // 64) * 64
        if compiled:  # few different ones, each of which is compiled
            slots = max(slots, 1 << (max(limits) - 1).bit_length())
        cache = KVCache.empty(model.config, len(rows), slots, weight.dtype, device)
        step = DecodeStep(model, cache, compiled) if lean else None
        if cache.tokens_BS is not None:
            # The first forward makes all keys and values, at the angles of each row's length.
            tokens_BT, _ = _padded(rows, device)
            cache.tokens_BS[:, : tokens_BT.shape[1]] = tokens_BT
    ids_B = torch.empty(0)
    while not all(done):
        if cache is None:
            yield True
            logits_BV = _at_ends(model, rows, device)
        elif not ids_B.numel() and cache.tokens_BS is None:
            logits_BV = yield from _prefill(model, rows, cache, lean)
        else:
            yield True
            # A row's newest token is not in the cache yet. What a finished row puts in its last slot nobody looks at.
            lengths = [len(ids) - 1 for ids in rows]
            if step is not None:
                logits_BV = step(ids_B, lengths)
            else:
                cache.length_B = torch.tensor(lengths, device=device)
                logits_BV = model(torch.tensor([ids[-1:] for ids in rows], device=device), cache=cache)[:, 0]
        how_likely_B, ids_B = choose(logits_BV)
        new: list[int | None] = [None] * len(rows)
        for row, (token, how_likely) in enumerate(zip(ids_B.tolist(), how_likely_B.tolist(), strict=True)):
            if not done[row]:
                if math.isnan(how_likely):
                    raise UserError(
                        f"row {row}, token {len(rows[row])}: no next token has a probability (NaN)",
                        fix="is the temperature very low, give --temperature 0; else the weights are damaged: evaluate them",
                    )
                rows[row].append(token)
                new[row] = token
                done[row] = token in stops or len(rows[row]) >= limits[row]
        if on_tokens is not None:
            on_tokens(new)


def _at_ends(model: SLMForCausalLM, rows: list[list[int]], device: torch.device) -> torch.Tensor:
    """Logits [B, V] after each row, with everything computed anew."""
    tokens_BT, length_B = _padded(rows, device)
    logits_BTV = model(tokens_BT, piece_bounds=padded_bounds(length_B, tokens_BT.shape[1]))
    return logits_BTV[torch.arange(len(rows), device=device), length_B - 1]


def _padded(rows: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [B, T] with zeros on the right, lengths [B])"""
    tokens_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, ids in enumerate(rows):
        tokens_BT[row, : len(ids)] = torch.tensor(ids)
    return tokens_BT.to(device), torch.tensor([len(ids) for ids in rows], device=device)


def _prefill(
    model: SLMForCausalLM, rows: list[list[int]], cache: KVCache, lean: bool
) -> Generator[bool, None, torch.Tensor]:
    """Fills the cache with the prompts, some tokens a forward; returns the logits [B, V] at row ends.

    lean: the head sees the row ends alone.
    """
    tokens_BT, length_B = _padded(rows, cache.length_B.device)
    B, T = tokens_BT.shape
    rows_B = torch.arange(B, device=tokens_BT.device)
    chunk = max(16, PREFILL_TOKENS // B)
    out_BX = torch.empty(0)
    for start in range(0, T, chunk):
        yield True
        chunk_BC = tokens_BT[:, start : start + chunk]
        C = chunk_BC.shape[1]
        # Nothing is before the first chunk, so attention needs neither the cache nor a mask.
        bounds = None if start else padded_bounds(length_B.clamp(max=C), C)
        with uncompiled():
            forward = model.hidden_states if lean else model
            out_BCX = forward(chunk_BC, piece_bounds=bounds, cache=cache)
        # Rows that end later are overwritten by a later chunk, so only those that end here must be right.
        here_BX = out_BCX[rows_B, (length_B - 1 - start).clamp(0, C - 1)]
        out_BX = torch.where((length_B > start)[:, None], here_BX, out_BX) if start else here_BX
    return model.lm_head(out_BX) if lean else out_BX


def _check_sampling(temperature: float, top_k: int | None, top_p: float, do_sample: bool) -> None:
    if not do_sample:
        return
    if not 0 < temperature < float("inf"):
        raise UserError(
            f"temperature is {temperature}: logits are divided by it, so it must be finite and above 0",
            fix="give one such as 0.8; for the likeliest token do_sample=False (--temperature 0)",
        )
    if top_k is not None and top_k < 0:
        raise UserError(f"top_k is {top_k}: a number of tokens to draw from", fix="give 1 or more, 0 for all")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}: a probability to draw from", fix="give one in (0, 1]; 1 is all")


def _real_tokens(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    pad_token_id: int | None,
    stop_ids: list[int],
) -> torch.Tensor:
    """True [B, T] where a token is a prompt's own. Raises UserError."""
    if input_ids.ndim != 2 or input_ids.is_floating_point():
        raise UserError(
            f"input_ids is {input_ids.dtype} of shape {list(input_ids.shape)}, not token ids [batch, tokens]",
            fix="give torch.tensor([ids])",
        )
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise UserError(
                f"attention_mask has shape {list(attention_mask.shape)}, input_ids {list(input_ids.shape)}",
                fix="give 1 for each token of a prompt and 0 for padding",
            )
        return attention_mask.to(input_ids.device).bool()
    if pad_token_id is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    other_BT = input_ids != pad_token_id
    if pad_token_id in stop_ids:  # it may well be the prompt's own: many models' BOS, EOS and pad are one id
        if not bool(other_BT[:, -1:].all()):
            log.warning("a prompt ends in pad_token_id, a stop id too: taken as its own token")
        return torch.ones_like(other_BT)
    # Padding is what stands before the first other token and behind the last; between, it is the prompt's.
    return (other_BT.cumsum(1) > 0) & (other_BT.flip(1).cumsum(1).flip(1) > 0)


def _spans(input_ids: torch.Tensor, real_BT: torch.Tensor, vocab_size: int) -> tuple[list[int], list[int]]:
    """Each prompt's first column and its length. Raises UserError."""
    lengths = real_BT.sum(1).tolist()
    if 0 in lengths:
        raise UserError(
            f"prompt {lengths.index(0)} is empty: there is no token whose successor could be predicted",
            fix="give at least one token, such as the tokenizer's BOS",
        )
    if not lengths:
        return [], []
    starts_B = real_BT.int().argmax(1)
    columns_T = torch.arange(real_BT.shape[1], device=real_BT.device)
    inside_BT = (columns_T >= starts_B[:, None]) & (columns_T < (starts_B + real_BT.sum(1))[:, None])
    if not torch.equal(inside_BT, real_BT):
        raise UserError("attention_mask has zeros inside a prompt", fix="pad on the left or the right only")
    low, high = (int(x) for x in input_ids[real_BT].aminmax())
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"input_ids holds {low if low < 0 else high}, but the vocabulary is 0 to {vocab_size - 1}",
            fix="use the tokenizer that the model was trained with",
        )
    return starts_B.tolist(), lengths


def _limits(
    starts: list[int], lengths: list[int], max_length: int | None, max_new_tokens: int | None, context: int
) -> list[int]:
    """How many tokens each row may have at last, padding not counted. Raises UserError."""
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}, so nothing is generated", fix="give at least 1")
    default = max_length is None and max_new_tokens is None
    limits = []
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        rooms = [DEFAULT_NEW_TOKENS, max(1, context - length)] if default else []
        rooms += [] if max_new_tokens is None else [max_new_tokens]
        rooms += [] if max_length is None else [max_length - start - length]
        if min(rooms) < 1:
            raise UserError(
                f"max_length is {max_length}, but prompt {row} has {start + length} tokens: no room to grow",
                fix="raise max_length, or give max_new_tokens",
            )
        limits.append(length + min(rooms))
        if limits[-1] > context:
            raise UserError(
                f"prompt {row} could grow to {limits[-1]} tokens, but the model's context is {context} "
                "(max_position_embeddings): beyond it the text is no longer to be trusted",
                fix=f"use a shorter prompt or fewer new tokens (--max-new-tokens): {context} in all",
            )
    return limits
