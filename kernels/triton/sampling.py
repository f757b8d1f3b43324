"""The next token chosen where its logits are; the definition is `Sampler` in thl_engine/text/sampler.py.

Nothing is sorted. Both filters and the draw ask for the token at which a measure, summed over tokens in descending
order of their logits, first exceeds a limit. It is found digit by digit of its logit's bits: a launch adds up the
measure by digit, the next reads off which digit it is. Sums are integers, so that their order cannot matter: a
weight is a multiple of 2^-40 of the likeliest token's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 2048  # tokens that a program looks at
BITS = tl.constexpr(11)  # of a digit; three hold a float32
BINS = tl.constexpr(1 << 11)
COPIES = tl.constexpr(8)  # of the sums, since many tokens share a first digit
FRACTION = tl.constexpr(2.0**40)
MOST_TOKENS = 1 << 22  # of the largest weight add up within 64 bits
# What is added up, and against which limit: tokens against k, weights against top-p's share, weights against the draw.
COUNT, NUCLEUS, DRAW = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
PHASES, DIGITS = 3, 3
# What is known of a row, int64: the least key that top-k keeps, the weights that top-p keeps, the drawn token's key and
# its rank among tokens with that key.
KEPT, TOTAL, KEY, RANK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
FACTS = 4
TEMPERATURE, TOP_K, TOP_P, UNIFORM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _key(x):
    """A number from 0 to 2^32 that orders as float32 x does."""
    bits = (x + 0.0).to(tl.int32, bitcast=True).to(tl.int64)  # of +0 also where x is -0
    return tl.where(bits < 0, -1 - bits, bits + 2147483648)


@triton.jit
def _logit(key):
    """The number whose key it is."""
    return tl.where(key < 2147483648, -1 - key, key - 2147483648).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _weight(x, top, numbers):
    """exp((x - top) / temperature) as a multiple of 2^-40."""
    exponent = (x.to(tl.float64) - top.to(tl.float64)) / tl.load(numbers + TEMPERATURE)
    return (tl.exp(exponent) * FRACTION).to(tl.int64)


@triton.jit
def _by_digit(sums):
    """The sums of a level, copies together."""
    bins = tl.arange(0, BINS)
    values = tl.load(sums + bins)
    for copy in tl.static_range(1, COPIES):
        values += tl.load(sums + copy * BINS + bins)
    return values


@triton.jit
def _limit(sums, facts, numbers, PHASE: tl.constexpr):
    """What the sum must exceed."""
    if PHASE == COUNT:
        return tl.load(numbers + TOP_K).to(tl.int64) - 1
    if PHASE == NUCLEUS:
        return (tl.sum(_by_digit(sums), axis=0).to(tl.float64) * tl.load(numbers + TOP_P)).to(tl.int64)
    total = tl.load(facts + TOTAL)
    return tl.minimum((total.to(tl.float64) * tl.load(numbers + UNIFORM)).to(tl.int64), total - 1)


@triton.jit
def _find(sums, limit, LEVELS: tl.constexpr):
    """After LEVELS digits: the first digits of the token's key, and the sum over all tokens above those."""
    key = limit * 0
    above = limit * 0
    bins = tl.arange(0, BINS)
    for level in tl.static_range(LEVELS):
        values = _by_digit(sums + level * COPIES * BINS)
        before = above + tl.sum(values, axis=0) - tl.cumsum(values, axis=0)
        digit = tl.max(tl.where(before + values > limit, bins, 0), axis=0)
        above = tl.sum(tl.where(bins == digit, before, 0), axis=0)
        key = key * BINS + digit
    return key, above


@triton.jit
def _extremes(logits, tops, places, masses, count, CHUNK: tl.constexpr):
    """Of each chunk: its largest logit, NaN if one is not finite; where it first is; exponentials relative to it."""
    i = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + i, mask=i < count, other=float("-inf"))
    fine = (x == x) & (tl.abs(x) < float("inf"))
    faults = tl.sum(tl.where(fine | (i >= count), 0, 1), axis=0)
    top = tl.max(x, axis=0)
    tl.store(tops + tl.program_id(0), tl.where(faults > 0, float("nan"), top))
    tl.store(places + tl.program_id(0), tl.min(tl.where(x == top, i, count), axis=0))
    tl.store(masses + tl.program_id(0), tl.sum(tl.exp(x.to(tl.float64) - top.to(tl.float64)), axis=0))


