"""The operations that models are written in, on each backend: torch reference (any device, differentiable) or native.

Models call an ops object; a backend is chosen once, when the engine starts. Operations may update the state tensors
that they are given in place; they return the tensors to use from then on.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby
from operator import itemgetter
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from thl_engine.errors import ConfigError
from thl_engine.kernels import (
    altup,
    geglu,
    gelu,
    integrator,
    norm,
    residual,
    rotary,
    shared_memory,
    slot_memory,
    swiglu,
    window_attention,
)
from thl_engine.kernels import attention as attention_kernels
from thl_engine.kernels import linear as linear_kernels
from thl_engine.ops import native
from thl_engine.ops.cached_attention import CachedAttention
from thl_engine.ops.compositions import Compositions
from thl_engine.ops.native_product import LAYER_NORM_EPS, Product, even_rows
from thl_engine.ops.state_ops import StateOps
from thl_engine.ops.weights import Adapted, Matrix, Part, Table

# Share of a gate up to which only the products that it lets through are made. With 5 % they took 0.14 of the time of
# all for one row of activations, 0.31 for 8 and 0.34 for 64 (16384 x 2048 int8, one thread, AMD EPYC Zen 5).
SPARSE_SHARE = 1 / 8


class ReferenceOps(StateOps, Compositions):
    """Plain torch on float32 values of the weights."""

    name = "reference"
    has_threads = False  # besides torch's
    sample: Callable[..., Tensor] | None = None  # the sampler's `Choose`, for logits on a device of its own
    sparse_share = 0.0  # up to which sparse products read no more of a matrix than they need
    in_place = False  # whether state tensors are updated where they lie

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

    def scratch_bytes(self, page_elements: int, reused_elements: int = 0, scores: int = 0, inputs: int = 0,
                      widened: int = 0) -> int:
        """Memory that ops need beside their operands, for pages of up to `page_elements` weights.

        reused_elements: weights that one op reads again after their parts have been let go (`integrate`).
        scores: of the largest `attention`, for all heads. inputs: activations that the widest product takes. widened:
        bytes of a layer's int8 keys and values as float32.
        """
        # The page as float32, and the product of its integers on the way there. Scores before and after each step.
        return 2 * 4 * page_elements + 4 * reused_elements + 2 * 4 * scores + widened

    def cached_attention(self, cache: Any, past: int, rows: int, device: torch.device) -> CachedAttention:
        """Attention of `rows` positions behind the first `past` to a KVCache, or without one to each other."""
        return CachedAttention(self, cache, int(self.counter(past)), rows, device)

    def gather(self, table: Table, ids: Tensor) -> Tensor:
        """Rows of a table: int64 [B] -> float32 [B, C]."""
        return table.rows(ids)

    def linear(self, x: Tensor, matrix: Matrix | Adapted, bias: Tensor | None = None, *,
               norm: tuple[Tensor, Tensor] | None = None, gelu: bool = False, addend: Tensor | None = None) -> Tensor:
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
        out = [linear_kernels.linear(x, _widen(part), None if bias is None else bias[part.start : part.stop])
               for part in matrix.parts()]
        return out[0] if len(out) == 1 else torch.cat(out, dim=-1)

    def linear_adapted(self, x: Tensor, matrix: Adapted, bias: Tensor | None, norm: tuple[Tensor, Tensor] | None,
                       gelu: bool, addend: Tensor | None) -> Tensor:
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

    def swiglu_linear(self, gate: Tensor, up: Tensor, matrix: Matrix,
                      blend: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
        """`linear` of silu(gate) * up, both [..., C]: [..., R]. blend: x, fast and gate of an `add_blend` with it."""
        out = self.linear(swiglu.swiglu(gate, up), matrix)
        return out if blend is None else self.add_blend(blend[0], blend[1], out, blend[2])

    def linear_heads(self, x: Tensor, matrix: Matrix) -> Tensor:
        """Each head's features through its own rows: x [B, H, C], matrix [R, C] -> [B, R], R/H rows a head."""
        batch, heads, _ = x.shape
        out = [linear_kernels.linear(x[:, h], _widen(part)) for part, h, _ in _by_head(matrix, heads)]
        return torch.cat(out, dim=-1)

    def linear_transposed(self, x: Tensor, matrix: Matrix) -> Tensor:
        """x [B, R] times matrix [R, C]: [B, C]."""
        out = x.new_zeros(x.shape[0], matrix.shape[1])
        for part in matrix.parts():
            out = out + linear_kernels.linear_transposed(x[:, part.start : part.stop], _widen(part))
        return out

    def linear_transposed_heads(self, x: Tensor, matrix: Matrix) -> Tensor:
        """x [B, H, R/H] times each head's rows of matrix [R, C]: [B, H, C]."""
        batch, heads, per_head = x.shape
        out = [x.new_zeros(batch, matrix.shape[1]) for _ in range(heads)]
        for part, h, first in _by_head(matrix, heads):
            values = x[:, h, first : first + part.stop - part.start]
            out[h] = out[h] + linear_kernels.linear_transposed(values, _widen(part))
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

    def integrate(self, x: Tensor, context: Tensor, first: Matrix, first_bias: Tensor, second: Matrix,
                  second_bias: Tensor, mu: Tensor, *, steps: int, threshold: float | None = None,
                  together: bool = False, trajectory: bool = False, group: int = 1,
                  norm: tuple[Tensor, Tensor] | None = None) -> integrator.Integration:
        """INL's integrator with the controller's two matrices, each read once whatever the number of steps.

        norm: weight and bias of a `layer_norm` of x before.
        """
        if norm is not None:
            x = self.layer_norm(x, *norm)
        return integrator.integrate(x, context, _whole(first), first_bias, _whole(second), second_bias, mu, steps=steps,
                                    threshold=threshold, together=together, trajectory=trajectory, group=group)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Over the last axis, biased variance."""
        return norm.layer_norm(x, weight, bias, LAYER_NORM_EPS)

    def add_layer_norm(self, x: Tensor, addend: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """x + addend, and its `layer_norm`."""
        return norm.add_layer_norm(x, addend, weight, bias, LAYER_NORM_EPS)


class NativeOps(ReferenceOps):
    """Compiled C++ on CPU tensors, for inference; what is not overridden here is cheap in torch."""

    name = "native"
    has_threads = in_place = True

    window_append = staticmethod(window_attention.window_append_in_place)
    sparse_share = SPARSE_SHARE

    def __init__(self) -> None:
        # Memory that calls leave to each other.
        self._packings: list[Any] = []  # of `Product`: none that is in use
        self._controller = native.KeptMatrix(False), native.KeptMatrix(True)

    def scratch_bytes(self, page_elements: int, reused_elements: int = 0, scores: int = 0, inputs: int = 0,
                      widened: int = 0) -> int:
        # Kernels read the stored weights. Copies of two matrices used again, and one of them on the way there as
        # floats; as int8 these take a quarter. Scores stay in the caches. Packed activations take four bytes each, and
        # what fills their rows up.
        return 4 * reused_elements * 3 // 2 + 5 * inputs + widened

    def linear(self, x: Tensor, matrix: Matrix | Adapted, bias: Tensor | None = None, *,
               norm: tuple[Tensor, Tensor] | None = None, gelu: bool = False, addend: Tensor | None = None) -> Tensor:
        if isinstance(matrix, Adapted):
            return self.linear_adapted(x, matrix, bias, norm, gelu, addend)
        return Product(self._packings, x, norm=norm).with_each((matrix,), bias, gelu, addend)[0]

    def linears(self, x: Tensor, matrices: Sequence[Matrix | Adapted]) -> list[Tensor]:
        if any(isinstance(matrix, Adapted) for matrix in matrices):
            return super().linears(x, matrices)
        return Product(self._packings, x).with_each(matrices)

    def swiglu_linear(self, gate: Tensor, up: Tensor, matrix: Matrix,
                      blend: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
        out = Product(self._packings, gate, up=up).with_each((matrix,))[0]
        return out if blend is None else self.add_blend(blend[0], blend[1], out, blend[2])

    def linear_heads(self, x: Tensor, matrix: Matrix) -> Tensor:
        heads = x.shape[1]
        out = torch.empty(x.shape[0], matrix.shape[0])
        for h, cuts in groupby(_by_head(matrix, heads), key=itemgetter(1)):
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
        for part, h, first in _by_head(matrix, heads):
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

    def attention(self, query: Tensor, key: Tensor, value: Tensor, scale: float,
                  blocked: Tensor | None = None) -> Tensor:
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

    def integrate(self, x: Tensor, context: Tensor, first: Matrix, first_bias: Tensor, second: Matrix,
                  second_bias: Tensor, mu: Tensor, *, steps: int, threshold: float | None = None,
                  together: bool = False, trajectory: bool = False, group: int = 1,
                  norm: tuple[Tensor, Tensor] | None = None) -> integrator.Integration:
        if trajectory:
            return super().integrate(x, context, first, first_bias, second, second_bias, mu, steps=steps,
                                     threshold=threshold, together=together, trajectory=True, group=group, norm=norm)
        rows, width = x.shape
        values, iterations = torch.empty(rows, 2 * width), torch.empty(rows, dtype=torch.int64)
        for kept, matrix in zip(self._controller, (first, second), strict=True):
            for part in matrix.parts():
                by_row = part.scales is not None and part.scales.dim() == 1
                native.keep(kept, matrix.shape[0], part.start, part.data if by_row else _widen(part),
                            part.scales if by_row else None)
        made = native.integrate(x, context, self._controller[0], first_bias, self._controller[1], second_bias, mu,
                                group, steps, integrator.FIRST_CHECK, threshold, together, values, iterations, norm,
                                LAYER_NORM_EPS)
        return integrator.Integration(values[:, :width], values[:, width:], iterations, made)

    def gru_reset(self, reset: Tensor, state: Tensor) -> Tensor:
        out = torch.empty_like(state)
        native.gru_reset(reset, state, out)
        return out

    def gru_update(self, update: Tensor, candidate: Tensor, state: Tensor) -> Tensor:
        native.gru_update(update, candidate, state)
        return state

    def window_mix(self, query: Tensor, buffer: Tensor, valid: int, scale: float) -> Tensor:
        out = torch.empty_like(query)
        native.window_scores_mix(query, buffer, valid, scale, out)
        return out

    def slot_scores(self, query: Tensor, memory: Tensor, read_ema: Tensor, scale: float,
                    load_penalty: float) -> Tensor:
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

    def read_metadata(self, alpha: Tensor, indices: Tensor, read_ema: Tensor, last_read: Tensor, t: int,
                      decay: float) -> tuple[Tensor, Tensor]:
        native.read_metadata(alpha, indices, read_ema, last_read, decay, t)
        return read_ema, last_read

    def novelty_write(self, candidate: Tensor, memory: Tensor, norms: Tensor, read_ema: Tensor, write_ema: Tensor,
                      last_write: Tensor, t: int, *, slots: int, **rule: float) -> slot_memory.Write:
        batch = candidate.shape[0]
        vector, gate, novelty = torch.empty_like(candidate), torch.empty(batch), torch.empty(batch)
        branch = torch.empty(batch, dtype=torch.int64)
        indices = torch.empty(batch, slots, dtype=torch.int64)
        native.novelty_write(candidate, memory, norms, read_ema, write_ema, last_write, t, vector, gate, novelty,
                             branch, indices, **rule)
        return slot_memory.Write(memory, norms, write_ema, last_write, vector, gate, novelty, branch, indices)


def _transposed_into(out: Tensor, x: Tensor, part: Part, accumulate: bool = True) -> None:
    if part.scales is None:
        native.linear_float_transposed(x, part.data, out, accumulate)
    else:
        native.linear_int8_transposed(x, part.data, part.scales, out, accumulate)


def _widen(part: Part) -> Tensor:
    return linear_kernels.widen(part.data, part.scales, part.group)


def _whole(matrix: Matrix) -> Tensor:
    """float32 [R, C] in memory of its own, for an op that uses a matrix again after its parts have been let go."""
    parts = [_widen(part).clone() if part.data.dtype == torch.float32 else _widen(part) for part in matrix.parts()]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _by_head(matrix: Matrix, heads: int):
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


def _native() -> ReferenceOps:
    if not native.available():
        raise ConfigError(f"backend 'native' is not available: {native.reason()}; use backend 'reference'")
    return NativeOps()


def _triton() -> ReferenceOps:
    try:
        from thl_engine.ops import triton_ops
    except ImportError as error:
        raise ConfigError(f"backend 'triton' is not available ({error}); install triton or use backend 'reference'"
                          ) from None
    return triton_ops.TritonOps()


BACKENDS: dict[str, Callable[[], ReferenceOps]] = {"reference": ReferenceOps, "native": _native, "triton": _triton}


@cache
def _cuda_backend() -> str:
    try:
        _triton()
    except ConfigError as error:
        logging.getLogger("thl_engine").warning("computing with torch's operations, more slowly: %s", error)
        return "reference"
    return "triton"


def load_ops(backend: str, device: str) -> ReferenceOps:
    """The ops of a backend. "auto" takes native on the CPU and triton elsewhere where they are, else the reference."""
    if backend == "auto":
        backend = _cuda_backend() if device != "cpu" else "native" if native.available() else "reference"
    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r} is unknown; choose from auto, {', '.join(BACKENDS)}")
    if backend == "native" and device != "cpu":
        raise ConfigError(f"backend 'native' computes on the CPU, not on {device!r}; use backend 'auto'")
    ops = BACKENDS[backend]()
    if device not in ops.devices():
        raise ConfigError(f"backend 'triton' computes on CUDA devices, not on {device!r}; use backend 'auto'")
    return ops
