"""INL's layers over the tokens of a pass, cut into chunks: attention, the integrator, a feed-forward part.

Notation as in `inl.py`: B batch, T tokens, n of a chunk, D d_model.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thl_engine.config import INLConfig
from thl_engine.kernels.integrator import Integration, spread
from thl_engine.kernels.sinusoid import sinusoid
from thl_engine.models.contract import Ops, Record, Weights
from thl_engine.models.kv_cache import KVCache
from thl_engine.ops.cached_attention import CachedAttention


def run_layers(
    c: INLConfig,
    weights: Weights,
    ops: Ops,
    tokens: Tensor,
    past: int,
    cache: KVCache | None,
    blocked: Tensor | None,
    length: int,
    together: bool,
    training: bool,
    record: Record | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """tokens [B, T] behind `past` others, in chunks of `length`: features after the final norm, [B, n, D] of each
    chunk, and the iterations of each row, int64 [B * T] of each layer.

    Chunks go through a layer one after the other, so that beside the stream only one chunk's activations are alive.
    """
    positions = sinusoid(tokens.shape[1], c.d_model, ops.counter(past), tokens.device)
    xs = _Chunks(_embed(c, weights, ops, tokens) + positions, length)
    attentions = [ops.cached_attention(cache, past + j * length, x.shape[1], tokens.device) for j, x in enumerate(xs)]
    used = []
    for i in range(c.num_layers):
        attended = xs.like()
        for j, attention in enumerate(attentions):
            attended[j] = _attend(c, weights, ops, i, xs[j], attention, blocked)
            xs[j] = xs[j] + attended[j]
        xs, iterations = _integrate(c, weights, ops, i, xs, attended, together, training, record)
        del attended
        for j in range(len(xs)):
            xs[j] = _feed_forward(weights, ops, i, xs[j])
        used.append(iterations)
        if record is not None:
            record(f"layer{i}.block_output", torch.cat(list(xs), dim=1))
    for j in range(len(xs)):
        xs[j] = ops.layer_norm(xs[j], *_norm(weights, "final_norm"))
    return list(xs), used


class _Chunks(Sequence[Tensor]):
    """A stream [B, T, D] in chunks [B, n, D] of `length` tokens. Several lie in one piece of memory, and one that is
    set is copied there: blocks of their own, among a chunk's activations, would leave the heap in pieces."""

    def __init__(self, x: Tensor, length: int) -> None:
        self._whole, self._length = x, length
        self._parts = list(x.split(length, dim=1))

    def like(self) -> "_Chunks":
        """Others of the same shape, to be set."""
        return _Chunks(torch.empty_like(self._whole), self._length)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, j: Any) -> Any:
        return self._parts[j].contiguous()  # of several sequences, a chunk's rows lie apart

    def __setitem__(self, j: int, value: Tensor) -> None:
        if len(self._parts) == 1:  # which training differentiates
            self._parts[j] = value
        else:
            self._parts[j].copy_(value)


def _embed(c: INLConfig, weights: Weights, ops: Ops, tokens: Tensor) -> Tensor:
    name = "token_embedding.embed_low.weight" if c.use_lowrank_embeddings else "token_embedding.weight"
    x = ops.gather(weights[name], tokens.reshape(-1))
    if c.use_lowrank_embeddings:
        x = ops.linear(x, weights["token_embedding.project_up.weight"])
    out: Tensor = x.unflatten(0, tokens.shape)
    return out


def _attend(
    c: INLConfig, weights: Weights, ops: Ops, i: int, x: Tensor, attention: CachedAttention, blocked: Tensor | None
) -> Tensor:
    """Attention of x [B, T, D] over itself and what the cache holds, the output projection included."""
    prefix = f"layers.{i}.attention."
    qkv = ops.linear(
        x,
        weights[f"{prefix}in_proj_weight"],
        weights[f"{prefix}in_proj_bias"],
        norm=_norm(weights, f"layers.{i}.norm_attn"),
    )
    query, key, value = qkv.view(*x.shape[:2], 3, c.num_heads, c.head_dim).unbind(2)
    attention.append(i, key, value)
    mixed = attention(i, query, 1.0 / math.sqrt(c.head_dim), blocked=blocked, last=True)
    return ops.linear(mixed, weights[f"{prefix}out_proj.weight"], weights[f"{prefix}out_proj.bias"])


