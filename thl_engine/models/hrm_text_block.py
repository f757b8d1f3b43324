"""A block of HRM-Text: gated attention and a gated feed-forward part, of a prompt piece by piece.

Notation as in hrm_text.py: B batch, T tokens, D hidden_size, A heads of d features, S positions that attention sees.
"""

from collections.abc import Callable, Sequence
from math import sqrt

import torch
from torch import Tensor

from thl_engine.config import HRMTextConfig
from thl_engine.models.contract import Ops, Weights
from thl_engine.ops.cached_attention import CachedAttention

PIECE = 512  # tokens of a prompt that go through a block's products together
KEYS_VALUES = ("self_attn.k_proj", "self_attn.v_proj")  # what a block reads for all positions, then for those wanted
REST = ("self_attn.q_proj", "self_attn.gate_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

Sees = Callable[[int, int], Tensor | None]  # of queries [first, stop): `blocked` of `CachedAttention`


def through(
    c: HRMTextConfig,
    weights: Weights,
    ops: Ops,
    prefix: str,
    number: int,
    x: Tensor,
    attention: CachedAttention,
    tables: tuple[Tensor, Tensor],
    sees: Sees,
    wanted: list[tuple[int, int]],
) -> Tensor:
    """x [B, T, D] through one block, whose keys and values are `number` in the cache: of the positions wanted."""
    batch, count, _ = x.shape
    pieces = pieces_of(count)
    at_once = pieces == wanted and len(pieces) == 1

    def projected(names: Sequence[str], some: Tensor) -> list[Tensor]:
        return _linears(c, weights, ops, prefix, names, some)

    def normed(first: int, stop: int) -> Tensor:
        return ops.rms_norm(x[:, first:stop], None, c.rms_norm_eps)

    def heads(some: Tensor) -> Tensor:
        return some.view(*some.shape[:-1], c.num_attention_heads, c.head_dim)

    queried: list[Tensor] = []
    if at_once:
        key, value, *queried = projected((*KEYS_VALUES, *REST[:2]), normed(0, count))
    elif len(pieces) == 1:
        key, value = projected(KEYS_VALUES, normed(0, count))
    else:
        both = [projected(KEYS_VALUES, normed(*piece)) for piece in pieces]
        key, value = (torch.cat(some, dim=1) for some in zip(*both, strict=True))
    attention.append(number, heads(key), heads(value), tables=tables)
    out = []
    for first, stop in wanted:
        query, gate = queried or projected(REST[:2], normed(first, stop))
        rotations = tables[0][first:stop], tables[1][first:stop]
        mixed = attention(
            number,
            heads(query),
            1.0 / sqrt(c.head_dim),
            tables=rotations,
            blocked=sees(first, stop),
            last=stop == wanted[-1][1],
        )
        here = x[:, first:stop]
        here = _linear(c, weights, ops, f"{prefix}{REST[2]}", ops.sigmoid_gate(gate, mixed), here)
        wide, up = projected(REST[3:5], ops.rms_norm(here, None, c.rms_norm_eps))
        out.append(_linear(c, weights, ops, f"{prefix}{REST[5]}", ops.swiglu(wide, up), here))
    return out[0] if len(out) == 1 else torch.cat(out, dim=1)


def _linears(
    c: HRMTextConfig, weights: Weights, ops: Ops, prefix: str, names: Sequence[str], x: Tensor
) -> list[Tensor]:
    """x [..., D] through each of a block's matrices of that name."""
    out = ops.linears(x, [weights[f"{prefix}{name}.weight"] for name in names])
    biased = (c.attention_bias if name.startswith("self_attn") else c.mlp_bias for name in names)
    return [
        made + weights[f"{prefix}{name}.bias"] if has else made
        for made, name, has in zip(out, names, biased, strict=True)
    ]


def _linear(c: HRMTextConfig, weights: Weights, ops: Ops, name: str, x: Tensor, addend: Tensor) -> Tensor:
    """addend + x [..., C] through the matrix of that name, which ends a residual branch."""
    biased = c.attention_bias if ".self_attn." in name else c.mlp_bias
    out: Tensor = ops.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"] if biased else None, addend=addend)
    return out


def all_see_all(count: int, past: int, device: torch.device) -> Sees:
    """A prefix of `count` tokens behind `past` positions; one token alone sees all there are anyway."""
    nothing = torch.zeros(1, 1, 1, past + count, dtype=torch.bool, device=device) if count > 1 else None
    return lambda first, stop: nothing


def earlier_and_prefix(count: int, past: int, device: torch.device, types: Tensor | None = None) -> Sees:
    """Tokens see earlier ones, and those of int64 [B, count] types that are 1 each other, behind `past` positions."""

    def blocked(first: int, stop: int) -> Tensor | None:
        if types is None and (first, stop) == (0, count):
            return None  # the ordinary mask
        here = torch.arange(past + first, past + stop, device=device)[:, None]
        later = torch.arange(past + count, device=device)[None, :] > here
        if types is None:
            return later
        prefix = types == 1
        seen = torch.nn.functional.pad(prefix, (past, 0), value=True)  # earlier positions are not later ones
        return later & ~(prefix[:, first:stop, None] & seen[:, None, :])[:, None]

    return blocked


def pieces_of(count: int) -> list[tuple[int, int]]:
    return [(first, min(first + PIECE, count)) for first in range(0, count, PIECE)]