@triton.jit
def _weigh(
    logits,
    tops,
    places,
    masses,
    numbers,
    weights,
    row,
    out,
    count,
    chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    GREEDY: tl.constexpr,
):
    """Weights of all tokens, and of the row its largest logit and the logarithm of all exponentials; the greedy choice
    into `out`, or -1 for a row that is not finite."""
    c = tl.arange(0, CHUNKS)
    partial = tl.load(tops + c, mask=c < chunks, other=float("-inf"))
    faults = tl.sum(tl.where(partial == partial, 0, 1), axis=0)
    top = tl.max(partial, axis=0)
    if tl.program_id(0) == 0:
        mass = tl.load(masses + c, mask=c < chunks, other=0.0)
        total = tl.log(tl.sum(mass * tl.exp(partial.to(tl.float64) - top.to(tl.float64)), axis=0))
        first = tl.min(tl.where(partial == top, tl.load(places + c, mask=c < chunks, other=count), count), axis=0)
        tl.store(row, top.to(tl.float64))
        tl.store(row + 1, top.to(tl.float64) + total)
        tl.store(out, tl.where(faults > 0, -1, first).to(tl.float64))
        tl.store(out + 1, -total)
    if not GREEDY:
        i = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits + i, mask=i < count, other=float("-inf"))
        tl.store(weights + i, _weight(x, top, numbers), mask=i < count)


@triton.jit
def _add_up(
    logits, weights, sums, facts, numbers, count, CHUNK: tl.constexpr, PHASE: tl.constexpr, LEVEL: tl.constexpr
):
    """The measure of tokens whose first LEVEL digits are those found, by their next digit."""
    i = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    key = _key(tl.load(logits + i, mask=i < count, other=0.0))
    counted = i < count
    if PHASE == COUNT:
        amount = tl.full([CHUNK], 1, tl.int64)
    else:
        amount = tl.load(weights + i, mask=counted, other=0)
        counted &= (key >= tl.load(facts + KEPT)) & (amount > 0)
    if LEVEL > 0:
        found, _ = _find(sums, _limit(sums, facts, numbers, PHASE), LEVEL)
        counted &= (key >> (BITS * (3 - LEVEL))) == found
    at = (LEVEL * COPIES + tl.program_id(0) % COPIES) * BINS + ((key >> (BITS * (2 - LEVEL))) & (BINS - 1))
    tl.atomic_add(sums + at, amount, mask=counted, sem="relaxed")


@triton.jit
def _settle(sums, facts, numbers, row, PHASE: tl.constexpr):
    """What a phase found."""
    limit = _limit(sums, facts, numbers, PHASE)
    key, above = _find(sums, limit, 3)
    if PHASE == COUNT:
        tl.store(facts + KEPT, key)
    else:
        own = _weight(_logit(key), tl.load(row), numbers)
        before = (limit - above) // tl.maximum(own, 1)  # equals of the token that the sum has room for
        if PHASE == NUCLEUS:
            tl.store(facts + TOTAL, above + (before + 1) * own)
        else:
            tl.store(facts + KEY, key)
            tl.store(facts + RANK, before)


@triton.jit
def _place_amount(logits, weights, facts, i, count, RANKED: tl.constexpr):
    """What tokens i add to the sum in order of ids: one if they have the drawn key, or the weight if it is kept."""
    key = _key(tl.load(logits + i, mask=i < count, other=0.0))
    if RANKED:
        return tl.where((i < count) & (key == tl.load(facts + KEY)), 1, 0).to(tl.int64)
    return tl.where(key >= tl.load(facts + KEPT), tl.load(weights + i, mask=i < count, other=0), 0)


