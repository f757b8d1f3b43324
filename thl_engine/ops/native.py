"""Compiled CPU kernels on torch tensors; results go to tensors that the caller provides.

Present where the C++ extension `thl_engine._native` was built: `available()` tells, and `reason()` why not. Every
operation runs on the threads of `set_threads`, releases the interpreter lock, and gives the same bits on any number
of threads and any instruction set. A row's result does not depend on the rest of the batch or matrix.

All tensors are on the CPU, float32 where not said otherwise, with a contiguous last dimension; other strides are
free except for small state tensors. Leading dimensions written ".." lie evenly, so that they can be taken as one.
Arguments that do not fit raise ValueError, naming argument, expected and found.
Letters: B batch, C inputs, R outputs, H heads, J slots, d features, k entries read per head, W slots written.
"""

from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]  # public, but not marked so

try:
    from thl_engine import _native

    _reason = None
except ImportError as error:
    _native = None  # type: ignore[assignment]
    _reason = f"the C++ extension is not built ({error}); reinstall where a C++20 compiler is found"

if _native is not None:
    PackedActivations = _native.PackedActivations
    KeptMatrix = _native.KeptMatrix


def available() -> bool:
    """Whether the extension was built."""
    return _native is not None


def reason() -> str | None:
    """Why the extension is not there; None where it is."""
    return _reason


def threads() -> int:
    """Threads that share a call; at first one for each processor."""
    return _native.threads()


def set_threads(count: int) -> None:
    """Sets the number of threads that share a call, 1 to 1024."""
    _native.set_threads(count)


def isa() -> str:
    """The instruction set in use: "portable", "avx2", "avx512" or "avx512vnni"."""
    return _native.isa()


def available_isas() -> list[str]:
    """Instruction sets that this processor runs, the best one last."""
    return _native.available_isas()


def set_isa(name: str) -> None:
    """Uses another instruction set from now on, to measure it or to avoid one that slows the clock; same results."""
    _native.set_isa(name)


def memory_bandwidth(nbytes: int = 512 << 20, repeats: int = 7) -> float:
    """Bytes per second at which `threads()` threads read nbytes of memory: the median of `repeats` plain passes."""
    return _native.memory_bandwidth(nbytes, repeats)


def read_seconds(memory: Tensor) -> float:
    """Seconds that `threads()` threads take to read float32 [n] once: the ceiling for whatever computes from it."""
    return _native.read_seconds(to_dlpack(memory))


def pack_activations(
    x: Tensor, into: "PackedActivations | None" = None, norm: tuple[Tensor, Tensor] | None = None, eps: float = 0.0
) -> "PackedActivations":
    """x [.., C] as 16-bit integers with one scale a row, for `linear_int8`. Reuses the memory of `into`.

    norm: weight and bias [C] of a `layer_norm` before. The rounding error is at most 1/65278 of the row's largest
    magnitude.
    """
    weight, bias = (None, None) if norm is None else (to_dlpack(norm[0]), to_dlpack(norm[1]))
    return _native.pack_activations(to_dlpack(x), weight, bias, eps, into)


def pack_swiglu(gate: Tensor, up: Tensor, into: "PackedActivations | None" = None) -> "PackedActivations":
    """`pack_activations` of silu(gate) * up, both [.., C]."""
    return _native.pack_swiglu(to_dlpack(gate), to_dlpack(up), into)


def linear_int8(
    packed: "PackedActivations",
    w: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
    start: int = -1,
    gelu: bool = False,
    addend: Tensor | None = None,
) -> None:
    """out [.., R] = x times the transpose of w, int8 [R, C] with scales [R] or [R, ceil(C / 128)], plus bias [R].

    gelu: that is followed by `gelu`, and addend [.., R] is added to the result. start: w holds the rows from there on
    of a larger matrix, to which out, bias and addend belong; -1 for a whole one.
    """
    _native.linear_int8(
        packed,
        to_dlpack(w),
        to_dlpack(scales),
        None if bias is None else to_dlpack(bias),
        to_dlpack(out),
        start,
        gelu,
        None if addend is None else to_dlpack(addend),
    )


