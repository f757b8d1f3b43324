"""Gemma-3n's text decoder: AltUp streams, LAuReL, per-layer embeddings, attention in windows (Transformers 5.23.0).

Notation as in gemma.py, and n AltUp streams X_j [B, T, D] of which stream a is computed.
"""

from dataclasses import replace
from statistics import NormalDist

import torch
from torch import Tensor

from thl_engine.config import Gemma3nConfig
from thl_engine.kernels.altup import magnitude, scaled_to
from thl_engine.models import gemma
from thl_engine.models.contract import Architecture, Ops, Weights
from thl_engine.models.gemma import Attention, State, weight
from thl_engine.schedule import Block


def blocks(config: Gemma3nConfig) -> tuple[Block, ...]:
    """All tensors of the decoder, those that a pass reads first in the order of reading.

    AltUp's routers and coefficients are a few rows each and stay float32: they scale whole streams.
    """
    c, width, n = config, config.hidden_size, config.altup_num_inputs
    out = gemma.embedding_blocks(c)
    out += [weight(f"model.altup_projections.{j}", width, width) for j in range(n - 1)]
    for i in range(c.num_hidden_layers):
        layer, inner, sparse = f"model.layers.{i}.", c.intermediate_size[i], c.activation_sparsity_pattern[i] > 0.0
        out += [
            weight(f"{layer}altup.router_norm", width),
            weight(f"{layer}altup.modality_router", n, width, kind="vector"),
            weight(f"{layer}altup.prediction_coefs", n * n, n, kind="vector"),
            weight(f"{layer}input_layernorm", width),
            weight(f"{layer}laurel.linear_left", c.laurel_rank, width),
            weight(f"{layer}laurel.linear_right", width, c.laurel_rank),
            weight(f"{layer}laurel.post_laurel_norm", width),
            *gemma.attention_blocks(c, i),
            weight(f"{layer}post_attention_layernorm", width),
            weight(f"{layer}pre_feedforward_layernorm", width),
            weight(f"{layer}mlp.gate_proj", inner, width),
            weight(f"{layer}mlp.up_proj", inner, width),
            weight(f"{layer}mlp.down_proj", width, inner, transposed=sparse),
            weight(f"{layer}post_feedforward_layernorm", width),
            weight(f"{layer}altup.correction_coefs", n, n, kind="vector"),
            Block(f"{layer}altup.correct_output_scale", (width,), "vector"),
            weight(f"{layer}per_layer_input_gate", c.hidden_size_per_layer_input, width),
            weight(f"{layer}per_layer_projection", width, c.hidden_size_per_layer_input),
            weight(f"{layer}post_per_layer_input_norm", width),
        ]
    out += [weight(f"model.altup_unembed_projections.{j}", width, width) for j in range(n - 1)]
    return (*out, weight("model.norm", width))


def touched(config: Gemma3nConfig) -> dict[str, float]:
    """Share of a matrix that one row's product needs: of a sparse gate's neighbours, what the gate lets through."""
    return {
        f"model.layers.{i}.mlp.{name}_proj.weight": 1.0 - share
        for i, share in enumerate(config.activation_sparsity_pattern)
        if share > 0.0
        for name in ("up", "down")
    }


def expand(c: Gemma3nConfig, weights: Weights, ops: Ops, x: Tensor) -> Tensor:
    """The streams [n, B, T, D] that begin with x [B, T, D]: itself, and projections of its magnitude."""
    target = magnitude(x)
    others = [
        scaled_to(ops.linear(x, weights[f"model.altup_projections.{j}.weight"]), target)
        for j in range(c.altup_num_inputs - 1)
    ]
    return torch.stack([x, *others])


def collapse(c: Gemma3nConfig, weights: Weights, ops: Ops, streams: Tensor) -> Tensor:
    """The mean of the streams [n, B, T, D], the others brought back to the first one's magnitude: [B, T, D]."""
    target = magnitude(streams[0])
    others = [
        scaled_to(ops.linear(streams[j + 1], weights[f"model.altup_unembed_projections.{j}.weight"]), target)
        for j in range(c.altup_num_inputs - 1)
    ]
    return torch.stack([streams[0], *others]).mean(dim=0)


def layer(
    c: Gemma3nConfig, weights: Weights, ops: Ops, i: int, streams: Tensor, own_input: Tensor, attention: Attention
) -> Tensor:
    """One decoder layer: streams [n, B, T, D] and its per-layer input [B, T, P] to the next streams."""
    prefix, a = f"model.layers.{i}.", c.altup_active_idx

    def norm(name: str, x: Tensor) -> Tensor:
        return ops.rms_norm(x, weights[f"{prefix}{name}.weight"], c.rms_norm_eps)

    def linear(name: str, x: Tensor) -> Tensor:
        return ops.linear(x, weights[f"{prefix}{name}.weight"])

    def norm_add(name: str, x: Tensor, addend: Tensor, second: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return ops.rms_norm_add(x, weights[f"{prefix}{name}.weight"], c.rms_norm_eps, addend, second, scale)

    def coefficients(name: str, x: Tensor, offset: float = 0.0) -> Tensor:
        """AltUp's, of what the router makes of x: [B, T, n] or [B, T, n * n]."""
        return ops.altup_coefficients(
            x,
            weights[f"{prefix}altup.router_norm.weight"],
            c.rms_norm_eps,
            weights[f"{prefix}altup.modality_router.weight"],
            weights[f"{prefix}altup.{name}.weight"],
            offset,
        )

    n = c.altup_num_inputs
    predicted = ops.altup_predict(streams, coefficients("prediction_coefs", streams[a]).unflatten(-1, (n, n)))
    active = predicted[a]
    x = norm("input_layernorm", active)
    laurel = norm_add("laurel.post_laurel_norm", linear("laurel.linear_right", linear("laurel.linear_left", x)), x)
    x = norm_add("post_attention_layernorm", attention(weights, ops, i, x), active, laurel, scale=2.0**-0.5)
    wide = norm("pre_feedforward_layernorm", x)
    share = c.activation_sparsity_pattern[i]
    gate, up, down = (weights[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    if share > 0.0:
        fed = ops.geglu_sparse(ops.linear(wide, gate), wide, up, down, NormalDist().inv_cdf(share))
    else:
        fed = ops.linear(ops.geglu_linears(wide, gate, up), down)
    x = norm_add("post_feedforward_layernorm", fed, x)
    streams = ops.altup_correct(predicted, x, a, coefficients("correction_coefs", x, 1.0))
    x = streams[a]
    if c.altup_correct_scale:
        x = x * weights[f"{prefix}altup.correct_output_scale"]
    x = linear("per_layer_projection", ops.geglu(linear("per_layer_input_gate", x), own_input))
    # Always the streams from 1 on, whichever is the active one.
    return ops.altup_spread(streams, x, weights[f"{prefix}post_per_layer_input_norm.weight"], c.rms_norm_eps)


def _alive(c: Gemma3nConfig) -> tuple[int, int]:
    """Streams before and after each step, and what is computed of one."""
    return 4 * c.altup_num_inputs + 6, 3 * c.altup_num_inputs + 4


DECODER = gemma.Decoder(blocks, expand, layer, collapse, _alive, "altup_state")
ARCHITECTURE: Architecture[Gemma3nConfig, State] = replace(DECODER.architecture("gemma3n"), touched=touched)
