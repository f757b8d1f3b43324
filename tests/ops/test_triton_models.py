"""Whole models on the triton backend: recorded runs, and decoding steps that can be captured and replayed."""

import pytest
import torch
from conftest import FIXTURES, load_case

pytest.importorskip("triton", reason="triton is not installed")

from triton_device import DEVICE, poison  # noqa: F401

from thl_engine import Engine
from thl_engine.config import parse_config
from thl_engine.kernels.triton import attention
from thl_engine.models import architecture, hrm_text_block, kv_cache
from thl_engine.ops.backends import load_ops
from thl_engine.ops.weights import trainable


def opened(model: str, name: str, backend: str = "triton", **options):
    case = load_case(FIXTURES / model / name)
    device = DEVICE if backend == "triton" else "cpu"
    return case, Engine.from_state_dict(model, case.config, case.weights, device=device, backend=backend, **options)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert found.shape == expected.shape and not found.isnan().any()
    assert (found.cpu() - expected.cpu()).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("model", ["gemma3n", "gemma4"])
def test_gemma_recorded_tokens(model, monkeypatch, steps=3):
    monkeypatch.setattr(kv_cache, "SLACK", 3)  # rings of ten rows, shorter than the prompt
    case, engine = opened(model, "greedy16")
    ids = case.io["prompt_ids"]
    logits, state = engine.prefill(ids, engine.new_state())
    assert min(layer.capacity for layer in state.cache.layers) == 10
    for step in range(steps):
        close(logits, case.io["step_logits"][:, step])
        following = logits.argmax(dim=-1)
        ids = torch.cat([ids, following[:, None].cpu()], dim=1)
        if step + 1 < steps:
            logits, state = engine.step(following, state)
        if step == 0:
            state = engine.state_from_dict(state.to_dict())
    assert torch.equal(ids, case.io["output_ids"][:, : ids.shape[1]])


def test_hrm_text_recorded_tokens(steps=2):
    case, engine = opened("hrm_text", "greedy_prefix", kv_cache="float32")
    logits, state = engine.prefill(case.io["prompt_ids"], engine.new_state())
    for step in range(steps):
        close(logits, case.io["step_logits"][:, step])
        logits, state = engine.step(logits.argmax(dim=-1), state)


def test_hrm_text_prefixes_in_pieces(monkeypatch):
    monkeypatch.setattr(hrm_text_block, "PIECE", 5)
    case, engine = opened("hrm_text", "prefix")
    logits, _ = engine.forward(case.io["input_ids"][:, :12], token_type_ids=case.io["token_type_ids"][:, :12])
    close(logits, case.io["logits"][:, :12])


def test_heads_too_wide_for_the_kernel(monkeypatch):
    """One layer's are enough for the pass to go without it."""
    monkeypatch.setattr(attention, "widest", lambda x, turned=False: 12)
    case, engine = opened("gemma4", "greedy16")
    logits, state = engine.prefill(case.io["prompt_ids"], engine.new_state())
    close(logits, case.io["step_logits"][:, 0])
    logits, _ = engine.step(logits.argmax(dim=-1), state)
    close(logits, case.io["step_logits"][:, 1])


def test_inl_recorded_tokens():
    case, engine = opened("inl", "greedy")
    logits, _ = engine.forward(case.io["prompt_ids"])
    close(logits[:, -1], case.io["step_logits"][:, 0])


def test_him_recorded_passes():
    case, engine = opened("him", "reconstruction")
    state = engine.new_state()
    for number, tokens in enumerate(case.io["input_ids"]):
        logits, state = engine.forward(tokens, state, mask=case.io["attention_mask"][number], reconstruction=True)
        close(logits, case.io[f"pass{number}.logits"])
        close(state.to_dict()["memory"], case.io[f"pass{number}.memory"])


def test_hrm_recorded_forward():
    case, engine = opened("hrm", "forward_n1t1")
    logits, _ = engine.forward(case.io["input_ids"], cycles=(case.meta["run"]["N"], case.meta["run"]["T"]))
    close(logits, case.io["logits"])


def test_int8_rows_are_the_reference_ones():
    found, tokens = [], torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    for backend in ("triton", "reference"):
        _, engine = opened("inl", "greedy", backend, kv_cache="int8", sliding_window=5)
        logits, state = engine.prefill(tokens, engine.new_state())
        found.append(torch.stack([logits, engine.step(torch.tensor([5]), state)[0]]))
    close(*found, 5e-3)  # where a value lies between two integers, a last bit decides


class Launches:
    """Within it, what is launched: names, grids, and all arguments that are no tensors; the host reads no tensor."""

    def __init__(self, monkeypatch) -> None:
        self.made, self._monkeypatch = [], monkeypatch

    def __enter__(self):
        kind, made = type(attention._attend), self.made
        run = kind.run
        self._context = self._monkeypatch.context()
        patch = self._context.__enter__()

        def recorded(kernel, *args, grid, **options):
            given = [(tuple(a.shape), a.stride()) if isinstance(a, torch.Tensor) else a for a in args]
            made.append((kernel.__name__, grid, given, sorted(options.items())))
            return run(kernel, *args, grid=grid, **options)

        patch.setattr(kind, "run", recorded)
        if DEVICE == "cpu":  # nothing else tells that it would have to wait
            for name in ("item", "tolist", "__int__", "__bool__", "__float__", "__index__"):
                patch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"the host reads a tensor: {name}"))
        return self

    def __exit__(self, *error):
        self._context.__exit__(*error)


@pytest.mark.parametrize(
    "model, name, options",
    [
        ("inl", "greedy", {"kv_cache": "int8", "sliding_window": 4}),
        ("gemma3n", "greedy16", {}),
        ("hrm_text", "causal", {}),
        ("gemma4", "greedy16", {"kv_cache": "int8"}),
    ],
)
def test_a_step_launches_the_same_at_every_position(model, name, options, monkeypatch):
    case = load_case(FIXTURES / model / name)
    config, arch, ops = parse_config(case.config, model), architecture(model), load_ops("triton", DEVICE)
    weights = trainable(arch.blocks(config), {name: value.to(DEVICE) for name, value in case.weights.items()})
    state = arch.init_state(config, 1, DEVICE, **options)
    with torch.inference_mode():
        _, state = arch.advance(config, weights, ops, torch.tensor([[7, 3, 9, 2, 4]], device=DEVICE), state)
        seen = []
        for token in (8, 6):
            tokens = torch.tensor([[token]], device=DEVICE)
            expected, _ = arch.advance(config, weights, ops, tokens, state.clone())
            seen.append((arch.graph_key(config, state), Launches(monkeypatch)))
            with seen[-1][1], monkeypatch.context() as captured:
                at = {state.timestep: torch.tensor([state.timestep], device=DEVICE)}
                captured.setattr(ops, "counter", at.__getitem__)
                found, state = arch.advance(config, weights, ops, tokens, state)
            assert torch.equal(found, expected)
    (key, first), (other, second) = seen
    assert key == other and first.made == second.made and len(first.made) > 10