def linear_float(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    out: Tensor,
    start: int = -1,
    gelu: bool = False,
    addend: Tensor | None = None,
) -> None:
    """out [.., R] = x [.., C] times the transpose of w [R, C] (float32, bfloat16 or float16); else as `linear_int8`."""
    _native.linear_float(
        to_dlpack(x),
        to_dlpack(w),
        None if bias is None else to_dlpack(bias),
        to_dlpack(out),
        start,
        gelu,
        None if addend is None else to_dlpack(addend),
    )


def multiply_int8(packed: "PackedActivations", w: Tensor, scales: Tensor, out: Tensor, start: int = -1) -> None:
    """out [.., R] times what `linear_int8` gives, without reading the rows of w for which out is zero."""
    _native.multiply_int8(packed, to_dlpack(w), to_dlpack(scales), to_dlpack(out), start)


def multiply_float(x: Tensor, w: Tensor, out: Tensor, start: int = -1) -> None:
    """out [.., R] times what `linear_float` gives, without reading the rows of w for which out is zero."""
    _native.multiply_float(to_dlpack(x), to_dlpack(w), to_dlpack(out), start)


def linear_int8_transposed(x: Tensor, w: Tensor, scales: Tensor, out: Tensor, accumulate: bool) -> None:
    """out [B, C] = x [B, R] times w, int8 [R, C] with scales as in `linear_int8`; added to out if `accumulate`.

    Rows are added in ascending order, so a matrix may come in several calls without a change of bits. A row is read
    only if an x is not zero there.
    """
    _native.linear_transposed(to_dlpack(x), to_dlpack(w), to_dlpack(scales), to_dlpack(out), accumulate)


def linear_float_transposed(x: Tensor, w: Tensor, out: Tensor, accumulate: bool) -> None:
    """out [B, C] = x [B, R] times w [R, C] (float32, bfloat16 or float16); like `linear_int8_transposed`."""
    _native.linear_transposed(to_dlpack(x), to_dlpack(w), None, to_dlpack(out), accumulate)


def gru_reset(reset: Tensor, state: Tensor, out: Tensor) -> None:
    """out = sigmoid(reset) * state, all [B, d]."""
    _native.gru_reset(to_dlpack(reset), to_dlpack(state), to_dlpack(out))


def gru_update(update: Tensor, candidate: Tensor, state: Tensor) -> None:
    """state = (1 - z) * state + z * tanh(candidate) with z = sigmoid(update), all [B, d]."""
    _native.gru_update(to_dlpack(update), to_dlpack(candidate), to_dlpack(state))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor) -> None:
    """Over the last axis of x [.., d], biased variance; weight and bias [d]."""
    _native.layer_norm(to_dlpack(x), to_dlpack(weight), to_dlpack(bias), eps, to_dlpack(out))


def window_scores_mix(query: Tensor, buffer: Tensor, valid: int, scale: float, out: Tensor) -> None:
    """out [B, d] = the first `valid` entries of buffer [B, W, d], weighted by softmax(scale * query . entry)."""
    _native.window_mix(to_dlpack(query), to_dlpack(buffer), valid, scale, to_dlpack(out))


def slot_scores(
    query: Tensor, memory: Tensor, read_ema: Tensor, scale: float, load_penalty: float, out: Tensor
) -> None:
    """out [B, H, J] = scale * query [B, H, d] . memory [B, J, d] - load_penalty * read_ema [B, J].

    Equal slots get equal bits.
    """
    _native.slot_scores(to_dlpack(query), to_dlpack(memory), to_dlpack(read_ema), scale, load_penalty, to_dlpack(out))


def slot_topk(scores: Tensor, k: int, indices: Tensor, alpha: Tensor, capacity: int = -1) -> None:
    """The k best of scores [B, H, J]: indices int64 [B, H, k], lower index first among equals, and their softmax alpha.

    capacity >= 0 limits how many entries of a batch row one slot serves, as THL publishes it: the rest weigh 0, and a
    head that would lose everything keeps its weights.
    """
    if indices.shape[-1:] != (k,):
        raise ValueError(f"indices: expected {k} entries in the last dimension, found shape {list(indices.shape)}")
    _native.slot_topk(to_dlpack(scores), capacity, to_dlpack(indices), to_dlpack(alpha))


