"""The operations that models are written in, on each backend: torch reference (any device, differentiable) or native.

Models call an ops object; a backend is chosen once, when the engine starts. Operations may update the state tensors
that they are given in place; they return the tensors to use from then on.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from thl_engine.kernels import altup, geglu, gelu, integrator, norm, residual, rotary, shared_memory, swiglu
from thl_engine.kernels import attention as attention_kernels
from thl_engine.kernels import linear as linear_kernels
from thl_engine.kernels.int8 import dequantize
from thl_engine.kernels.norm import LAYER_NORM_EPS
from thl_engine.ops.cached_attention import Cache, CachedAttention
from thl_engine.ops.compositions import Compositions
from thl_engine.ops.state_ops import StateOps
from thl_engine.ops.weights import Adapted, Matrix, Part, Table

# Share of a gate up to which only the products that it lets through are made. With 5 % they took 0.14 of the time of
# all for one row of activations, 0.31 for 8 and 0.34 for 64 (16384 x 2048 int8, one thread, AMD EPYC Zen 5).
SPARSE_SHARE = 1 / 8


class Recorder(Protocol):
    """Does for capturable ops, while a step is captured, what they else do themselves."""

    def counter(self, value: int) -> Tensor: ...

    def each_part(self, matrix: Matrix, use: Callable[[Part], object]) -> None: ...

    def gather(self, table: Table, ids: Tensor) -> Tensor: ...


class ReferenceOps(StateOps, Compositions):
    """Plain torch on float32 values of the weights."""

    name = "reference"
    has_threads = False  # besides torch's
    sample: Callable[..., Tensor] | None = None  # the sampler's `Choose`, for logits on a device of its own
    sparse_share = 0.0  # up to which sparse products read no more of a matrix than they need
    in_place = False  # whether state tensors are updated where they lie
    capturable = False  # whether steps may be captured as graphs
    recorder: Recorder | None = None  # of such ops, while a step is captured

    attention = staticmethod(attention_kernels.attention)
    rotary_attention = staticmethod(attention_kernels.rotary_attention)
    rms_norm = staticmethod(norm.rms_norm)
    add_rms_norm = staticmethod(norm.add_rms_norm)
    add_blend = staticmethod(residual.add_blend)
    add_scaled = staticmethod(residual.add_scaled)
    gelu = staticmethod(gelu.gelu)
    rotary_tables = staticmethod(rotary.rotary_tables)
    rotate = staticmethod(rotary.rotate)
    swiglu = staticmethod(swiglu.swiglu)
    geglu = staticmethod(geglu.geglu)
    altup_predict = staticmethod(altup.predict)
    altup_correct = staticmethod(altup.correct)
    prefix_read = staticmethod(shared_memory.prefix_read)
    erase_then_add = staticmethod(shared_memory.erase_then_add)
    reasoning_update = staticmethod(shared_memory.reasoning_update)

    def counter(self, t: int) -> int | Tensor:
        """A time or position for ops that take it as a value: t, or on a device a tensor that holds it."""
        return t

    @staticmethod
    def devices() -> tuple[str, ...]:
        """Kinds of device that these ops compute on."""
        return ("cpu", "cuda")

    def scratch_bytes(
        self, page_elements: int, reused_elements: int = 0, scores: int = 0, inputs: int = 0, dequantized: int = 0
    ) -> int:
        """Memory that ops need beside their operands, for pages of up to `page_elements` weights.

        reused_elements: weights that one op reads again after their parts have been let go (`integrate`).
        scores: of the largest `attention`, for all heads. inputs: activations that the widest product takes.
        dequantized: bytes of a layer's int8 keys and values as float32.
        """
        # The page as float32, and the product of its integers on the way there. Scores before and after each step. What
        # a step of `integrate` makes on the way, or a feed-forward part before and after its activation.
        return 2 * 4 * (page_elements + inputs) + 4 * reused_elements + 2 * 4 * scores + dequantized

    def cached_attention(self, cache: Cache | None, past: int, rows: int, device: torch.device) -> CachedAttention:
        """Attention of `rows` positions behind the first `past` to a KVCache, or without one to each other."""
        return CachedAttention(self, cache, int(self.counter(past)), rows, device)

    def gather(self, table: Table, ids: Tensor) -> Tensor:
        """Rows of a table: int64 [B] -> float32 [B, C]."""
        return table.rows(ids)

    def linear(
        self,
        x: Tensor,
        matrix: Matrix | Adapted,
        bias: Tensor | None = None,
        *,
        norm: tuple[Tensor, Tensor] | None = None,
        gelu: bool = False,
        addend: Tensor | None = None,
    ) -> Tensor:
        """x [..., C] -> [..., R], with what commonly stands around a product.

        norm: weight and bias of a `layer_norm` of x before; gelu: `gelu` after; addend [..., R]: added at the end. Of
        an adapted matrix the base is read first, then `down`, then `up`.
        """
        if isinstance(matrix, Adapted):
            return self.linear_adapted(x, matrix, bias, norm, gelu, addend)
        if norm is not None:
            x = self.layer_norm(x, *norm)
        out = self.product(x, matrix, bias)
        if gelu:
            out = self.gelu(out)
        return out if addend is None else out + addend

    def product(self, x: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
        """The product alone, which training varies."""
        out = [
            linear_kernels.linear(x, as_float32(part), None if bias is None else bias[part.start : part.stop])
            for part in matrix.parts()
        ]
        return out[0] if len(out) == 1 else torch.cat(out, dim=-1)

    def linear_adapted(
        self,
        x: Tensor,
        matrix: Adapted,
        bias: Tensor | None,
        norm: tuple[Tensor, Tensor] | None,
        gelu: bool,
        addend: Tensor | None,
    ) -> Tensor:
        """`linear` of an adapted matrix; an adapter whose `up` is zero leaves the base's values as they are."""
        if norm is not None:
            x = self.layer_norm(x, *norm)
        out = self.linear(x, matrix.base, bias).add_(self.low_rank(x, matrix))
        if gelu:
            out = self.gelu(out)
        return out if addend is None else out + addend

    def linears(self, x: Tensor, matrices: Sequence[Matrix | Adapted]) -> list[Tensor]:
        """`linear` of the same activations with several matrices."""
        return [self.linear(x, matrix) for matrix in matrices]

    def swiglu_linear(
        self, gate: Tensor, up: Tensor, matrix: Matrix, blend: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> Tensor:
        """`linear` of silu(gate) * up, both [..., C]: [..., R]. blend: x, fast and gate of an `add_blend` with it."""
        out = self.linear(swiglu.swiglu(gate, up), matrix)
        return out if blend is None else self.add_blend(blend[0], blend[1], out, blend[2])

    def linear_heads(self, x: Tensor, matrix: Matrix) -> Tensor:
        """Each head's features through its own rows: x [B, H, C], matrix [R, C] -> [B, R], R/H rows a head."""
        batch, heads, _ = x.shape
        out = [linear_kernels.linear(x[:, h], as_float32(part)) for part, h, _ in by_head(matrix, heads)]
        return torch.cat(out, dim=-1)

    def linear_transposed(self, x: Tensor, matrix: Matrix) -> Tensor:
        """x [B, R] times matrix [R, C]: [B, C]."""
        out = x.new_zeros(x.shape[0], matrix.shape[1])
        for part in matrix.parts():
            out = out + linear_kernels.linear_transposed(x[:, part.start : part.stop], as_float32(part))
        return out

    def linear_transposed_heads(self, x: Tensor, matrix: Matrix) -> Tensor:
        """x [B, H, R/H] times each head's rows of matrix [R, C]: [B, H, C]."""
        batch, heads, per_head = x.shape
        out = [x.new_zeros(batch, matrix.shape[1]) for _ in range(heads)]
        for part, h, first in by_head(matrix, heads):
            values = x[:, h, first : first + part.stop - part.start]
            out[h] = out[h] + linear_kernels.linear_transposed(values, as_float32(part))
        return torch.stack(out, dim=1)

    def linear_sparse(self, x: Tensor, matrix: Matrix | Adapted) -> Tensor:
        """`linear` of x [..., C] that is mostly zero; natively it skips rows of a transposed matrix [C, R]."""
        if isinstance(matrix, Adapted):
            return self.linear_sparse(x, matrix.base).add_(self.low_rank(x, matrix))
        if not matrix.transposed:
            return self.linear(x, matrix)
        return self.linear_transposed(x.reshape(-1, x.shape[-1]), matrix).view(*x.shape[:-1], matrix.shape[1])

    def geglu_linear(self, gate: Tensor, x: Tensor, up: Matrix | Adapted, quantile: float) -> Tensor:
        """`geglu` of gate [..., R] and of x [..., C] through up [R, C]."""
        return self.geglu(gate, self.linear(x, up), quantile)

    def integrate(
        self,
        x: Tensor,
        context: Tensor,
        first: Matrix,
        first_bias: Tensor,
        second: Matrix,
        second_bias: Tensor,
        mu: Tensor,
        *,
        steps: int,
        threshold: float | None = None,
        together: bool = False,
        trajectory: bool = False,
        group: int = 1,
        norm: tuple[Tensor, Tensor] | None = None,
    ) -> integrator.Integration:
        """INL's integrator with the controller's two matrices, each read once whatever the number of steps.

        norm: weight and bias of a `layer_norm` of x before.
        """
        if norm is not None:
            x = self.layer_norm(x, *norm)
        return integrator.integrate(
            x,
            context,
            _whole(first),
            first_bias,
            _whole(second),
            second_bias,
            mu,
            steps=steps,
            threshold=threshold,
            together=together,
            trajectory=trajectory,
            group=group,
        )

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Over the last axis, biased variance."""
        return norm.layer_norm(x, weight, bias, LAYER_NORM_EPS)

    def add_layer_norm(self, x: Tensor, addend: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """x + addend, and its `layer_norm`."""
        return norm.add_layer_norm(x, addend, weight, bias, LAYER_NORM_EPS)


def as_float32(part: Part) -> Tensor:
    return dequantize(part.data, part.scales, part.group)


def _whole(matrix: Matrix) -> Tensor:
    """float32 [R, C] in memory of its own, for an op that uses a matrix again after its parts have been let go."""
    parts = [
        as_float32(part).clone() if part.data.dtype == torch.float32 else as_float32(part) for part in matrix.parts()
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def by_head(matrix: Matrix, heads: int) -> Iterator[tuple[Part, int, int]]:
    """Parts cut at the boundaries between heads: (part, head, its first row within the head)."""
    per_head = matrix.shape[0] // heads
    for part in matrix.parts():
        start = part.start
        while start < part.stop:
            h = start // per_head
            stop = min(part.stop, (h + 1) * per_head)
            rows = slice(start - part.start, stop - part.start)
            scales = None if part.scales is None else part.scales[rows]
            yield Part(start, stop, part.data[rows], scales, part.group), h, start - h * per_head
            start = stop
