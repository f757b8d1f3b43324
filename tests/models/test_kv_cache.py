"""The cache of keys and values against all positions kept as they came, and INL with its options."""

from dataclasses import replace

import pytest
import torch
from conftest import load_case
from inl_small import ODD, REFERENCE, advance, close, draw, folder, forward, held, random_tensors, recorded, share

from thl_engine import CheckpointError, Engine
from thl_engine.kernels.attention import causal
from thl_engine.models import inl, kv_cache
from thl_engine.ops.backends import load_ops

WINDOWS = (None, 1, 2, 7, 64, 200)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """What int8 rows keep of x [..., d]."""
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    return (x / torch.where(scale == 0, 1.0, scale)).round() * scale


@pytest.mark.parametrize("sizes", [[1] * 300, [64] * 5, [3, 64, 1, 1, 130, 27, 7, 64, 2, 1], [300], [1, 299]], ids=str)
@pytest.mark.parametrize("rows", kv_cache.FORMATS)
def test_what_is_seen(rows, sizes):
    generator = torch.Generator().manual_seed(len(sizes))
    every = torch.randn(2, len(WINDOWS), 2, 3, 300, 5, generator=generator)  # keys and values of each layer
    every[:, :, 0, 1, 17] = 0.0
    expected = rounded(every) if rows == "int8" else every
    cache = kv_cache.empty(WINDOWS, 2, 3, 5, 300, rows=rows)
    past, nbytes = 0, cache.nbytes
    for size in sizes:
        stop = min(past + size, 300)
        if past in (150, 199):
            cache = cache.clone(past)
        for layer, window in enumerate(WINDOWS):
            first = 0 if window is None else max(0, past - window + 1)
            seen = cache.append(layer, past, *every[:, layer, :, :, past:stop])
            for found, wanted in zip(seen, expected[:, layer, :, :, first:stop], strict=True):
                assert found.dtype == torch.float32
                assert torch.allclose(found, wanted, rtol=0, atol=1e-6), (window, past)
        past = stop
    assert past == 300 and cache.nbytes == nbytes
    bytes_of = 4 if rows == "float32" else 1
    assert cache.layers[3].keys.data.numel() * bytes_of == 2 * 3 * (7 - 1 + kv_cache.SLACK) * 5 * bytes_of


@pytest.mark.parametrize("rows", kv_cache.FORMATS)
def test_a_pass_made_twice_changes_nothing(rows):
    """A pass that failed after some layers is repeated from the same state."""
    keys = torch.randn(1, 1, 200, 4)
    once, twice = (kv_cache.empty([5], 1, 1, 4, 200, rows=rows) for _ in range(2))
    for past in range(200):
        new = keys[:, :, past : past + 1]
        twice.append(0, past, -new, new)
        for a, b in zip(once.append(0, past, new, -new), twice.append(0, past, new, -new), strict=True):
            assert torch.equal(a, b)


def test_int8_rows_have_scales_of_their_own():
    keys = torch.randn(2, 3, 4, 16) * torch.logspace(-6, 6, 24).view(2, 3, 4, 1)
    cache = kv_cache.empty([None], 2, 3, 16, 4, rows="int8")
    found, _ = cache.append(0, 0, keys, keys)
    assert ((found - keys).abs().amax(-1) <= keys.abs().amax(-1) / 127 / 2 * 1.001).all()
    assert cache.nbytes == 2 * (keys.numel() + 4 * 24)


def test_mask_of_a_window():
    for past, rows, window in ((0, 5, 3), (2, 4, 3), (10, 6, 4), (10, 1, 1), (3, 9, 100)):
        whole = causal(past + rows, 0)
        here = torch.arange(past + rows)
        whole |= here[None, :] <= here[:, None] - window
        found = causal(rows, past, window=window)
        assert torch.equal(found, whole[past:, max(0, past - window + 1) :])


# INL.

