"""Operations on Triton kernels: on a CUDA device, or on the CPU under triton's interpreter (for tests).

What is not overridden here is cheap in torch. Importing this module needs triton.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from thl_engine.kernels import integrator
from thl_engine.kernels.triton import (
    altup,
    attention,
    elementwise,
    linear,
    norm,
    sampling,
    shared_memory,
    slot_memory,
    tier_cell,
    window_attention,
)
from thl_engine.kernels.triton import integrator as integrator_kernel
from thl_engine.kernels.triton.arithmetic import INTERPRETED
from thl_engine.ops import LAYER_NORM_EPS
from thl_engine.triton_products import TritonProducts, weights
from thl_engine.weights import Matrix, Part


class TritonOps(TritonProducts):
    """Kernels read the stored weights; state tensors are updated in place. For inference."""

    name = "triton"

    sample = staticmethod(sampling.sample)
    swiglu = staticmethod(elementwise.swiglu)
    gelu = staticmethod(elementwise.gelu)
    add_blend = staticmethod(elementwise.add_blend)
    add_scaled = staticmethod(elementwise.add_scaled)
    erase_then_add = staticmethod(shared_memory.erase_then_add)
    gru_reset = staticmethod(elementwise.gru_reset)
    gru_update = staticmethod(elementwise.gru_update)
    rms_norm = staticmethod(norm.rms_norm)
    add_rms_norm = staticmethod(norm.add_rms_norm)
    rms_norm_add = staticmethod(norm.rms_norm_add)
    altup_predict = staticmethod(altup.predict)
    altup_correct = staticmethod(altup.correct)
    altup_coefficients = staticmethod(altup.coefficients)
    altup_spread = staticmethod(altup.spread)
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

    def linear_joined(self, places: Sequence[Tensor], matrix: Matrix, bias: Tensor | None = None) -> Tensor:
        if len(places) > tier_cell.PLACES or len(places[0]) > linear.FEW_ROWS:
            return super().linear_joined(places, matrix, bias)
        out = places[0].new_empty(len(places[0]), matrix.shape[0])
        self._joined(places, matrix, bias, out)
        return out

    def gru_cell(self, update: tuple[Matrix, Tensor], reset: tuple[Matrix, Tensor], candidate: tuple[Matrix, Tensor],
                 state: Tensor, below: Tensor, context: Tensor, addend: Tensor | None = None) -> Tensor:
        if len(state) > linear.FEW_ROWS:
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
            tier_cell.joined_linear(places, weights(part), None if bias is None else bias[rows], out[:, rows],
                                    addend=addend, gate=gate, **{name: x[:, rows] for name, x in gated.items()})

        self.each_part(matrix, use)

    def add_layer_norm(self, x: Tensor, addend: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        out, total = norm.add_layer_norm(x, addend, weight, bias, LAYER_NORM_EPS)
        return total, out

    def prefix_read(self, query: Tensor, rows: Tensor, scale: float) -> Tensor:
        width = query.shape[-1]
        if width > attention.WIDEST:
            return super().prefix_read(query, rows, scale)
        entries = rows[:, None, :, :width].expand(query.shape[0], -1, -1, -1)  # one head, whose keys are its values
        return attention.attention(query[:, None], entries, entries, scale)[:, 0]

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
        w1, w2 = self.whole(first), self.whole(second)
        return integrator_kernel.integrate(x, context, w1, first_bias, w2, second_bias, mu, steps=steps,
                                           threshold=threshold, together=together)