@triton.jit
def _chunk_sums(logits, weights, facts, sums, count, CHUNK: tl.constexpr, RANKED: tl.constexpr):
    i = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    amount = _place_amount(logits, weights, facts, i, count, RANKED)
    tl.store(sums + tl.program_id(0), tl.sum(amount, axis=0))


@triton.jit
def _pick(
    logits,
    weights,
    facts,
    sums,
    numbers,
    row,
    out,
    count,
    chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    RANKED: tl.constexpr,
):
    """The token at which the sum in order of ids first exceeds the rank or the draw, and its log-probability."""
    c = tl.arange(0, CHUNKS)
    partial = tl.load(sums + c, mask=c < chunks, other=0)
    if RANKED:
        limit = tl.load(facts + RANK)
    else:
        total = tl.sum(partial, axis=0)
        limit = tl.minimum((total.to(tl.float64) * tl.load(numbers + UNIFORM)).to(tl.int64), total - 1)
    upto = tl.cumsum(partial, axis=0)
    chunk = tl.min(tl.where(upto > limit, c, chunks - 1), axis=0)
    limit -= tl.sum(tl.where(c < chunk, partial, 0), axis=0)
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    upto = tl.cumsum(_place_amount(logits, weights, facts, i, count, RANKED), axis=0)
    token = tl.min(tl.where(upto > limit, i, count - 1), axis=0)
    if tl.load(out) >= 0:
        tl.store(out, token.to(tl.float64))
        tl.store(out + 1, tl.load(logits + token).to(tl.float64) - tl.load(row + 1))


def sample(
    logits: Tensor, uniform: float, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """float64 [2] on the logits' device: the token's id, and its log-probability under the logits as they are.

    logits: float32 [V], V up to 4 million. uniform: from 0 to 1, 1 excluded; unused where temperature is 0, which takes
    the largest logit. top_k, top_p as in `Sampling`. The id is -1 if a logit is not finite.
    """
    count = logits.shape[0]
    if count > MOST_TOKENS:
        raise ValueError(f"sample: expected at most {MOST_TOKENS} logits, found {count}")
    logits, grid = logits.contiguous(), (triton.cdiv(count, CHUNK),)
    chunks = {"CHUNK": CHUNK, "CHUNKS": triton.next_power_of_2(grid[0])}
    tops, places = logits.new_empty(grid), logits.new_empty(grid, dtype=torch.int64)
    masses, row, out = (logits.new_empty(size, dtype=torch.float64) for size in (grid[0], 2, 2))
    _extremes[grid](logits, tops, places, masses, count, CHUNK=CHUNK, num_warps=8)
    if temperature == 0:
        _weigh[1,](logits, tops, places, masses, None, None, row, out, count, grid[0], GREEDY=True, **chunks)
        return out
    numbers = torch.tensor([temperature, top_k or 0, 1.0 if top_p is None else top_p, uniform], dtype=torch.float64)
    numbers = numbers.to(logits.device, non_blocking=True)
    weights, partial = logits.new_empty(count, dtype=torch.int64), places
    _weigh[grid](
        logits, tops, places, masses, numbers, weights, row, out, count, grid[0], GREEDY=False, num_warps=8, **chunks
    )
    facts = torch.zeros(FACTS, dtype=torch.int64, device=logits.device)
    ranked = top_p is not None and top_p < 1
    phases = [COUNT.value] * bool(top_k and top_k < count) + [NUCLEUS.value, DRAW.value] * ranked
    if phases:
        sums = torch.zeros(PHASES, DIGITS * COPIES.value * BINS.value, dtype=torch.int64, device=logits.device)
    for phase in phases:
        for level in range(DIGITS):
            _add_up[grid](
                logits, weights, sums[phase], facts, numbers, count, CHUNK=CHUNK, PHASE=phase, LEVEL=level, num_warps=8
            )
        _settle[1,](sums[phase], facts, numbers, row, PHASE=phase, num_warps=8)
    _chunk_sums[grid](logits, weights, facts, partial, count, CHUNK=CHUNK, RANKED=ranked, num_warps=8)
    _pick[1,](logits, weights, facts, partial, numbers, row, out, count, grid[0], RANKED=ranked, num_warps=8, **chunks)
    return out