def slot_mix(alpha: Tensor, indices: Tensor, memory: Tensor, out: Tensor) -> None:
    """out [B, H, d] = sum over k of alpha [B, H, k] * the slots of memory [B, J, d] named by indices int64."""
    _native.slot_mix(to_dlpack(alpha), to_dlpack(indices), to_dlpack(memory), to_dlpack(out))


def read_metadata(alpha: Tensor, indices: Tensor, read_ema: Tensor, last_read: Tensor, decay: float, t: int) -> None:
    """Updates read_ema and last_read (int64), both [B, J], after a read of indices with weights alpha [B, H, k]."""
    _native.read_metadata(to_dlpack(alpha), to_dlpack(indices), to_dlpack(read_ema), to_dlpack(last_read), decay, t)


def slot_norms(memory: Tensor, out: Tensor) -> None:
    """out [B, J] = Euclidean norms of memory [B, J, d], with the bits that `novelty_write` keeps up to date."""
    _native.slot_norms(to_dlpack(memory), to_dlpack(out))


def novelty_write(
    candidate: Tensor,
    memory: Tensor,
    norms: Tensor,
    read_ema: Tensor,
    write_ema: Tensor,
    last_write: Tensor,
    t: int,
    vector: Tensor,
    gate: Tensor,
    novelty: Tensor,
    branch: Tensor,
    indices: Tensor,
    *,
    clip_max: float,
    theta: float,
    beta: float,
    decay: float,
    ema_decay: float,
    stale_weight: float,
    underuse_weight: float,
) -> None:
    """THL's novelty-gated write of candidate [B, d] into memory [B, J, d] at step t.

    Updated in place: memory, norms, write_ema, last_write (int64) [B, J]. Results: vector [B, d] (the clipped
    candidate), gate, novelty [B], branch int64 [B] (0 familiar, 1 least useful, 2 empty slots), indices int64 [B, W].
    """
    _native.novelty_write(
        to_dlpack(candidate),
        to_dlpack(memory),
        to_dlpack(norms),
        to_dlpack(read_ema),
        to_dlpack(write_ema),
        to_dlpack(last_write),
        t,
        to_dlpack(vector),
        to_dlpack(gate),
        to_dlpack(novelty),
        to_dlpack(branch),
        to_dlpack(indices),
        clip_max,
        theta,
        beta,
        decay,
        ema_decay,
        stale_weight,
        underuse_weight,
    )


def rms_norm(x: Tensor, addend: Tensor | None, weight: Tensor | None, eps: float, out: Tensor) -> None:
    """out = s / sqrt(mean(s²) + eps) * weight [d] for s = x [.., d] plus, where there is one, addend [.., d]."""
    _native.rms_norm(
        to_dlpack(x),
        None if addend is None else to_dlpack(addend),
        None if weight is None else to_dlpack(weight),
        eps,
        to_dlpack(out),
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """out = x [B, A, T, d] rotated by the tables [T, d] of its positions; out must not share memory with x."""
    _native.rotate(to_dlpack(x), to_dlpack(cos), to_dlpack(sin), to_dlpack(out))


def swiglu(gate: Tensor, up: Tensor, out: Tensor) -> None:
    """out = silu(gate) * up, all [.., d]."""
    _native.swiglu(to_dlpack(gate), to_dlpack(up), to_dlpack(out))


def gelu(x: Tensor, out: Tensor) -> None:
    """out = x times the standard normal distribution function of x, both [.., d]."""
    _native.gelu(to_dlpack(x), to_dlpack(out))


def geglu(gate: Tensor, up: Tensor, quantile: float | None, out: Tensor) -> None:
    """out = gelu(gate) * up, all [.., d], with the tanh form of GELU.

    quantile: of each row of gate only what exceeds its mean by that many standard deviations, None for all of it.
    """
    _native.geglu(to_dlpack(gate), to_dlpack(up), quantile, to_dlpack(out))


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, blocked: Tensor | None, out: Tensor) -> None:
    """out [B, A, T, d] = softmax(scale * query keyᵀ) value for query [B, A, T, d], key and value [B, A_k, S, d].

    Query head h uses key head h·A_k // A. blocked: uint8 [B, A, T, S], not 0 where a key must not be seen; a row that
    sees none is NaN. Leading dimensions of the inputs may repeat (stride 0), and none is copied.
    """
    _native.attention(
        to_dlpack(query),
        to_dlpack(key),
        to_dlpack(value),
        scale,
        None if blocked is None else to_dlpack(blocked),
        to_dlpack(out),
    )


