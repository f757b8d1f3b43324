"""Gemma 4's text decoder: one stream with per-layer inputs, and attention in windows (Transformers 5.24.0).

Notation as in gemma.py. With norm an RMSNorm of its own each time, ⊙ element-wise, and E the layer's input, of x [D]:

  x = x + norm(attention(norm(x)))                    full layers have heads of another size, of which they rotate a
  x = x + norm(W_d (gelu(W_g h) ⊙ W_u h)), h = norm(x)    share of the pairs, those of the highest frequencies
  x = x + norm(W_p (gelu(W_i x) ⊙ E))                 where layers have inputs of their own
  x = s x                                             s a number of the layer

Queries, keys and values are normalised by head, values without a weight; scores are not scaled.
"""

from torch import Tensor

from thl_engine.config import Gemma4Config
from thl_engine.models import gemma
from thl_engine.models.contract import Architecture, Ops, Weights
from thl_engine.models.gemma import Attention, State, weight
from thl_engine.schedule import Block


def blocks(config: Gemma4Config) -> tuple[Block, ...]:
    """All tensors of the decoder, those that a pass reads first in the order of reading."""
    c, width, inputs = config, config.hidden_size, config.hidden_size_per_layer_input
    out = gemma.embedding_blocks(c)
    for i in range(c.num_hidden_layers):
        layer, inner = f"model.layers.{i}.", c.intermediate_size[i]
        out += [
            weight(f"{layer}input_layernorm", width),
            *gemma.attention_blocks(c, i),
            weight(f"{layer}post_attention_layernorm", width),
            weight(f"{layer}pre_feedforward_layernorm", width),
            weight(f"{layer}mlp.gate_proj", inner, width),
            weight(f"{layer}mlp.up_proj", inner, width),
            weight(f"{layer}mlp.down_proj", width, inner),
            weight(f"{layer}post_feedforward_layernorm", width),
        ]
        if inputs:
            out += [
                weight(f"{layer}per_layer_input_gate", inputs, width),
                weight(f"{layer}per_layer_projection", width, inputs),
                weight(f"{layer}post_per_layer_input_norm", width),
            ]
        out.append(Block(f"{layer}layer_scalar", (1,), "vector"))
    return (*out, weight("model.norm", width))


def layer(
    c: Gemma4Config, weights: Weights, ops: Ops, i: int, x: Tensor, own_input: Tensor, attention: Attention
) -> Tensor:
    """One decoder layer: x [B, T, D] and its per-layer input [B, T, P] to the next x."""
    prefix = f"model.layers.{i}."

    def norm(name: str, x: Tensor) -> Tensor:
        return ops.rms_norm(x, weights[f"{prefix}{name}.weight"], c.rms_norm_eps)

    def add_norm(x: Tensor, name: str, addend: Tensor) -> Tensor:
        """x with a norm of what is added."""
        return ops.rms_norm_add(addend, weights[f"{prefix}{name}.weight"], c.rms_norm_eps, x)

    def linear(name: str, x: Tensor) -> Tensor:
        return ops.linear(x, weights[f"{prefix}{name}.weight"])

    x = add_norm(x, "post_attention_layernorm", attention(weights, ops, i, norm("input_layernorm", x)))
    gate, up = (weights[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up"))
    fed = linear("mlp.down_proj", ops.geglu_linears(norm("pre_feedforward_layernorm", x), gate, up))
    x = add_norm(x, "post_feedforward_layernorm", fed)
    if c.hidden_size_per_layer_input:
        added = linear("per_layer_projection", ops.geglu(linear("per_layer_input_gate", x), own_input))
        x = add_norm(x, "post_per_layer_input_norm", added)
    scalar: Tensor = weights[f"{prefix}layer_scalar"]
    return x * scalar


def _one_stream(c: Gemma4Config, weights: Weights, ops: Ops, x: Tensor) -> Tensor:
    return x


DECODER = gemma.Decoder(blocks, _one_stream, layer, _one_stream, lambda config: (8, 4), "hidden")
ARCHITECTURE: Architecture[Gemma4Config, State] = DECODER.architecture("gemma4")
