"""Operations on Triton kernels: on a CUDA device, or on the CPU under triton's interpreter (for tests).

What is not overridden here is cheap in torch. Importing this module needs triton.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from thl_engine import cuda
from thl_engine.cached_attention import CachedAttention
from thl_engine.kernels import integrator
from thl_engine.kernels.linear import widen
from thl_engine.kernels.triton import attention, elementwise, linear, norm, sampling
from thl_engine.kernels.triton import integrator as integrator_kernel
from thl_engine.kernels.triton.arithmetic import INTERPRETED
from thl_engine.kernels.triton.linear import Weights
from thl_engine.kernels.triton.linear_transposed import linear_transposed
from thl_engine.ops import LAYER_NORM_EPS
from thl_engine.triton_attention import RingAttention
from thl_engine.triton_state import TritonState
from thl_engine.weights import Matrix, Part, Table


class TritonOps(TritonState):
    """Kernels read the stored weights; state tensors are updated in place. For inference."""

    name = "triton"
    in_place = True
    recorder: Any = None  # of graphs.py, while a step is captured

    sample = staticmethod(sampling.sample)
    swiglu = staticmethod(elementwise.swiglu)
    gelu = staticmethod(elementwise.gelu)
    rms_norm = staticmethod(norm.rms_norm)
    add_rms_norm = staticmethod(norm.add_rms_norm)

    @staticmethod
    def devices() -> tuple[str, ...]:
        return ("cuda", "cpu") if INTERPRETED.value else ("cuda",)

    def scratch_bytes(self, page_elements: int, reused_elements: int = 0, scores: int = 0, inputs: int = 0,
                      widened: int = 0) -> int:
        # Partial sums of attention's pieces: at most (d + 2) floats for each PIECE keys of one row in a chunk of 64.
        return 4 * reused_elements + scores // 4

    def counter(self, t: int) -> int | Tensor:
        return t if self.recorder is None else self.recorder.counter(t)

    def gather(self, table: Table, ids: Tensor) -> Tensor:
        return super().gather(table, ids) if self.recorder is None else self.recorder.gather(table, ids)

    def each_part(self, matrix: Matrix, use: Callable[[Part], None]) -> None:
        """Calls `use` for each part of a matrix in row order: now, and again whenever a captured step is replayed.

        It launches kernels with the same operands each time, the part aside. All uses of a matrix go through here.
        """
        if self.recorder is not None:
            self.recorder.each_part(matrix, use)
            return
        for part in matrix.parts():
            use(part)

    def product(self, x: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = x.new_empty(flat.shape[0], matrix.shape[0])
        shape = cuda.gemv_shape(flat, *matrix.shape)

        def use(part: Part) -> None:
            rows = slice(part.start, part.stop)
            added = None if bias is None else bias[rows]
            if shape is not None and part.data.dtype == torch.int8:
                cuda.gemv_int8(flat, part.data, part.scales, out[:, rows], shape, bias=added, group=part.group)
            else:
                linear.linear(flat, _weights(part), added, out=out[:, rows])

        self.each_part(matrix, use)
        return out.view(*x.shape[:-1], -1)

    def linear_heads(self, x: Tensor, matrix: Matrix) -> Tensor:
        out = x.new_empty(x.shape[0], matrix.shape[0])
        self.each_part(matrix, lambda part: linear.linear_heads(x, _weights(part), matrix.shape[0], part.start,
                                                                out=out[:, part.start : part.stop]))
        return out

    def linear_transposed(self, x: Tensor, matrix: Matrix) -> Tensor:
        return self.linear_transposed_heads(x[:, None], matrix)[:, 0]

    def linear_transposed_heads(self, x: Tensor, matrix: Matrix) -> Tensor:
        batch, heads, _ = x.shape
        out = x.new_empty(batch, heads, matrix.shape[1])
        self.each_part(matrix, lambda part: linear_transposed(x, _weights(part), heads, matrix.shape[0], part.start,
                                                              out, accumulate=part.start > 0))
        return out

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return norm.layer_norm(x, weight, bias, LAYER_NORM_EPS)

    def cached_attention(self, cache: Any, past: int, rows: int, device: torch.device) -> CachedAttention:
        if cache is None or cache.layers[0].keys.data.shape[-1] > attention.WIDEST:
            return super().cached_attention(cache, past, rows, device)
        return RingAttention(self, cache, past, rows, device)

    def rotary_attention(self, joined: Tensor, heads: int, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
        query, key, value = joined.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, A, T, d]
        if query.shape[-1] > attention.WIDEST:
            return super().rotary_attention(joined, heads, cos, sin, scale)
        mixed = attention.attention(query, key, value, scale, query_tables=(cos, sin), key_tables=(cos, sin))
        return mixed.transpose(1, 2).flatten(2)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, scale: float,
                  blocked: Tensor | None = None) -> Tensor:
        if query.shape[-1] > attention.WIDEST:
            return super().attention(query, key, value, scale, blocked)
        return attention.attention(query, key, value, scale, blocked)

    def integrate(self, x: Tensor, context: Tensor, first: Matrix, first_bias: Tensor, second: Matrix,
                  second_bias: Tensor, mu: Tensor, *, steps: int, threshold: float | None = None,
                  together: bool = False, trajectory: bool = False, group: int = 1,
                  norm: tuple[Tensor, Tensor] | None = None) -> integrator.Integration:
        if trajectory or first.shape[0] > integrator_kernel.WIDEST:
            return super().integrate(x, context, first, first_bias, second, second_bias, mu, steps=steps,
                                     threshold=threshold, together=together, trajectory=trajectory, group=group,
                                     norm=norm)
        if norm is not None:
            x = self.layer_norm(x, *norm)
        mu = integrator.spread(mu, group, x.shape[-1])
        return integrator_kernel.integrate(x, context, self.whole(x, first), first_bias, self.whole(x, second),
                                           second_bias, mu, steps=steps, threshold=threshold, together=together)

    def whole(self, x: Tensor, matrix: Matrix) -> Weights:
        """A matrix copied beside x as its parts pass by, for a kernel that reads it more than once: int8 with a scale
        for each row, or floats."""
        like, shape = matrix.stored(), matrix.shape
        by_row = like.scales is not None and like.scales.dim() == 1
        data = x.new_empty(shape, dtype=torch.float32 if like.scales is not None and not by_row else like.data.dtype)
        scales = x.new_empty(shape[0]) if by_row else None

        def use(part: Part) -> None:
            rows = slice(part.start, part.stop)
            data[rows].copy_(part.data if part.scales is None or by_row else widen(part.data, part.scales, part.group))
            if scales is not None:
                scales[rows].copy_(part.scales)

        self.each_part(matrix, use)
        return Weights(data, scales)


def _weights(part: Part) -> Weights:
    return Weights(part.data, part.scales, part.group)
