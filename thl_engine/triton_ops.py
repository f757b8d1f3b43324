"""Operations on Triton kernels: on a CUDA device, or on the CPU under triton's interpreter (for tests).

What is not overridden here is cheap in torch. Importing this module needs triton.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from thl_engine import cuda
from thl_engine.kernels import integrator
from thl_engine.kernels.linear import widen
from thl_engine.kernels.triton import (
    attention,
    elementwise,
    linear,
    norm,
    sampling,
    slot_memory,
    tier_cell,
    window_attention,
)
from thl_engine.kernels.triton import integrator as integrator_kernel
from thl_engine.kernels.triton.arithmetic import INTERPRETED, capability
from thl_engine.kernels.triton.linear import Weights
from thl_engine.kernels.triton.linear_transposed import linear_transposed
from thl_engine.ops import LAYER_NORM_EPS, ReferenceOps
from thl_engine.weights import Matrix, Part


class TritonOps(ReferenceOps):
    """Kernels read the stored weights; state tensors are updated in place. For inference."""

    name = "triton"
    in_place = True

    sample = staticmethod(sampling.sample)
    swiglu = staticmethod(elementwise.swiglu)
    gelu = staticmethod(elementwise.gelu)
    gru_reset = staticmethod(elementwise.gru_reset)
    gru_update = staticmethod(elementwise.gru_update)
    rms_norm = staticmethod(norm.rms_norm)
    add_rms_norm = staticmethod(norm.add_rms_norm)
    slot_norms = staticmethod(slot_memory.slot_norms)
    slot_read = staticmethod(slot_memory.slot_read)
    novelty_write = staticmethod(slot_memory.novelty_write)
    window_read = staticmethod(window_attention.window_read)
    counters: dict[int, Tensor] | None = None  # while a step is captured: the tensors that stand for times

    @staticmethod
    def devices() -> tuple[str, ...]:
        return ("cuda", "cpu") if INTERPRETED.value else ("cuda",)

    def scratch_bytes(self, page_elements: int, reused_elements: int = 0, scores: int = 0, inputs: int = 0) -> int:
        return 4 * reused_elements

    def counter(self, t: int) -> int | Tensor:
        return t if self.counters is None else self.counters[t]

    def each_part(self, matrix: Matrix, use: Callable[[Part], None]) -> None:
        """Every use of a matrix: `use` launches what reads a part."""
        for part in matrix.parts():
            use(part)

    def linear_joined(self, places: Sequence[Tensor], matrix: Matrix, bias: Tensor | None = None) -> Tensor:
        if len(places) > tier_cell.PLACES or not linear.streaming(len(places[0]), capability(places[0])):
            return super().linear_joined(places, matrix, bias)
        out = places[0].new_empty(len(places[0]), matrix.shape[0])
        self._joined(places, matrix, bias, out)
        return out

    def gru_cell(self, update: tuple[Matrix, Tensor], reset: tuple[Matrix, Tensor], candidate: tuple[Matrix, Tensor],
                 state: Tensor, below: Tensor, context: Tensor, addend: Tensor | None = None) -> Tensor:
        if not linear.streaming(len(state), capability(state)):
            return super().gru_cell(update, reset, candidate, state, below, context, addend)
        z, kept = (torch.empty(state.shape, device=state.device) for _ in range(2))
        self._joined((state, below, context), *update, z, addend, gate="update")
        self._joined((state, below, context), *reset, kept, addend, gate="reset", state=state)
        self._joined((kept, below, context), *candidate, state, addend, gate="candidate", update=z, state=state)
        return state

    def _joined(self, places: Sequence[Tensor], matrix: Matrix, bias: Tensor | None, out: Tensor,
                addend: Tensor | None = None, gate: str | None = None, **gated: Tensor) -> None:
        def use(part: Part) -> None:
            rows = slice(part.start, part.stop)
            tier_cell.joined_linear(places, _weights(part), None if bias is None else bias[rows], out[:, rows],
                                    addend=addend, gate=gate, **{name: x[:, rows] for name, x in gated.items()})
        self.each_part(matrix, use)

    def product(self, x: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = x.new_empty(flat.shape[0], matrix.shape[0])
        shape = cuda.gemv_shape(flat, *matrix.shape)
        for part in matrix.parts():
            rows = slice(part.start, part.stop)
            added = None if bias is None else bias[rows]
            if shape is not None and part.data.dtype == torch.int8:
                cuda.gemv_int8(flat, part.data, part.scales, out[:, rows], shape, bias=added, group=part.group)
            else:
                linear.linear(flat, _weights(part), added, out=out[:, rows])
        return out.view(*x.shape[:-1], -1)

    def linear_heads(self, x: Tensor, matrix: Matrix) -> Tensor:
        out = x.new_empty(x.shape[0], matrix.shape[0])
        for part in matrix.parts():
            linear.linear_heads(x, _weights(part), matrix.shape[0], part.start, out=out[:, part.start : part.stop])
        return out

    def linear_transposed(self, x: Tensor, matrix: Matrix) -> Tensor:
        return self.linear_transposed_heads(x[:, None], matrix)[:, 0]

    def linear_transposed_heads(self, x: Tensor, matrix: Matrix) -> Tensor:
        batch, heads, _ = x.shape
        out = x.new_empty(batch, heads, matrix.shape[1])
        for part in matrix.parts():
            linear_transposed(x, _weights(part), heads, matrix.shape[0], part.start, out, accumulate=part.start > 0)
        return out

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return norm.layer_norm(x, weight, bias, LAYER_NORM_EPS)

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
        matrices = (Weights(*_whole(matrix)) for matrix in (first, second))
        return integrator_kernel.integrate(x, context, next(matrices), first_bias, next(matrices), second_bias, mu,
                                           steps=steps, threshold=threshold, together=together)


def _weights(part: Part) -> Weights:
    return Weights(part.data, part.scales, part.group)


def _whole(matrix: Matrix) -> tuple[Tensor, Tensor | None]:
    """The matrix in memory of its own: int8 with a scale for each row, or else float32."""
    parts = [(part.data.clone(), part.scales.clone()) if part.scales is not None and part.scales.dim() == 1
             else (widen(part.data, part.scales, part.group).clone(), None) for part in matrix.parts()]
    if len(parts) == 1:
        return parts[0]
    scales = None if parts[0][1] is None else torch.cat([part[1] for part in parts])
    return torch.cat([part[0] for part in parts]), scales