# Without early stopping chunks and whole sequences agree.
STILL = replace(ODD, num_layers=2, num_iterations_per_layer=4, adaptive_convergence_threshold=0.0)


@pytest.mark.parametrize(
    ("window", "rows"), [(1, "float32"), (5, "float32"), (40, "float32"), (1000, "float32"), (5, "int8")]
)
def test_a_window_is_a_mask(window, rows, backend):
    weights, ops, tokens = held(STILL, random_tensors(STILL)), load_ops(backend, "cpu"), draw(STILL, 2, 150)
    here = torch.arange(150)
    blocked = (here[None] > here[:, None]) | (here[None] <= here[:, None] - window)
    masked = inl.init_state(STILL, 2, kv_cache=rows)
    expected, _ = forward(STILL, weights, ops, tokens, masked, attention_mask=blocked)
    options = {"sliding_window": window, "kv_cache": rows}
    stepped, state = advance(STILL, weights, ops, tokens, inl.init_state(STILL, 2, **options), [64, 3, 1, 1, 50])
    whole, _ = forward(STILL, weights, ops, tokens, inl.init_state(STILL, 2, **options))
    tolerance = 1e-4 if rows == "float32" else 5e-3  # where a value lies between two integers, a last bit decides
    close(stepped, expected, tolerance)
    close(whole, expected, tolerance)
    if window < 100:
        assert state.nbytes < inl.init_state(STILL, 2, "meta", kv_cache=rows).nbytes / 3


@pytest.mark.parametrize("name", ["full_forward_early", "greedy"])
def test_int8_rows_change_logits_little(name):
    """By 0.2 % of the largest logit at most, as measured; the likeliest token stays."""
    case, config, weights = recorded(name)
    tokens = case.io["input_ids"] if "input_ids" in case.io else draw(config, 2, 40)
    exact, _ = advance(config, weights, REFERENCE, tokens, inl.init_state(config, len(tokens)))
    rough, _ = advance(config, weights, REFERENCE, tokens, inl.init_state(config, len(tokens), kv_cache="int8"), [9, 1])
    assert 1e-5 < share(rough, exact) < 0.005 and torch.equal(rough.argmax(-1), exact.argmax(-1))


@pytest.mark.parametrize(
    "options",
    [{"kv_cache": "int8"}, {"sliding_window": 6}, {"kv_cache": "int8", "sliding_window": 6, "context": 100}],
    ids=str,
)
def test_engine_with_options(options, backend, tmp_path):
    tensors, tokens = random_tensors(ODD), draw(ODD, 1, 90)
    engine = Engine.from_state_dict("inl", ODD.to_dict(), tensors, device="cpu", backend=backend, **options)
    plain = Engine.from_state_dict("inl", ODD.to_dict(), tensors, device="cpu", backend=backend)
    assert engine.plan().state_bytes == engine.new_state().nbytes < plain.plan().state_bytes
    _, state = engine.prefill(tokens[:, :80], engine.new_state())
    engine.save_state(state, tmp_path / "state.safetensors")
    loaded, fork = engine.load_state(tmp_path / "state.safetensors"), state.clone()
    for column in tokens[:, 80:].unbind(1):
        expected, state = engine.step(column, state)
        for other in (loaded, fork):
            assert torch.equal(engine.step(column, other)[0], expected)
    with pytest.raises(CheckpointError, match="state.safetensors: state: "):
        plain.load_state(tmp_path / "state.safetensors")


def test_streamed_equals_resident_with_int8_rows_and_a_window(backend):
    case = load_case(folder("greedy"))
    options = {"device": "cpu", "backend": backend, "kv_cache": "int8", "sliding_window": 9}
    texts = []
    for stream in (False, True):
        with Engine.from_state_dict("inl", case.config, case.weights, stream=stream, **options) as engine:
            texts.append(
                [(piece.id, piece.logprob) for piece in engine.generate([1, 2, 3], max_new_tokens=12, temperature=0)]
            )
    assert texts[0] == texts[1]
