"""The compiled kernels against plain float64 torch, on every instruction set that this processor has."""

import ctypes
import mmap
import os
import threading

import pytest
import torch

from thl_engine import native

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.reason()))

ISAS = native.available_isas() if native.available() else []
BATCHES = [1, 3, 8, 17]
SHAPES = [(1, 1), (2, 3), (5, 64), (33, 65), (7, 129), (3, 1000), (0, 8), (19, 4096), (9, 5000), (2, 12345)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def settings():
    """Fresh random numbers and, afterwards, the instruction set and threads as they were."""
    torch.manual_seed(0)
    isa, threads = native.isa(), native.threads()
    yield
    native.set_isa(isa)
    native.set_threads(threads)


@pytest.fixture(params=ISAS)
def isa(request):
    native.set_isa(request.param)
    return request.param


def poisoned(*shape, dtype=torch.float32):
    """An output that shows what was not written: NaN, or an absurd integer."""
    return torch.full(shape, float("nan") if dtype.is_floating_point else -(2**60), dtype=dtype)


def close(found, expected, tolerance):
    """Within `tolerance` of the norm of what is expected."""
    assert not found.isnan().any()
    assert (found.double() - expected).norm() <= tolerance * expected.norm().clamp(min=1e-30)


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


# --- linear maps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("grouped", [False, True])
def test_linear_int8(batch, grouped):
    for rows, columns in SHAPES:
        q, scales, w = int8_weights(rows, columns, -(-columns // 128) if grouped else None)
        x, bias = torch.randn(batch, columns), torch.randn(rows)
        found = []
        for name in ISAS:
            native.set_isa(name)
            found.append(linear_int8(x, q, scales, bias))
            assert torch.equal(linear_int8(x, q, scales), linear_int8(x, q, scales, torch.zeros(rows)))
        close(found[0], x.double() @ w.T + bias.double(), 1e-4)
        assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("batch", BATCHES)
def test_linear_float(batch, dtype):
    for rows, columns in SHAPES:
        w = torch.randn(rows, columns).to(dtype)
        x, bias = torch.randn(batch, columns), torch.randn(rows)
        found = []
        for name in ISAS:
            native.set_isa(name)
            found.append(linear_float(x, w, bias))
            assert torch.equal(linear_float(x, w), linear_float(x, w, torch.zeros(rows)))
        close(found[0], x.double() @ w.double().T + bias.double(), 3e-6)
        assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_linear_int8_transposed(batch, grouped):
    for rows, columns in SHAPES:
        q, scales, w = int8_weights(rows, columns, -(-columns // 128) if grouped else None)
        x, start = torch.randn(batch, rows), torch.randn(batch, columns)
        found = []
        for name in ISAS:
            native.set_isa(name)
            found.append(transposed(x, q, scales, start.clone()))
            assert torch.equal(transposed(x, q, scales), transposed(x, q, scales, torch.zeros(batch, columns)))
        close(found[0], start.double() + x.double() @ w, 3e-6)
        assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("dtype", FLOATS)
def test_linear_float_transposed(dtype):
    for rows, columns in SHAPES:
        w, x, start = torch.randn(rows, columns).to(dtype), torch.randn(3, rows), torch.randn(3, columns)
        found = []
        for name in ISAS:
            native.set_isa(name)
            found.append(transposed(x, w, out=start.clone()))
        close(found[0], start.double() + x.double() @ w.double(), 3e-6)
        assert all(torch.equal(found[0], other) for other in found)


def test_special_float16_values(isa):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)  # every float16 there is
    w = bits.view(torch.float16)[:, None]
    assert torch.equal(linear_float(torch.ones(1, 1), w).nan_to_num(1.5), w.float().T.nan_to_num(1.5))


def test_strides(isa):
    """Rows of w and x with gaps between them, and results into a slice of columns that leaves the rest alone."""
    wide_q, scales, w = int8_weights(11, 300)
    wide_x = torch.randn(5, 400)
    q, x = wide_q[:, 70:270], wide_x[:, 33:233]
    for run in (lambda out: native.linear_int8(native.pack_activations(x), q, scales, None, out),
                lambda out: native.linear_float(x, q.float() * scales[:, None], None, out)):
        wide_out = poisoned(5, 30)
        run(wide_out[:, 9:20])
        close(wide_out[:, 9:20], x.double() @ w[:, 70:270].T, 1e-4)
        assert wide_out[:, :9].isnan().all() and wide_out[:, 20:].isnan().all()
    assert torch.equal(linear_float(wide_x[:1].expand(4, -1), torch.ones(3, 400)),
                       linear_float(wide_x[:1], torch.ones(3, 400)).expand(4, -1))
    assert torch.equal(transposed(wide_x[:, :11], q, scales), transposed(wide_x[:, :11].clone(), q.clone(), scales))


@pytest.mark.parametrize("columns", [100, 4096, 9000])
def test_rows_do_not_depend_on_company(isa, columns):
    """Pages of a matrix, single rows of a batch and other numbers of threads give the bits of the whole call."""
    q, scales, _ = int8_weights(41, columns)
    w, x = torch.randn(41, columns), torch.randn(11, columns)
    back = torch.randn(11, 41)
    native.set_threads(1)
    whole, whole_float = linear_int8(x, q, scales), linear_float(x, w)
    whole_back, whole_back_float = transposed(back, q, scales), transposed(back, w)
    for threads in (1, 2, 3):
        native.set_threads(threads)
        for cut in (0, 1, 17):
            assert torch.equal(whole, torch.cat([linear_int8(x, q[:cut], scales[:cut]),
                                                 linear_int8(x, q[cut:], scales[cut:])], 1))
            assert torch.equal(whole_float, torch.cat([linear_float(x, w[:cut]), linear_float(x, w[cut:])], 1))
            assert torch.equal(whole_back, transposed(back[:, cut:], q[cut:], scales[cut:],
                                                      transposed(back[:, :cut], q[:cut], scales[:cut])))
            assert torch.equal(whole_back_float, transposed(back[:, cut:], w[cut:], None,
                                                            transposed(back[:, :cut], w[:cut])))
        assert all(torch.equal(whole[b : b + 1], linear_int8(x[b : b + 1], q, scales)) for b in range(11))
        assert all(torch.equal(whole_float[b : b + 1], linear_float(x[b : b + 1], w)) for b in range(11))


@pytest.mark.parametrize("batch", [7, 8, 9, 13, 64, 97, 130])
def test_many_rows(batch):
    """Every instruction set, number of threads and part of the rows gives the bits of one row at a time."""
    for rows, columns in [(1, 1), (15, 3), (16, 63), (17, 160), (33, 255), (47, 512), (81, 513), (5, 1100)]:
        q, scales, w = int8_weights(rows, columns)
        x, bias = torch.randn(batch, columns), torch.randn(rows)
        x[batch // 2] *= 1e6
        native.set_isa("portable")
        expected = torch.cat([linear_int8(x[b : b + 1], q, scales, bias) for b in range(batch)])
        close(expected, x.double() @ w.T + bias.double(), 1e-4)
        for name in ISAS:
            native.set_isa(name)
            for threads in (1, 2, 5):
                native.set_threads(threads)
                assert torch.equal(linear_int8(x, q, scales, bias), expected)
            cut = rows // 2
            assert torch.equal(torch.cat([linear_int8(x, q[:cut], scales[:cut], bias[:cut]),
                                          linear_int8(x, q[cut:], scales[cut:], bias[cut:])], 1), expected)
            wide = poisoned(batch, rows + 9)
            native.linear_int8(native.pack_activations(x), q, scales, None, wide[:, 4 : 4 + rows])
            assert torch.equal(wide[:, 4 : 4 + rows], linear_int8(x, q, scales, torch.zeros(rows)))
            assert wide[:, :4].isnan().all() and wide[:, 4 + rows :].isnan().all()


@pytest.mark.parametrize("rows,threads", [(5, 8), (40, 7), (700, 3)])
def test_many_rows_on_many_threads(isa, rows, threads):
    """Large enough to be shared: by rows of the weights and, where these are few, by rows of activations."""
    q, scales, _ = int8_weights(rows, 2500)
    x = torch.randn(130, 2500)
    native.set_threads(1)
    expected = linear_int8(x, q, scales)
    assert torch.equal(expected, torch.cat([linear_int8(x[b : b + 1], q, scales) for b in range(130)]))
    native.set_threads(threads)
    assert torch.equal(linear_int8(x, q, scales), expected)


def test_int8_extremes(isa):
    """The largest sums stay exact; zeros, tiny, infinite and NaN activations stay in their rows."""
    q, scales = torch.full((2, 100_000), -128, dtype=torch.int8), torch.tensor([1.0, 0.5])
    x = torch.full((5, 100_000), 3.0)
    x[1] = 0.0
    x[2] = 1e-38
    x[3, 7] = float("inf")
    x[4, 99_999] = float("nan")
    for copies in (1, 2):  # 5 rows, and enough for the products of many rows
        found = linear_int8(x.repeat(copies, 1), q, scales, torch.tensor([0.25, 0.5]))
        for part in found.split(5):
            assert torch.allclose(part[0], torch.tensor([-38_400_000.0, -19_200_000.0]), rtol=1e-6)
            assert torch.equal(part[1:3], torch.tensor([[0.25, 0.5]] * 2))
            assert part[3:].isnan().all()


def test_packing_is_reused():
    q, scales, _ = int8_weights(5, 700)
    packed = native.pack_activations(torch.randn(9, 1000))
    x = torch.randn(2, 700)
    assert native.pack_activations(x, packed) is packed and (packed.batch, packed.columns) == (2, 700)
    out = poisoned(2, 5)
    native.linear_int8(packed, q, scales, None, out)
    assert torch.equal(out, linear_int8(x, q, scales))


@pytest.fixture
def guarded():
    """Copies a tensor to the end of readable memory: reading one byte too far ends the process."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    kept = []

    def place(tensor):
        raw = tensor.contiguous().view(torch.uint8).flatten()
        size = -(-raw.numel() // mmap.PAGESIZE) * mmap.PAGESIZE
        region = mmap.mmap(-1, size + mmap.PAGESIZE)
        memory = torch.frombuffer(region, dtype=torch.uint8)
        assert libc.mprotect(memory.data_ptr() + size, mmap.PAGESIZE, 0) == 0
        kept.append((region, memory))
        at_end = memory[size - raw.numel() : size]
        at_end.copy_(raw)
        return at_end.view(tensor.dtype).view(tensor.shape)

    yield place


@pytest.mark.parametrize("columns", [1, 15, 31, 63, 100, 4097])
def test_nothing_is_touched_beyond_the_end(isa, guarded, columns):
    q, scales, _ = int8_weights(3, columns)
    x = guarded(torch.randn(3, columns))
    linear_int8(x, guarded(q), guarded(scales))
    out = guarded(torch.zeros(9, 3))
    native.linear_int8(native.pack_activations(guarded(torch.randn(9, columns))), guarded(q), guarded(scales),
                       guarded(torch.randn(3)), out)
    transposed(guarded(torch.randn(2, 3)), guarded(q), scales, guarded(torch.zeros(2, columns)))
    for dtype in FLOATS:
        w = guarded(torch.randn(3, columns).to(dtype))
        linear_float(x, w)
        transposed(guarded(torch.randn(2, 3)), w)
    memory, norms = guarded(torch.randn(1, 4, columns)), guarded(torch.zeros(1, 4))
    native.slot_norms(memory, norms)
    write(guarded(torch.randn(1, columns)), memory, norms, guarded(torch.zeros(1, 4)), guarded(torch.zeros(1, 4)),
          torch.zeros(1, 4, dtype=torch.int64), 3, 1)
    gate = guarded(torch.randn(1, columns))
    native.gru_update(gate, gate, guarded(torch.randn(1, columns)))


# --- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("d", [1, 7, 16, 100, 1531])
def test_gates_and_norm(isa, batch, d):
    a, b, state = torch.randn(3, batch, d) * 4
    z = a.double().sigmoid()
    out, updated = poisoned(batch, d), state.clone()
    native.gru_reset(a, state, out)
    native.gru_update(a, b, updated)
    close(out, z * state.double(), 1e-6)
    close(updated, (1 - z) * state.double() + z * b.double().tanh(), 1e-6)

    weight, bias = torch.randn(2, d)
    native.layer_norm(a + 5, weight, bias, 1e-5, out)
    expected = torch.nn.functional.layer_norm((a + 5).double(), (d,), weight.double(), bias.double(), 1e-5)
    close(out, expected, 1e-5)


def test_gates_are_accurate_everywhere(isa):
    x = torch.cat([torch.linspace(-80, 80, 20001), torch.linspace(-1, 1, 2001) ** 5])[None]
    one, out = torch.ones_like(x), poisoned(*x.shape)
    native.gru_reset(x, one, out)
    assert ((out.double() / x.double().sigmoid()) - 1).abs().max() < 1e-6
    state = torch.zeros_like(x)
    native.gru_update(one * 80, x, state)  # the gate is 1: the state becomes tanh(x)
    assert (state.double() - x.double().tanh()).abs().div(x.double().tanh().abs().clamp(min=1e-35)).max() < 1e-6
    extreme = torch.tensor([[-1e30, 1e30, float("inf"), float("-inf"), float("nan")]])
    out, state = poisoned(1, 5), torch.zeros(1, 5)
    native.gru_reset(extreme, torch.ones(1, 5), out)
    native.gru_update(torch.full((1, 5), 100.0), extreme, state)
    assert torch.allclose(out[0, :4], torch.tensor([0.0, 1.0, 1.0, 0.0])) and out[0, 4].isnan()
    assert torch.equal(state[0, :4], torch.tensor([-1.0, 1.0, 1.0, -1.0])) and state[0, 4].isnan()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("d", [5, 64, 1000])
def test_window(isa, batch, d):
    query, buffer = torch.randn(batch, d), torch.randn(batch, 9, d)
    for valid in (0, 1, 6, 9):
        out = poisoned(batch, d)
        native.window_scores_mix(query, buffer, valid, 0.3, out)
        entries = buffer[:, :valid].double()
        weights = (0.3 * (entries @ query.double()[:, :, None])).softmax(1)
        close(out, (weights * entries).sum(1), 2e-6)


@pytest.mark.parametrize("heads,slots,d", [(1, 1, 3), (4, 33, 40), (2, 300, 129), (5, 17, 768)])
def test_slot_reads(isa, heads, slots, d):
    batch, k = 3, min(slots, 4)
    query, memory, ema = torch.randn(batch, heads, d), torch.randn(batch, slots, d), torch.rand(batch, slots)
    memory[:, slots // 2] = memory[:, 0]
    ema[:, slots // 2] = ema[:, 0]
    scores = poisoned(batch, heads, slots)
    native.slot_scores(query, memory, ema, 0.2, 0.7, scores)
    expected = 0.2 * query.double() @ memory.double().mT - 0.7 * ema.double()[:, None]
    close(scores, expected, 1e-6)
    assert torch.equal(scores[..., slots // 2], scores[..., 0])

    indices, alpha = poisoned(batch, heads, k, dtype=torch.int64), poisoned(batch, heads, k)
    native.slot_topk(scores, k, indices, alpha)
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    assert torch.equal(indices, order)
    close(alpha, scores.double().gather(-1, order).softmax(-1), 1e-6)

    mix = poisoned(batch, heads, d)
    native.slot_mix(alpha, indices, memory, mix)
    rows = memory.double()[torch.arange(batch)[:, None, None], indices]
    close(mix, torch.einsum("bhk,bhkd->bhd", alpha.double(), rows), 1e-6)

    last_read = torch.zeros(batch, slots, dtype=torch.int64)
    new_ema = ema.clone()
    native.read_metadata(alpha, indices, new_ema, last_read, 0.9, 42)
    added = torch.zeros(batch, slots).scatter_add_(1, indices.flatten(1), alpha.flatten(1))
    close(new_ema, 0.9 * ema.double() + 0.1 * added.double(), 1e-6)
    assert torch.equal(last_read == 42, added > 0)

    norms = poisoned(batch, slots)
    native.slot_norms(memory, norms)
    close(norms, memory.double().norm(dim=-1), 1e-6)


def test_topk_prefers_low_indices_and_survives_nan():
    scores = torch.tensor([[[1.0, 3.0, 3.0, 0.0, 3.0, 1.0]], [[0.0] * 6], [[float("nan")] * 6]])
    indices, alpha = poisoned(3, 1, 4, dtype=torch.int64), poisoned(3, 1, 4)
    native.slot_topk(scores, 4, indices, alpha)
    assert indices[:, 0].tolist() == [[1, 2, 4, 0], [0, 1, 2, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize("capacity", [0, 1, 2, 5])
def test_capacity(capacity):
    """The rule in its own words: visit heads, then ranks; a full slot gives 0; what is left is normalised."""
    scores = torch.randn(7, 5, 6)
    scores[0] = 0.0
    scores[1] = scores[1, :1]
    indices, alpha = poisoned(7, 5, 3, dtype=torch.int64), poisoned(7, 5, 3)
    native.slot_topk(scores, 3, indices, alpha, capacity)
    for b in range(7):
        served = [0] * 6
        for h in range(5):
            order = sorted(range(6), key=lambda j: (-scores[b, h, j].item(), j))[:3]
            weights = scores[b, h, order].double().softmax(0)
            kept = weights.clone()
            for rank, slot in enumerate(order):
                if served[slot] >= capacity:
                    kept[rank] = 0.0
                else:
                    served[slot] += 1
            assert indices[b, h].tolist() == order
            close(alpha[b, h], kept / kept.sum() if kept.sum() > 0 else weights, 1e-6)


RULE = dict(clip_max=1.5, theta=0.4, beta=6.0, decay=0.97, ema_decay=0.9, stale_weight=0.5, underuse_weight=0.02)


def write(candidate, memory, norms, read_ema, write_ema, last_write, t, slots):
    """Calls the kernel on its arguments, in place; returns vector, gate, novelty, branch, indices."""
    batch = candidate.shape[0]
    results = (poisoned(*candidate.shape), poisoned(batch), poisoned(batch), poisoned(batch, dtype=torch.int64),
               poisoned(batch, slots, dtype=torch.int64))
    native.novelty_write(candidate, memory, norms, read_ema, write_ema, last_write, t, *results, **RULE)
    return results


@pytest.mark.parametrize("d", [8, 100, 777])
@pytest.mark.parametrize("written", [1, 3])
def test_novelty_write(isa, d, written):
    """Row 0 is familiar, row 1 novel with a full memory, row 2 novel with fewer empty slots than are written."""
    batch, slots, t = 3, 6, 20
    memory, candidate = torch.rand(batch, slots, d), -torch.rand(batch, d)
    candidate[0] = 3 * memory[0, 4] + 0.01 * torch.randn(d)
    memory[2, 3] = 0.0
    memory[2, 5] = 0.0
    memory[1, 2] = memory[1, 4]
    read_ema, write_ema = torch.rand(batch, slots), torch.rand(batch, slots)
    read_ema[1, [2, 4]] = 0.001
    last_write = torch.randint(0, t, (batch, slots))
    last_write[1, [2, 4]] = 3
    norms = poisoned(batch, slots)
    native.slot_norms(memory, norms)

    new, new_norms, new_ema, new_last = memory.clone(), norms.clone(), write_ema.clone(), last_write.clone()
    vector, gate, novelty, branch, indices = write(candidate, new, new_norms, read_ema, new_ema, new_last, t, written)

    c, m = candidate.double(), memory.double()
    w = c * (1.5 / (c.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0)
    affinity = (m @ w[:, :, None])[..., 0] / ((w.norm(dim=1, keepdim=True) + 1e-8) * (m.norm(dim=2) + 1e-8))
    expected_novelty = 1 - affinity.amax(1)
    expected_gate = torch.where(expected_novelty > 0.4, torch.sigmoid(6 * (expected_novelty - 0.4)), 1.0)
    by_use = 0.5 * (t - last_write) + 0.02 / (1e-8 + read_ema.double())
    by_emptiness = torch.where(m.norm(dim=2) <= 1e-6, 1e4, 0.0) - torch.arange(slots)
    score = torch.stack([affinity[0], by_use[1], by_emptiness[2]])
    expected = score.sort(dim=1, descending=True, stable=True).indices[:, :written]
    chosen = torch.zeros(batch, slots, dtype=torch.float64).scatter_(1, expected, 1.0)

    assert branch.tolist() == [0, 1, 2] and gate[0] == 1.0
    assert torch.equal(indices, expected) and indices[2].tolist() == [3, 5, 0][:written]
    assert torch.equal(new_last, torch.where(chosen > 0, t, last_write))
    for found, value in ((vector, w), (novelty, expected_novelty), (gate, expected_gate),
                         (new, 0.97 * m + chosen[..., None] * (expected_gate[:, None] * w)[:, None]),
                         (new_ema, 0.9 * write_ema.double() + 0.1 * chosen)):
        close(found, value, 2e-6)
    fresh = poisoned(batch, slots)
    native.slot_norms(new, fresh)
    assert torch.equal(new_norms, fresh)


def test_states_do_not_depend_on_isa_or_threads():
    found = []
    for name in ISAS:
        for threads in (1, 2, 3):
            native.set_isa(name)
            native.set_threads(threads)
            torch.manual_seed(1)
            state = [torch.randn(2, 900), torch.randn(2, 50, 900), torch.zeros(2, 50), torch.rand(2, 50),
                     torch.rand(2, 50), torch.zeros(2, 50, dtype=torch.int64)]
            native.slot_norms(state[1], state[2])
            state += write(*state, 9, 2)
            mix, scores = torch.zeros(2, 900), torch.zeros(2, 1, 50)
            native.window_scores_mix(state[0], state[1], 37, 0.1, mix)
            native.slot_scores(mix[:, None], state[1], state[3], 0.1, 0.2, scores)
            native.gru_update(mix, state[0] * 2, mix)
            native.layer_norm(mix, state[0][0], state[0][1], 1e-5, mix)
            found.append([*state, mix, scores])
    assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))


# --- settings and errors ---------------------------------------------------------------------------------------------


def test_settings():
    assert native.reason() is None and ISAS[0] == "portable" and native.isa() == ISAS[-1]
    native.set_threads(3)
    assert native.threads() == 3
    for wrong in (0, -1, 1025):
        with pytest.raises(ValueError, match="threads"):
            native.set_threads(wrong)
    with pytest.raises(ValueError, match="sse9"):
        native.set_isa("sse9")
    assert native.memory_bandwidth(8 << 20, 3) > 1e6


def test_calls_from_several_threads_and_after_fork():
    q, scales, _ = int8_weights(512, 512)
    x = torch.randn(1, 512)
    expected = linear_int8(x, q, scales)
    right = []
    workers = [threading.Thread(target=lambda: right.append(
        all(torch.equal(linear_int8(x, q, scales), expected) for _ in range(50)))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert right == [True] * 4

    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(linear_int8(x, q, scales), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def f(*shape):
    return torch.zeros(shape)


def i8(*shape):
    return torch.zeros(shape, dtype=torch.int8)


def i64(*shape):
    return torch.zeros(shape, dtype=torch.int64)


PACKED = native.pack_activations(f(2, 8)) if native.available() else None


@pytest.mark.parametrize("call,message", [
    (lambda: native.pack_activations(f(2, 3, 8).transpose(0, 1)), "x: expected rows at even distances"),
    (lambda: native.pack_activations(f(2, 8).double()), "x: expected float32"),
    (lambda: native.pack_activations(f(8, 2).T), "x: expected a contiguous last dimension"),
    (lambda: linear_int8(f(1, 8), i8(3, 9), f(3)), r"w: expected shape \[any, 8\], found \[3, 9\]"),
    (lambda: linear_int8(f(1, 8), f(3, 8), f(3)), "w: expected int8, found float32"),
    (lambda: linear_int8(f(1, 8), i8(3, 8), f(4)), r"scales: expected shape \[3\], found \[4\]"),
    (lambda: linear_int8(f(1, 300), i8(3, 300), f(3, 2)), r"scales: expected shape \[3, 3\], found \[3, 2\]"),
    (lambda: linear_int8(f(1, 8), i8(3, 8), f(3), f(2)), "bias: expected shape"),
    (lambda: native.linear_int8(PACKED, i8(3, 8), f(3), None, f(1, 3)), "out: expected shape"),
    (lambda: native.linear_int8(PACKED, i8(3, 8), f(3), None, f(1, 3).expand(2, 3)),
     "out: expected a tensor whose elements do not overlap"),
    (lambda: linear_float(f(1, 8), i8(3, 8)), "w: expected float32, bfloat16 or float16, found int8"),
    (lambda: linear_float(f(1, 8), i64(3, 8)), "w: expected float32"),
    (lambda: transposed(f(1, 8), i8(3, 8), f(3)), r"w: expected shape \[8, any\]"),
    (lambda: transposed(f(1, 3), i8(3, 8)), "scales: expected a tensor"),
    (lambda: transposed(f(1, 3), f(3, 8), f(3)), "scales: expected None"),
    (lambda: native.gru_reset(f(1, 3), f(1, 4), f(1, 3)), "state: expected shape"),
    (lambda: native.gru_update(f(1, 3), f(1, 3), f(2, 3)), "state: expected shape"),
    (lambda: native.layer_norm(f(1, 3), f(3), f(4), 1e-5, f(1, 3)), "bias: expected shape"),
    (lambda: native.window_scores_mix(f(1, 3), f(1, 2, 3), 3, 1.0, f(1, 3)), "valid: expected 0 to 2, found 3"),
    (lambda: native.slot_scores(f(1, 2, 3), f(2, 4, 3), f(1, 4), 1.0, 0.0, f(1, 2, 4)), "memory: expected shape"),
    (lambda: native.slot_topk(f(1, 2, 4), 5, i64(1, 2, 5), f(1, 2, 5)), "k: expected 1 to 4, found 5"),
    (lambda: native.slot_topk(f(1, 2, 4), 0, i64(1, 2, 0), f(1, 2, 0)), "k: expected 1 to 4, found 0"),
    (lambda: native.slot_topk(f(1, 2, 4), 2, i64(1, 2, 3), f(1, 2, 3)), "indices: expected 2 entries"),
    (lambda: native.slot_mix(f(1, 1, 1), i64(1, 1, 1) + 4, f(1, 4, 3), f(1, 1, 3)),
     "indices: expected 0 to 3, found 4"),
    (lambda: native.slot_mix(f(1, 1, 2), i64(1, 1, 2) - 1, f(1, 4, 3), f(1, 1, 3)), "indices: expected 0 to 3"),
    (lambda: native.read_metadata(f(1, 1, 1), i64(1, 1, 1) + 9, f(1, 4), i64(1, 4), 0.9, 1),
     "indices: expected 0 to 3"),
    (lambda: native.read_metadata(f(1, 1, 1), i64(1, 1, 1), f(1, 4), f(1, 4), 0.9, 1), "last_read: expected int64"),
    (lambda: write(f(1, 3), f(1, 4, 3), f(1, 4), f(1, 4), f(1, 4), i64(1, 4), 0, 5), "write slots: expected 1 to 4"),
    (lambda: write(f(1, 3), f(1, 4, 3), f(4), f(1, 4), f(1, 4), i64(1, 4), 0, 1), "norms: expected shape"),
    (lambda: write(f(1, 3), f(1, 4, 3), f(2, 4).T, f(1, 4), f(1, 4), i64(1, 4), 0, 1), "norms: expected"),
    (lambda: native.memory_bandwidth(10, 1), "nbytes: expected at least 4096"),
    (lambda: native.memory_bandwidth(4096, 0), "repeats: expected at least 1"),
    (lambda: native._native.pack_activations(3, None, None, 0.0, None), "x: expected a DLPack capsule"),
])
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
