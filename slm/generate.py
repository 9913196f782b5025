"""Generation: prompts in, continuations out, with a key/value cache, in a batch, stopped by ids or by length.

Owns the choice of the next token, the loop and the text shown; the model and its cache are llama.py's. Under
ZeRO-3, where every forward is a collective, all ranks do equally many, whatever prompts each of them has.

    ids = generate(model, input_ids, max_new_tokens=64, temperature=0.8, top_p=0.95, eos_token_id=2, seed=0)
    [text] = generate_text(model, tokenizer, ["def main("], max_new_tokens=64, stream=True)

`B` prompts, `T` their width, `W` the longest a row can get, `V` vocabulary, `S` stop ids. Inside, every row
starts at slot 0 of the cache: what stands behind a shorter row is not seen, and overwritten as the row grows.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch

from slm import parallel
from slm.errors import UserError
from slm.model.attention import padded_bounds
from slm.model.llama import KVCache, SLMForCausalLM, uncompiled

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
) -> torch.Tensor:
    """Ids [B] drawn from the softmax of `filter_logits`.

    The largest p/q with exponential q is such a draw (the Gumbel trick), and unlike torch.multinomial it does
    not wait for the device to check the probabilities.
    """
    p_BV = filter_logits(logits_BV, temperature, top_k, top_p).softmax(-1)
    q_BV = torch.empty_like(p_BV).exponential_(generator=generator)
    # q can round to 0, and 0/0 would win.
    return (p_BV / q_BV.clamp_min_(torch.finfo(q_BV.dtype).tiny)).argmax(-1)


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
    num_tokens: int | None = None,
    on_tokens: OnTokens | None = None,
) -> torch.Tensor:
    """Continues prompts [B, T]; returns int64 [B, up to max_length]: the prompts with what was added.

    Prompts of different lengths: padded on either side, marked by attention_mask [B, T], or by pad_token_id
    unless that is a stop id too. Each is continued as if it were alone. New tokens follow the prompt's own
    last token, and what remains of a row is pad_token_id (else the first stop id, else 0).

    max_length: of a row, prompt and padding on its left included.
    max_new_tokens: of a row; the smaller counts if both are given, 128 (or what has room) if neither is.
    do_sample: draw by temperature, top_k and top_p (see filter_logits); else the likeliest token.
    eos_token_id: one or several stop ids; the one found stays in the row.
    seed: for the same draws again; None takes torch's own generator.
    use_cache: False computes everything anew for each token; for checks.
    num_tokens: ids from here on (rows that only fill up the embedding) are never chosen.
    on_tokens: called after each token with the new id of every row, None for finished ones.
    Raises UserError.
    """
    first = next(model.parameters())
    device = first.device
    collective = parallel.world_size() > 1 and hasattr(first, "ds_id")  # ZeRO-3: a forward gathers weights
    any_rank: Callable[[bool], bool] = parallel.agree if collective else bool
    eos = () if eos_token_id is None else eos_token_id
    stop_ids = [eos] if isinstance(eos, int) else list(eos)

    problem: UserError | None = None
    try:
        _check_sampling(temperature, top_k, top_p, do_sample)
        real_BT = _real_tokens(input_ids, attention_mask, pad_token_id, stop_ids)
        starts, lengths = _spans(input_ids, real_BT, model.config.vocab_size)
        limits = _limits(starts, lengths, max_length, max_new_tokens, model.config.max_position_embeddings)
    except UserError as error:
        problem = error
    if any_rank(problem is not None):
        raise problem or UserError("another rank refused its prompts or options", fix="see its message")

    generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    def choose(logits_BV: torch.Tensor) -> torch.Tensor:
        logits_BV = logits_BV[:, :num_tokens]
        if not do_sample:
            return logits_BV.argmax(-1)
        return sample(logits_BV, temperature, top_k or 0, top_p, generator)

    tokens_BW = torch.zeros(len(lengths), max(limits, default=0), dtype=torch.long)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        tokens_BW[row, :length] = input_ids[row, start : start + length]
    tokens_BW = tokens_BW.to(device)
    length_B, limit_B, stops_S = (torch.tensor(x, device=device).long() for x in (lengths, limits, stop_ids))
    longest_prompt = max(lengths, default=0)
    forwards = _forwards(model, tokens_BW, length_B, limit_B, longest_prompt, choose, stops_S, on_tokens, use_cache)

    was_training = model.training
    model.eval()
    try:
        # Compiled blocks would be compiled anew for every length of the cache.
        with torch.no_grad(), uncompiled():
            wants = next(forwards, False)
            while any_rank(wants):
                if wants:
                    wants = next(forwards, False)
                else:  # only to take part in gathering the weights for the other ranks
                    model(torch.zeros(1, 1, dtype=torch.long, device=device))
    finally:
        model.train(was_training)

    lengths = length_B.tolist()
    width = max((start + length for start, length in zip(starts, lengths, strict=True)), default=0)
    fill = pad_token_id if pad_token_id is not None else next(iter(stop_ids), 0)
    out = torch.full((len(lengths), width), fill, dtype=torch.long, device=input_ids.device)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        out[row, :start] = input_ids[row, :start]
        out[row, start : start + length] = tokens_BW[row, :length]
    return out


def _forwards(
    model: SLMForCausalLM,
    tokens_BW: torch.Tensor,
    length_B: torch.Tensor,
    limit_B: torch.Tensor,
    longest_prompt: int,
    choose: Callable[[torch.Tensor], torch.Tensor],
    stops_S: torch.Tensor,
    on_tokens: OnTokens | None,
    use_cache: bool,
) -> Iterator[bool]:
    """Extends tokens_BW and length_B in place until all rows are finished; yields True before every forward.

    A finished row goes through them unchanged. Per token the host waits once, for the ids and the stop flags.
    """
    B, W = tokens_BW.shape
    rows_B = torch.arange(B, device=tokens_BW.device)
    done_B = torch.zeros_like(length_B, dtype=torch.bool)
    dtype = model.model.embed_tokens.weight.dtype
    cache = KVCache.empty(model.config, B, W, dtype, tokens_BW.device) if use_cache else None
    if cache is not None and cache.tokens_BS is not None:
        cache.tokens_BS.copy_(tokens_BW)  # angles follow each row's own length: the first forward makes keys and values
    for step in range(W if B else 0):
        last_B = length_B - 1
        if cache is None:
            yield True
            width = min(W, longest_prompt + step)
            logits_BV = model(tokens_BW[:, :width], piece_bounds=padded_bounds(length_B, width))[rows_B, last_B]
        elif step == 0 and cache.tokens_BS is None:
            logits_BV = yield from _prefill(model, tokens_BW[:, :longest_prompt], last_B, cache)
        else:
            yield True
            cache.length_B = last_B.clone()  # a row's newest token is not cached yet
            logits_BV = model(tokens_BW[rows_B, last_B][:, None], cache=cache)[:, 0]
        slot_B = length_B.clamp(max=W - 1)
        ids_B = torch.where(done_B, tokens_BW[rows_B, slot_B], choose(logits_BV))
        tokens_BW[rows_B, slot_B] = ids_B
        length_B += ~done_B
        new_B = ids_B.masked_fill(done_B, -1)
        done_B = done_B | (ids_B[:, None] == stops_S).any(1) | (length_B >= limit_B)
        new, done = torch.stack([new_B, done_B]).tolist()
        if on_tokens is not None:
            on_tokens([None if token < 0 else token for token in new])
        if all(done):
            return


def _prefill(
    model: SLMForCausalLM, tokens_BT: torch.Tensor, last_B: torch.Tensor, cache: KVCache
) -> Generator[bool, None, torch.Tensor]:
    """Fills the cache with the prompts, some tokens a forward; returns the logits [B, V] at row ends."""
    B, T = tokens_BT.shape
    rows_B = torch.arange(B, device=tokens_BT.device)
    chunk = max(16, PREFILL_TOKENS // B)
    logits_BV = torch.empty(0)
    for start in range(0, T, chunk):
        yield True
        logits_BCV = model(tokens_BT[:, start : start + chunk], cache=cache)
        # Rows that end later are overwritten by a later chunk, so only those that end here must be right.
        here_BV = logits_BCV[rows_B, (last_B - start).clamp(0, logits_BCV.shape[1] - 1)]
        logits_BV = torch.where((last_B >= start)[:, None], here_BV, logits_BV) if start else here_BV
    return logits_BV


def _check_sampling(temperature: float, top_k: int | None, top_p: float, do_sample: bool) -> None:
    if not do_sample:
        return
    if not 0 < temperature < float("inf"):
        raise UserError(
            f"temperature is {temperature}: logits are divided by it, so it must be above 0",
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


# --- text ---------------------------------------------------------------------------------------------------


class TextStream:
    """Token ids in, text out as soon as it is final: a character spread over several tokens comes whole.

    Decodes from a few tokens back, because some tokenizers drop the space of the first token that they see.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(prompt)
        self._from, self._complete = 0, len(self._ids)  # decode from here; up to there all is shown
        self._before = decode(self._ids)  # text of [_from, _complete)
        self._num_shown = 0  # characters behind _before

    def add(self, token: int) -> str:
        """The text that this token completes; often empty inside a character."""
        self._ids.append(token)
        text = self._text()
        final = text.rstrip("\ufffd")  # what ends in replacement characters may yet become a character
        shown = final[self._num_shown :]
        self._num_shown = max(self._num_shown, len(final))
        if text == final and text:
            self._from, self._complete, self._num_shown = self._complete, len(self._ids), 0
            self._before = self._decode(self._ids[self._from :])
        return shown

    def finish(self) -> str:
        """What is left: bytes that no character came of."""
        return self._text()[self._num_shown :]

    def _text(self) -> str:
        return self._decode(self._ids[self._from :])[len(self._before) :]


