"""Operations on Triton kernels: on a CUDA device, or on the CPU under triton's interpreter (for tests).

What is not overridden here is cheap in torch. Importing this module needs triton.
"""

import torch
from torch import Tensor

from thl_engine.kernels import integrator
from thl_engine.kernels.norm import LAYER_NORM_EPS
from thl_engine.kernels.triton import altup, attention, elementwise, norm, sampling, shared_memory
from thl_engine.kernels.triton import integrator as integrator_kernel
from thl_engine.kernels.triton.arithmetic import INTERPRETED
from thl_engine.ops.cached_attention import Cache, CachedAttention
from thl_engine.ops.triton_attention import RingAttention
from thl_engine.ops.triton_state import TritonState
from thl_engine.ops.weights import Matrix, Table


class TritonOps(TritonState):
    """Kernels read the stored weights; state tensors are updated in place. For inference."""

    name = "triton"
    in_place = True

    sample = staticmethod(sampling.sample)
    swiglu = staticmethod(elementwise.swiglu)
    gelu = staticmethod(elementwise.gelu)
    add_blend = staticmethod(elementwise.add_blend)
    add_scaled = staticmethod(elementwise.add_scaled)
    erase_then_add = staticmethod(shared_memory.erase_then_add)
    rms_norm = staticmethod(norm.rms_norm)
    add_rms_norm = staticmethod(norm.add_rms_norm)
    rms_norm_add = staticmethod(norm.rms_norm_add)
    altup_predict = staticmethod(altup.predict)
    altup_correct = staticmethod(altup.correct)
    altup_coefficients = staticmethod(altup.coefficients)
    altup_spread = staticmethod(altup.spread)

    @staticmethod
    def devices() -> tuple[str, ...]:
        return ("cuda", "cpu") if INTERPRETED.value else ("cuda",)

    def scratch_bytes(
        self, page_elements: int, reused_elements: int = 0, scores: int = 0, inputs: int = 0, dequantized: int = 0
    ) -> int:
        # Partial sums of attention's pieces: at most (d + 2) floats for each PIECE keys of one row in a chunk of 64.
        return 4 * reused_elements + scores // 4

    def counter(self, t: int) -> int | Tensor:
        return t if self.recorder is None else self.recorder.counter(t)

    def gather(self, table: Table, ids: Tensor) -> Tensor:
        return super().gather(table, ids) if self.recorder is None else self.recorder.gather(table, ids)

    def add_layer_norm(self, x: Tensor, addend: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        out, total = norm.add_layer_norm(x, addend, weight, bias, LAYER_NORM_EPS)
        return total, out

    def prefix_read(self, query: Tensor, rows: Tensor, scale: float) -> Tensor:
        width = query.shape[-1]
        if width > attention.widest(query):
            return super().prefix_read(query, rows, scale)
        entries = rows[:, None, :, :width].expand(query.shape[0], -1, -1, -1)  # one head, whose keys are its values
        return attention.attention(query[:, None], entries, entries, scale)[:, 0]

    def cached_attention(self, cache: Cache | None, past: int, rows: int, device: torch.device) -> CachedAttention:
        held = [] if cache is None else [layer.keys.data for layer in cache.layers]
        if cache is None or any(keys.shape[-1] > attention.widest(keys) for keys in held):
            return super().cached_attention(cache, past, rows, device)
        return RingAttention(self, cache, past, rows, device)

    def rotary_attention(self, joined: Tensor, heads: int, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
        query, key, value = joined.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, A, T, d]
        if query.shape[-1] > attention.widest(query, turned=True):
            return super().rotary_attention(joined, heads, cos, sin, scale)
        mixed = attention.attention(query, key, value, scale, query_tables=(cos, sin), key_tables=(cos, sin))
        return mixed.transpose(1, 2).flatten(2)

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, blocked: Tensor | None = None
    ) -> Tensor:
        if query.shape[-1] > attention.widest(query):
            return super().attention(query, key, value, scale, blocked)
        return attention.attention(query, key, value, scale, blocked)

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
        if trajectory or first.shape[0] > integrator_kernel.WIDEST:
            return super().integrate(
                x,
                context,
                first,
                first_bias,
                second,
                second_bias,
                mu,
                steps=steps,
                threshold=threshold,
                together=together,
                trajectory=trajectory,
                group=group,
                norm=norm,
            )
        if norm is not None:
            x = self.layer_norm(x, *norm)
        mu = integrator.spread(mu, group, x.shape[-1])
        return integrator_kernel.integrate(
            x,
            context,
            self.whole(x, first),
            first_bias,
            self.whole(x, second),
            second_bias,
            mu,
            steps=steps,
            threshold=threshold,
            together=together,
        )
