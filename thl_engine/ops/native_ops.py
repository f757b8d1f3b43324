"""The native backend: compiled C++ on CPU tensors. What it does not have itself is the reference's."""

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from statistics import NormalDist

import torch
from torch import Tensor

from thl_engine.kernels import integrator, shared_memory, slot_memory, window_attention
from thl_engine.kernels.norm import LAYER_NORM_EPS
from thl_engine.ops import native
from thl_engine.ops.native_product import Product, even_rows
from thl_engine.ops.reference import SPARSE_SHARE, ReferenceOps, as_float32, by_head
from thl_engine.ops.weights import Adapted, Matrix, Part


class NativeOps(ReferenceOps):
    """Compiled C++ on CPU tensors, for inference; what is not overridden here is cheap in torch."""

    name = "native"
    has_threads = in_place = True

    window_append = staticmethod(window_attention.window_append_in_place)
    sparse_share = SPARSE_SHARE

    def __init__(self) -> None:
        # Memory that calls leave to each other.
        self._packings: list[native.PackedActivations] = []  # of `Product`: none that is in use
        self._controller = native.KeptMatrix(False), native.KeptMatrix(True)

    def scratch_bytes(
        self, page_elements: int, reused_elements: int = 0, scores: int = 0, inputs: int = 0, dequantized: int = 0
    ) -> int:
        # Kernels read the stored weights. Copies of two matrices used again, and one of them on the way there as
        # floats; as int8 these take a quarter. Scores stay in the caches. Packed activations take four bytes each, and
        # what fills their rows up.
        return 4 * reused_elements * 3 // 2 + 5 * inputs + dequantized

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
        if isinstance(matrix, Adapted):
            return self.linear_adapted(x, matrix, bias, norm, gelu, addend)
        return Product(self._packings, x, norm=norm).with_each((matrix,), bias, gelu, addend)[0]

    def linears(self, x: Tensor, matrices: Sequence[Matrix | Adapted]) -> list[Tensor]:
        plain = [matrix for matrix in matrices if not isinstance(matrix, Adapted)]
        if len(plain) < len(matrices):
            return super().linears(x, matrices)
        return Product(self._packings, x).with_each(plain)

    def swiglu_linear(
        self, gate: Tensor, up: Tensor, matrix: Matrix, blend: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> Tensor:
        out = Product(self._packings, gate, up=up).with_each((matrix,))[0]
        return out if blend is None else self.add_blend(blend[0], blend[1], out, blend[2])

    def linear_heads(self, x: Tensor, matrix: Matrix) -> Tensor:
        heads = x.shape[1]
        out = torch.empty(x.shape[0], matrix.shape[0])
        for h, cuts in groupby(by_head(matrix, heads), key=itemgetter(1)):
            product = Product(self._packings, x[:, h])
            for part, _, first in cuts:
                product.into(out, part, h * (matrix.shape[0] // heads) + first)
            product.done()
        return out

    def linear_transposed(self, x: Tensor, matrix: Matrix) -> Tensor:
        out = torch.empty(x.shape[0], matrix.shape[1])
        for part in matrix.parts():
            _transposed_into(out, x[:, part.start : part.stop], part, part.start > 0)
        return out

    def linear_transposed_heads(self, x: Tensor, matrix: Matrix) -> Tensor:
        batch, heads, _ = x.shape
        out = torch.zeros(batch, heads, matrix.shape[1])
        for part, h, first in by_head(matrix, heads):
            _transposed_into(out[:, h], x[:, h, first : first + part.stop - part.start], part)
        return out

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = torch.empty(x.shape)
        native.layer_norm(even_rows(x), weight, bias, LAYER_NORM_EPS, out)
        return out

    def add_layer_norm(self, x: Tensor, addend: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total, out = torch.empty(x.shape), torch.empty(x.shape)
        native.add_layer_norm(even_rows(x), even_rows(addend), weight, bias, LAYER_NORM_EPS, total, out)
        return total, out

    def add_blend(self, x: Tensor, fast: Tensor, slow: Tensor, gate: Tensor) -> Tensor:
        out = torch.empty(x.shape)
        native.add_blend(even_rows(x), even_rows(fast), even_rows(slow), gate, out)
        return out

    def add_scaled(self, x: Tensor, addend: Tensor, scale: float) -> Tensor:
        out = torch.empty(x.shape)
        native.add_scaled(even_rows(x), even_rows(addend), scale, out)
        return out

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        out = torch.empty(x.shape)
        native.rms_norm(even_rows(x), None, weight, eps, out)
        return out

    def add_rms_norm(self, x: Tensor, addend: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        out = torch.empty(x.shape)
        native.rms_norm(even_rows(x), even_rows(addend), weight, eps, out)
        return out

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out = torch.empty(x.shape)
        lead = (1,) * (4 - x.dim())
        native.rotate(x.view(*lead, *x.shape), cos, sin, out.view(*lead, *x.shape))
        return out

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        out = torch.empty(gate.shape)
        native.swiglu(even_rows(gate), even_rows(up), out)
        return out

    def gelu(self, x: Tensor) -> Tensor:
        out = torch.empty(x.shape)
        native.gelu(even_rows(x), out)
        return out

    def geglu(self, gate: Tensor, up: Tensor, quantile: float | None = None) -> Tensor:
        out = torch.empty(gate.shape)
        native.geglu(even_rows(gate), even_rows(up), quantile, out)
        return out

    def geglu_linear(self, gate: Tensor, x: Tensor, up: Matrix | Adapted, quantile: float) -> Tensor:
        if NormalDist().cdf(-quantile) > self.sparse_share:
            return super().geglu_linear(gate, x, up, quantile)
        out = self.geglu(gate, torch.ones(gate.shape[-1]).expand(gate.shape), quantile)
        if not isinstance(up, Adapted):
            Product(self._packings, x).multiply(out, up)
            return out
        alive = (out != 0).float()
        factors = alive.clone()
        Product(self._packings, x).multiply(factors, up.base)
        return out.mul_(factors.add_(self.low_rank(x, up).mul_(alive)))

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, blocked: Tensor | None = None
    ) -> Tensor:
        batch, heads, rows, width = query.shape
        # Positions before heads: what follows joins the heads of a position, which then are in one row already.
        out = torch.empty(batch, rows, heads, width).transpose(1, 2)
        if blocked is not None:
            blocked = blocked.expand(*blocked.shape[:-1], key.shape[2])
            if blocked.stride(-1) != 1:
                blocked = blocked.contiguous()
            blocked = blocked.view(torch.uint8).expand(batch, heads, rows, -1)
        native.attention(query, key, value, scale, blocked, out)
        return out

    def rotary_attention(self, joined: Tensor, heads: int, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
        out = torch.empty(*joined.shape[:-1], joined.shape[-1] // 3)
        native.rotary_attention(joined, heads, cos, sin, scale, out)
        return out

    def prefix_read(self, query: Tensor, rows: Tensor, scale: float) -> Tensor:
        out = torch.empty(query.shape)
        native.prefix_read(query, rows, scale, out)
        return out

    def erase_then_add(self, memory: Tensor, erase: Tensor, add: Tensor) -> Tensor:
        out = torch.empty(erase.shape[0], *memory.shape[1:])
        native.erase_then_add(memory, erase, add, shared_memory.NORM_EPS, out)
        return out

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
        if trajectory:
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
                trajectory=True,
                group=group,
                norm=norm,
            )
        rows, width = x.shape
        values, iterations = torch.empty(rows, 2 * width), torch.empty(rows, dtype=torch.int64)
        for kept, matrix in zip(self._controller, (first, second), strict=True):
            for part in matrix.parts():
                by_row = part.scales is not None and part.scales.dim() == 1
                native.keep(
                    kept,
                    matrix.shape[0],
                    part.start,
                    part.data if by_row else as_float32(part),
                    part.scales if by_row else None,
                )
        made = native.integrate(
            x,
            context,
            self._controller[0],
            first_bias,
            self._controller[1],
            second_bias,
            mu,
            group,
            steps,
            integrator.FIRST_CHECK,
            threshold,
            together,
            values,
            iterations,
            norm,
            LAYER_NORM_EPS,
        )
        return integrator.Integration(values[:, :width], values[:, width:], iterations, made)

    def gru_reset(self, reset: Tensor, state: Tensor) -> Tensor:
        out = torch.empty_like(state)
        native.gru_reset(reset, state, out)
        return out

    def gru_update(self, update: Tensor, candidate: Tensor, state: Tensor) -> Tensor:
        native.gru_update(update, candidate, state)
        return state

    def window_mix(self, query: Tensor, buffer: Tensor, valid: int | Tensor, scale: float) -> Tensor:
        out = torch.empty_like(query)
        native.window_scores_mix(query, buffer, int(valid), scale, out)
        return out

    def slot_scores(self, query: Tensor, memory: Tensor, read_ema: Tensor, scale: float, load_penalty: float) -> Tensor:
        out = torch.empty(*query.shape[:2], memory.shape[1])
        native.slot_scores(query, memory, read_ema, scale, load_penalty, out)
        return out

    def slot_topk(self, scores: Tensor, k: int, capacity: int | None = None) -> tuple[Tensor, Tensor]:
        indices = torch.empty(*scores.shape[:2], k, dtype=torch.int64)
        alpha = torch.empty(*scores.shape[:2], k)
        native.slot_topk(scores, k, indices, alpha, -1 if capacity is None else capacity)
        return alpha, indices

    def slot_mix(self, alpha: Tensor, indices: Tensor, memory: Tensor) -> Tensor:
        out = torch.empty(*indices.shape[:2], memory.shape[2])
        native.slot_mix(alpha, indices, memory, out)
        return out

    def slot_norms(self, memory: Tensor) -> Tensor:
        out = torch.empty(memory.shape[:2])
        native.slot_norms(memory, out)
        return out

    def read_metadata(
        self, alpha: Tensor, indices: Tensor, read_ema: Tensor, last_read: Tensor, t: int | Tensor, decay: float
    ) -> tuple[Tensor, Tensor]:
        native.read_metadata(alpha, indices, read_ema, last_read, decay, int(t))
        return read_ema, last_read

    def novelty_write(
        self,
        candidate: Tensor,
        memory: Tensor,
        norms: Tensor,
        read_ema: Tensor,
        write_ema: Tensor,
        last_write: Tensor,
        t: int | Tensor,
        *,
        slots: int,
        **rule: float,
    ) -> slot_memory.Write:
        batch = candidate.shape[0]
        vector, gate, novelty = torch.empty_like(candidate), torch.empty(batch), torch.empty(batch)
        branch = torch.empty(batch, dtype=torch.int64)
        indices = torch.empty(batch, slots, dtype=torch.int64)
        native.novelty_write(
            candidate,
            memory,
            norms,
            read_ema,
            write_ema,
            last_write,
            int(t),
            vector,
            gate,
            novelty,
            branch,
            indices,
            **rule,
        )
        return slot_memory.Write(memory, norms, write_ema, last_write, vector, gate, novelty, branch, indices)


def _transposed_into(out: Tensor, x: Tensor, part: Part, accumulate: bool = True) -> None:
    if part.scales is None:
        native.linear_float_transposed(x, part.data, out, accumulate)
    else:
        native.linear_int8_transposed(x, part.data, part.scales, out, accumulate)