def rotary_attention(joined: Tensor, heads: int, cos: Tensor, sin: Tensor, scale: float, out: Tensor) -> None:
    """out [B, T, A·d] = attention among the positions of joined [B, T, 3·A·d], queries before keys before values.

    Queries and keys are rotated by the contiguous tables [T, d] first.
    """
    _native.rotary_attention(to_dlpack(joined), heads, to_dlpack(cos), to_dlpack(sin), scale, to_dlpack(out))


def add_layer_norm(
    x: Tensor, addend: Tensor, weight: Tensor, bias: Tensor, eps: float, total: Tensor, out: Tensor
) -> None:
    """total = x + addend, and out its `layer_norm`; all [.., d]."""
    _native.add_layer_norm(
        to_dlpack(x), to_dlpack(addend), to_dlpack(weight), to_dlpack(bias), eps, to_dlpack(total), to_dlpack(out)
    )


def add_blend(x: Tensor, fast: Tensor, slow: Tensor, gate: Tensor, out: Tensor) -> None:
    """out = x + fast + sigmoid(gate) * (slow - fast), all [.., d] but gate [d]."""
    _native.add_blend(to_dlpack(x), to_dlpack(fast), to_dlpack(slow), to_dlpack(gate), to_dlpack(out))


def add_scaled(x: Tensor, addend: Tensor, scale: float, out: Tensor) -> None:
    """out = x + scale * addend, all [.., d]."""
    _native.add_scaled(to_dlpack(x), to_dlpack(addend), scale, to_dlpack(out))


def erase_then_add(memory: Tensor, erase: Tensor, add: Tensor, eps: float, out: Tensor) -> None:
    """out [B, J, d] = memory [B or 1, J, d] * (1 - sigmoid(erase)) + add, both [B, d], each slot then normalised."""
    _native.erase_then_add(to_dlpack(memory), to_dlpack(erase), to_dlpack(add), eps, to_dlpack(out))


def prefix_read(query: Tensor, rows: Tensor, scale: float, out: Tensor) -> None:
    """out [B, T, r] = softmax(scale * query [B, T, r] . rows [B or 1, J, d] cut to r features) times these rows."""
    _native.prefix_read(to_dlpack(query), to_dlpack(rows), scale, to_dlpack(out))


def keep(kept: "KeptMatrix", rows: int, start: int, w: Tensor, scales: Tensor | None) -> None:
    """Copies rows `start` on of a matrix of `rows` rows: w int8 with scales, one a row, or float32 with None."""
    _native.keep(kept, rows, start, to_dlpack(w), None if scales is None else to_dlpack(scales))


def integrate(
    x: Tensor,
    context: Tensor,
    first: "KeptMatrix",
    first_bias: Tensor,
    second: "KeptMatrix",
    second_bias: Tensor,
    mu: Tensor,
    group: int,
    steps: int,
    first_check: int,
    threshold: float | None,
    together: bool,
    values: Tensor,
    iterations: Tensor,
    norm: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> int:
    """INL's integrator from x [.., D], N rows, at rest; returns the number of steps made.

    norm: weight and bias [D] of a `layer_norm` of x before.

    Matrices [C, 3 D] and, transposed, [3 D, C]; mu [ceil(D / group)]. values [N, 2 D] takes the final positions and
    velocities, iterations int64 [N] the steps of each row. Rules as in kernels/integrator.py: convergence is tested
    from step `first_check` on, counted from 0.
    """
    weight, bias = (None, None) if norm is None else (to_dlpack(norm[0]), to_dlpack(norm[1]))
    return _native.integrate(
        to_dlpack(x),
        weight,
        bias,
        eps,
        to_dlpack(context),
        first,
        to_dlpack(first_bias),
        second,
        to_dlpack(second_bias),
        to_dlpack(mu),
        group,
        steps,
        first_check,
        -1.0 if threshold is None else threshold,
        together,
        to_dlpack(values),
        to_dlpack(iterations),
    )