def generate_text(
    model: SLMForCausalLM,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    stop_ids: Sequence[int] = (),
    stream: bool = False,
    on_tokens: OnTokens | None = None,
    **options: Any,
) -> list[str]:
    """The continuation of each prompt, without the prompt; up to the tokenizer's EOS or one of stop_ids.

    tokenizer: encode and decode; its bos_token_id goes first if it has one.
    stream: also writes the text of a single prompt to standard output as it comes.
    on_tokens and options: those of `generate`. Raises UserError.
    """
    if stream and len(prompts) != 1:
        raise UserError(f"stream is on for {len(prompts)} prompts: texts would mix", fix="stream one prompt")
    bos, eos = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos"))
    rows = [list(tokenizer.encode(prompt)) for prompt in prompts]
    if bos is not None:
        rows = [ids if ids[:1] == [bos] else [bos, *ids] for ids in rows]
    stops = {*stop_ids, *([] if eos is None else [eos])}
    texts = [TextStream(tokenizer.decode, ids) for ids in rows]
    pieces: list[list[str]] = [[] for _ in rows]

    def show(row: int, text: str) -> None:
        pieces[row].append(text)
        if stream and text:
            sys.stdout.write(text)
            sys.stdout.flush()

    def take(new: list[int | None]) -> None:
        if on_tokens is not None:
            on_tokens(new)
        for row, token in enumerate(new):
            if token is not None and token not in stops:
                show(row, texts[row].add(token))

    width = max(map(len, rows), default=0)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        mask[row, : len(ids)] = 1
    generate(
        model,
        input_ids,
        attention_mask=mask,
        eos_token_id=sorted(stops),
        num_tokens=len(tokenizer),
        on_tokens=take,
        **options,
    )
    for row, text in enumerate(texts):
        show(row, text.finish())
    if stream:
        sys.stdout.write("\n")
    return ["".join(parts) for parts in pieces]
