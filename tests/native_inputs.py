"""Inputs and outputs of compiled kernels for the tests, and what their tests have in common."""

import pytest
import torch
from conftest import ISAS

from thl_engine.ops import native

needs_native = pytest.mark.skipif(not native.available(), reason=str(native.reason()))
BATCHES = [1, 2, 3, 7, 8, 17]


def poisoned(*shape, dtype=torch.float32):
    """An output that shows what was not written: NaN, or an absurd integer."""
    return torch.full(shape, float("nan") if dtype.is_floating_point else -(2**60), dtype=dtype)


def close(found, expected, tolerance):
    """Within `tolerance` of the norm of what is expected."""
    assert not found.isnan().any()
    assert (found.double() - expected).norm() <= tolerance * expected.norm().clamp(min=1e-30)


def close_everywhere(found, expected, tolerance=1e-6):
    """Within `tolerance` of the norm of what is expected, and of its largest entry everywhere."""
    assert found.shape == expected.shape and not found.isnan().any()
    error, expected = found.double() - expected, expected.double()
    assert error.norm() <= tolerance * expected.norm()
    assert error.abs().max() <= 4 * tolerance * expected.abs().max()


def everywhere(run):
    """The result of run(), a tensor or several, which every instruction set and number of threads gives bit for bit."""
    found = None
    for isa in ISAS:
        for threads in (1, 2, 3):
            native.set_isa(isa)
            native.set_threads(threads)
            out = run()
            out = [out] if isinstance(out, torch.Tensor) else list(out)
            found = found or [t.clone() for t in out]
            assert all(torch.equal(a, b) for a, b in zip(found, out, strict=True)), (isa, threads)
    return found if len(found) > 1 else found[0]


def int8_weights(rows, columns, groups=None):
    q = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    scales = torch.rand(rows) + 0.1 if groups is None else torch.rand(rows, groups) + 0.1
    each = scales[:, None] if groups is None else scales.repeat_interleave(128, 1)[:, :columns]
    return q, scales, q.double() * each.double()


def linear_int8(x, q, scales, bias=None):
    out = poisoned(x.shape[0], q.shape[0])
    native.linear_int8(native.pack_activations(x), q, scales, bias, out)
    return out


def linear_float(x, w, bias=None):
    out = poisoned(x.shape[0], w.shape[0])
    native.linear_float(x, w, bias, out)
    return out


def transposed(x, w, scales=None, out=None):
    accumulate = out is not None
    out = out if accumulate else poisoned(x.shape[0], w.shape[1])
    if scales is None:
        native.linear_float_transposed(x, w, out, accumulate)
    else:
        native.linear_int8_transposed(x, w, scales, out, accumulate)
    return out


RULE = dict(clip_max=1.5, theta=0.4, beta=6.0, decay=0.97, ema_decay=0.9, stale_weight=0.5, underuse_weight=0.02)


def write(candidate, memory, norms, read_ema, write_ema, last_write, t, slots):
    """Calls the kernel on its arguments, in place; returns vector, gate, novelty, branch, indices."""
    batch = candidate.shape[0]
    results = (
        poisoned(*candidate.shape),
        poisoned(batch),
        poisoned(batch),
        poisoned(batch, dtype=torch.int64),
        poisoned(batch, slots, dtype=torch.int64),
    )
    native.novelty_write(candidate, memory, norms, read_ema, write_ema, last_write, t, *results, **RULE)
    return results
