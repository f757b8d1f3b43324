"""The compiled state operations against plain float64 torch; settings and bad arguments of all compiled kernels."""

import os
import threading

import pytest
import torch
from conftest import ISAS
from native_inputs import (
    BATCHES,
    close,
    int8_weights,
    linear_float,
    linear_int8,
    needs_native,
    poisoned,
    transposed,
    write,
)

from thl_engine.ops import native

pytestmark = [needs_native, pytest.mark.usefixtures("native_settings")]


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
    for found, value in (
        (vector, w),
        (novelty, expected_novelty),
        (gate, expected_gate),
        (new, 0.97 * m + chosen[..., None] * (expected_gate[:, None] * w)[:, None]),
        (new_ema, 0.9 * write_ema.double() + 0.1 * chosen),
    ):
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
            state = [
                torch.randn(2, 900),
                torch.randn(2, 50, 900),
                torch.zeros(2, 50),
                torch.rand(2, 50),
                torch.rand(2, 50),
                torch.zeros(2, 50, dtype=torch.int64),
            ]
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
    workers = [
        threading.Thread(
            target=lambda: right.append(all(torch.equal(linear_int8(x, q, scales), expected) for _ in range(50)))
        )
        for _ in range(4)
    ]
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


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: native.pack_activations(f()), "x: expected at least 1 dimension"),
        (lambda: native.pack_activations(f(2, 8).double()), "x: expected float32"),
        (lambda: native.pack_activations(f(8, 2).T), "x: expected a contiguous last dimension"),
        (lambda: linear_int8(f(1, 8), i8(3, 9), f(3)), r"w: expected shape \[any, 8\], found \[3, 9\]"),
        (lambda: linear_int8(f(1, 8), f(3, 8), f(3)), "w: expected int8, found float32"),
        (lambda: linear_int8(f(1, 8), i8(3, 8), f(4)), r"scales: expected shape \[3\], found \[4\]"),
        (lambda: linear_int8(f(1, 300), i8(3, 300), f(3, 2)), r"scales: expected shape \[3, 3\], found \[3, 2\]"),
        (lambda: linear_int8(f(1, 8), i8(3, 8), f(3), f(2)), "bias: expected shape"),
        (lambda: native.linear_int8(PACKED, i8(3, 8), f(3), None, f(1, 3)), "out: expected shape"),
        (
            lambda: native.linear_int8(PACKED, i8(3, 8), f(3), None, f(1, 3).expand(2, 3)),
            "out: expected a tensor whose elements do not overlap",
        ),
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
        (
            lambda: native.slot_mix(f(1, 1, 1), i64(1, 1, 1) + 4, f(1, 4, 3), f(1, 1, 3)),
            "indices: expected 0 to 3, found 4",
        ),
        (lambda: native.slot_mix(f(1, 1, 2), i64(1, 1, 2) - 1, f(1, 4, 3), f(1, 1, 3)), "indices: expected 0 to 3"),
        (
            lambda: native.read_metadata(f(1, 1, 1), i64(1, 1, 1) + 9, f(1, 4), i64(1, 4), 0.9, 1),
            "indices: expected 0 to 3",
        ),
        (lambda: native.read_metadata(f(1, 1, 1), i64(1, 1, 1), f(1, 4), f(1, 4), 0.9, 1), "last_read: expected int64"),
        (
            lambda: write(f(1, 3), f(1, 4, 3), f(1, 4), f(1, 4), f(1, 4), i64(1, 4), 0, 5),
            "write slots: expected 1 to 4",
        ),
        (lambda: write(f(1, 3), f(1, 4, 3), f(4), f(1, 4), f(1, 4), i64(1, 4), 0, 1), "norms: expected shape"),
        (lambda: write(f(1, 3), f(1, 4, 3), f(2, 4).T, f(1, 4), f(1, 4), i64(1, 4), 0, 1), "norms: expected"),
        (lambda: native.memory_bandwidth(10, 1), "nbytes: expected at least 4096"),
        (lambda: native.memory_bandwidth(4096, 0), "repeats: expected at least 1"),
        (lambda: native._native.pack_activations(3, None, None, 0.0, None), "x: expected a DLPack capsule"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