def _integrate(
    c: INLConfig,
    weights: Weights,
    ops: Ops,
    i: int,
    xs: _Chunks,
    contexts: _Chunks,
    together: bool,
    training: bool,
    record: Record | None,
) -> tuple[_Chunks, Tensor]:
    """Chunks [B, n, D] of x plus where the integrator takes their norm, and the iterations of each row, int64 [B * T].

    `together`, chunks that would stop before another are taken on to its step.
    """
    prefix = integrator_prefix(c, i)
    mu, group = weights[f"{prefix}mu_global"] + weights[f"{prefix}mu_local_offsets"], c.hierarchical_group_size
    stops = c.use_adaptive_stopping and not training

    def run(j: int, steps: int, threshold: float | None) -> Integration:
        return ops.integrate(
            xs[j].flatten(0, 1),
            contexts[j].flatten(0, 1),
            weights[f"{prefix}controller.0.weight"],
            weights[f"{prefix}controller.0.bias"],
            weights[f"{prefix}controller.2.weight"],
            weights[f"{prefix}controller.2.bias"],
            mu,
            steps=steps,
            threshold=threshold,
            together=together,
            trajectory=training and record is not None,
            group=group,
            norm=_norm(weights, f"layers.{i}.norm1"),
        )

    moved, used, steps, kept = xs.like(), [], [], []
    for j, x in enumerate(xs):
        out = run(j, c.num_iterations_per_layer, c.adaptive_convergence_threshold if stops else None)
        moved[j] = x + out.x.view_as(x)
        used.append(out.iterations.view(x.shape[:2]))
        steps.append(out.steps)
        kept.append(None if record is None else out)
    if stops and len(xs) > 1:
        most = max(map(int, steps))
        for j, x in enumerate(xs):
            if int(steps[j]) < most:
                out = run(j, most, None)
                moved[j], kept[j] = x + out.x.view_as(x), None if record is None else out
        steps = [most]
    iterations = torch.cat(used, dim=1).flatten()
    if record is not None:

        def rows(values: list[Any]) -> Tensor:
            """A chunk's rows [B * n, ...] each, as those of the batch [B * T, ...]."""
            return torch.cat([v.unflatten(0, x.shape[:2]) for v, x in zip(values, xs, strict=True)], dim=1).flatten(
                0, 1
            )

        record(f"layer{i}.mu", spread(mu, group, c.d_model))
        record(f"layer{i}.x_final", rows([out.x for out in kept if out]))
        record(f"layer{i}.v_final", rows([out.v for out in kept if out]))
        record(f"layer{i}.iterations_used", iterations)
        record(f"layer{i}.steps_taken", torch.as_tensor(steps[0]))
        if training:
            record(f"layer{i}.x_trajectory", rows([out.x_trajectory for out in kept if out]))
            record(f"layer{i}.v_trajectory", rows([out.v_trajectory for out in kept if out]))
    return moved, iterations


def _feed_forward(weights: Weights, ops: Ops, i: int, x: Tensor) -> Tensor:
    prefix = f"layers.{i}.ff."
    inner = ops.linear(
        x, weights[f"{prefix}0.weight"], weights[f"{prefix}0.bias"], norm=_norm(weights, f"layers.{i}.norm2"), gelu=True
    )
    return ops.linear(inner, weights[f"{prefix}3.weight"], weights[f"{prefix}3.bias"], addend=x)


def _norm(weights: Weights, name: str) -> tuple[Tensor, Tensor]:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


def integrator_prefix(c: INLConfig, i: int) -> str:
    """Prefix of a layer's integrator; one that stops early is wrapped once more."""
    return f"layers.{i}.inl.inl." if c.use_adaptive_stopping else f"layers.{i}.inl."
