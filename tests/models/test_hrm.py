"""HRM-text: the recorded runs of the published implementation, its schedule, state, growth and chat rules."""

import json
from math import sqrt

import pytest
import torch
from conftest import cases
from hrm_small import ODD, random_tensors
from safetensors.torch import load_file

from thl_engine import Engine
from thl_engine.checkpoint.growth import expand_layers, expand_vocabulary
from thl_engine.checkpoint.quant import quantize_rows
from thl_engine.config import HRMConfig, parse_config
from thl_engine.engine.hrm_chat import chat
from thl_engine.errors import CheckpointError
from thl_engine.kernels.stablemax import log_stablemax, stablemax_cross_entropy, stablemax_scores
from thl_engine.models import hrm
from thl_engine.ops.backends import load_ops
from thl_engine.ops.reference import ReferenceOps
from thl_engine.ops.weights import Held, Trainable, trainable
from thl_engine.text.sampler import Sampling
from thl_engine.train.hrm_losses import deep_supervision, simple_loss

FOLDERS = {folder.name: folder for folder in cases("hrm")}
FORWARDS = [name for name in FOLDERS if name.startswith("forward_")]
VALUES, GRADIENTS, EXACT = 2e-4, 2e-4, 1e-12  # relative to the largest magnitude of the tensor


class Recorded:
    """A recorded case: configuration, cycles, and tensors by name."""

    def __init__(self, name: str) -> None:
        folder = FOLDERS[name]
        meta = json.loads((folder / "config.json").read_text())
        self.io = load_file(folder / "io.safetensors")
        self.run = meta.get("run", {})
        if (folder / "weights.safetensors").exists():
            self.config = parse_config(meta["config"], "hrm")
            stored = load_file(folder / "weights.safetensors")
            self.tensors = {k: v for k, v in stored.items() if not k.startswith("after.")}
            self.after = {k.removeprefix("after."): v for k, v in stored.items() if k.startswith("after.")}
            self.cycles = self.run["N"], self.run["T"]


def weights_of(config: HRMConfig, tensors: dict) -> dict:
    return trainable(hrm.blocks(config), tensors)


def int8_weights(config: HRMConfig, tensors: dict) -> dict:
    weights = weights_of(config, tensors)
    quantised = {b.name: Held(*quantize_rows(tensors[b.name])) for b in hrm.blocks(config) if b.kind == "matrix"}
    return {**weights, **quantised}


@torch.inference_mode()
def run_forward(config, tensors, backend, tokens, cycles, weights=weights_of) -> dict:
    """All recorded values of one `forward`, the logits of each segment among them."""
    ops, weights, seen = load_ops(backend, "cpu"), weights(config, tensors), {}
    seen["logits"], _ = hrm.forward(
        config, weights, ops, tokens, hrm.init_state(config, len(tokens)), seen.__setitem__, cycles=cycles
    )
    for s in range(int(seen["num_segments"])):
        hidden = seen[f"segment{s}.z_H"].flatten(0, 1)
        seen[f"segment{s}.logits"] = hrm.logits(config, weights, ops, hidden).view(*tokens.shape, -1)
    return seen


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def check(got: dict, io: dict, prefix: str = "", inputs: tuple = ("input_ids", "input_ids_new_vocab")) -> int:
    """Compares all recorded values whose name starts with `prefix`; returns how many there were."""
    names = [name for name in io if name.startswith(prefix) and name not in inputs]
    for name in names:
        found, expected = got[name.removeprefix(prefix)], io[name]
        if expected.is_floating_point():
            assert distance(found, expected) <= VALUES, name
        else:
            assert torch.equal(found, expected) and found.dtype == expected.dtype, name
    return len(names)


@pytest.mark.parametrize("name", FORWARDS)
def test_recorded_inference(name, backend):
    case = Recorded(name)
    got = run_forward(case.config, case.tensors, backend, case.io["input_ids"], case.cycles)
    assert check(got, case.io) >= 10
    assert f"segment{int(case.io['num_segments'])}.z_H" not in got


def test_recorded_vocabulary_growth(backend):
    case = Recorded("expand_vocab")
    new_size = case.after["output_head.weight"].shape[0]
    grown, tensors = expand_vocabulary(case.config, case.tensors, new_size)
    tensors.update(case.after)  # the values that the published run drew
    ids = case.io["input_ids"]
    before = run_forward(case.config, case.tensors, backend, ids, case.cycles)
    after = run_forward(grown, tensors, backend, ids, case.cycles)
    assert check(before, case.io, "before.") and check(after, case.io, "after.")
    new_ids = run_forward(grown, tensors, backend, case.io["input_ids_new_vocab"], case.cycles)
    assert check(new_ids, case.io, "after_new_ids.")
    for name, value in before.items():
        if name.endswith("logits") and value.dim() == 3:  # old tokens' columns; torch may sum a wider product otherwise
            found = after[name][..., : value.shape[-1]]
            assert torch.equal(found, value) if backend == "native" else distance(found, value) <= 1e-6, name
        else:
            assert torch.equal(after[name], value), name


def test_recorded_layer_growth(backend):
    case = Recorded("expand_layers")
    grown, tensors = expand_layers(
        case.config, case.tensors, {"L_layers": case.config.L_layers + 1, "H_layers": case.config.H_layers + 1}
    )
    added = tensors.keys() - case.tensors.keys()
    assert added == case.after.keys()
    assert sum(tensors[name].numel() for name in added) == int(case.io["params_added"])
    tensors.update(case.after)
    ids = case.io["input_ids"]
    assert check(run_forward(case.config, case.tensors, backend, ids, case.cycles), case.io, "before.")
    assert check(run_forward(grown, tensors, backend, ids, case.cycles), case.io, "after.")


def test_recorded_chat(backend):
    case = Recorded("chat_greedy")
    prompt, expected = case.io["prompt_ids"].tolist(), case.io["output_ids"].tolist()
    with Engine.from_state_dict("hrm", case.config.to_dict(), case.tensors, device="cpu", backend=backend) as engine:
        state = engine.new_state(cycles=case.cycles)
        with engine.trace("num_segments", "logits") as trace:
            answer = list(
                chat(engine, prompt, max_new_tokens=len(expected), sampling=Sampling(temperature=0), state=state)
            )
    assert [piece.id for piece in answer] == expected
    assert all(step.keys() == {"num_segments", "logits"} for step in trace.steps)
    assert [int(step["num_segments"]) for step in trace.steps] == case.io["num_segments"].tolist()
    assert distance(torch.cat([step["logits"] for step in trace.steps]), case.io["step_logits"]) <= VALUES
    assert state.timestep == len(prompt) + len(expected) - 1 > hrm.WINDOW  # the window slid


def test_stablemax():
    io = Recorded("stablemax").io
    logits, labels = io["logits"], io["labels"]
    assert torch.equal(stablemax_scores(logits), io["s_of_logits"])
    assert distance(log_stablemax(logits), io["log_stablemax_f32"]) <= 1e-6
    assert distance(log_stablemax(logits.double()), io["log_stablemax_f64"]) <= EXACT
    logits.requires_grad_()
    losses = stablemax_cross_entropy(logits, labels)
    assert losses.dtype == torch.float64 and distance(losses, io["cross_entropy_f64"]) <= EXACT
    assert (losses[labels == -100] == 0).all()
    assert distance(losses.mean(), io["mean_loss_f64"]) <= EXACT
    losses.mean().backward()
    assert distance(logits.grad, io["grad_logits_of_mean"]) <= 1e-6


def test_stablemax_gradient_is_finite_where_a_branch_divides_by_zero():
    x = torch.tensor([-3.0, 0.0, 1.0, 2.0], requires_grad=True)
    stablemax_scores(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([1 / 16, 1.0, 1.0, 1.0]))


def parameters_of(case: Recorded) -> dict[str, torch.Tensor]:
    buffers = {"z0_L", "z0_H", "rope.inv_freq"}
    return {name: value.clone().requires_grad_(name not in buffers) for name, value in case.tensors.items()}


def test_recorded_deep_supervision():
    case = Recorded("train_step")
    parameters = parameters_of(case)
    got = deep_supervision(
        case.config,
        weights_of(case.config, parameters),
        ReferenceOps(),
        case.io["input_ids"],
        case.io["labels"],
        case.cycles,
    )
    assert got.loss.dtype == torch.float64 and distance(got.loss.detach(), case.io["loss"]) <= VALUES
    assert len(got.segments) == int(case.io["num_segments"]) == case.config.halt_max_steps
    values = {"logits": got.logits.detach()}
    for s, part in enumerate(got.segments):
        for name in ("lm_loss", "q_halt_logits", "q_continue_logits", "row_correct"):
            values[f"segment{s}.{name}"] = getattr(part, name).detach()
    values |= {name: getattr(got.segments[-1], name).detach() for name in ("q_halt_logits", "q_continue_logits")}
    recorded = {k: v for k, v in case.io.items() if not k.startswith(("grad", "loss", "num_", "labels"))}
    assert check(values, recorded) >= 12
    got.loss.backward()
    for name in case.run["names"]:
        assert distance(parameters[name].grad, case.io[f"grad.{name}"]) <= GRADIENTS, name
    norm = torch.stack([p.grad.double().norm() for p in parameters.values() if p.grad is not None]).norm()
    assert distance(norm, case.io["grad_global_norm"]) <= GRADIENTS


def test_recorded_simple_trainer():
    case = Recorded("simple_trainer")
    parameters, carry = parameters_of(case), None
    weights = weights_of(case.config, parameters)
    for batch in ("batch0", "batch1"):
        for parameter in parameters.values():
            parameter.grad = None
        loss, carry = simple_loss(
            case.config,
            weights,
            ReferenceOps(),
            case.io[f"{batch}.inputs"],
            case.io[f"{batch}.targets"],
            carry,
            case.cycles,
        )
        loss.backward()
        assert distance(loss.detach(), case.io[f"{batch}.loss"]) <= VALUES
        assert distance(carry.high, case.io[f"{batch}.z_H"]) <= VALUES
        assert distance(carry.low, case.io[f"{batch}.z_L"]) <= VALUES
        for name in case.run["names"]:
            assert distance(parameters[name].grad, case.io[f"{batch}.grad.{name}"]) <= GRADIENTS, name
        assert parameters["q_head.weight"].grad is None


def test_the_walk_revisits_in_true_order():
    config = HRMConfig(L_layers=1, H_layers=1, halt_max_steps=2)
    matrices = ("attention.qkv_proj", "attention.o_proj", "feed_forward.gate_up_proj", "feed_forward.down_proj")
    low, high = ([f"{m}_module.layers.0.{name}.weight" for name in matrices] for m in "LH")
    walk = hrm.walk(config, cycles=(2, 3))
    assert walk.may_stop and walk.period == 1
    assert list(walk.reads(7)) == 2 * (2 * (3 * low + high))
    assert hrm.forward_walk(config, (1, 5), cycles=(2, 3)).reads(0) == (*walk.reads(0), *hrm.head(config))
    assert hrm.walk(config, cycles="fast").reads(0) == (*low, *high) * 2


class Spied:
    """Weights that note each matrix asked for."""

    def __init__(self, weights: dict) -> None:
        self.weights, self.asked = weights, []

    def __getitem__(self, name: str):
        if isinstance(self.weights[name], Trainable) and not name.startswith("input_embedding"):
            self.asked.append(name)
        return self.weights[name]


@pytest.mark.parametrize("cycles", hrm.PRESETS.values(), ids=hrm.PRESETS.keys())
@pytest.mark.parametrize("halts", [False, True])
def test_requests_are_the_walk_up_to_the_segment_that_halts(cycles, halts, backend):
    weights = Spied(weights_of(ODD, random_tensors(ODD, q_bias=(9.0, -9.0) if halts else (-9.0, 9.0))))
    tokens, seen = torch.arange(6).view(2, 3), {}
    state = hrm.init_state(ODD, 2, cycles=cycles)
    with torch.inference_mode():
        hrm.advance(ODD, weights, load_ops(backend, "cpu"), tokens, state, seen.__setitem__)
    reads = list(hrm.walk(ODD, cycles=cycles).reads(0))
    segments = int(seen["num_segments"])
    assert segments == (1 if halts else ODD.halt_max_steps)
    assert weights.asked == reads[: len(reads) * segments // ODD.halt_max_steps]


@pytest.mark.parametrize("batch", range(1, 9))
@torch.inference_mode()
def test_advance_is_the_last_position_of_forward(batch, backend):
    ops, weights = load_ops(backend, "cpu"), weights_of(ODD, random_tensors(ODD))
    tokens = torch.randint(ODD.vocab_size, (batch, 70), generator=torch.Generator().manual_seed(batch))
    state = hrm.init_state(ODD, batch, cycles=(2, 1))
    start = 0
    for count in (1, 3, 60, 1, 5):  # up to the window's edge and over it
        hidden, state = hrm.advance(ODD, weights, ops, tokens[:, start : start + count], state)
        start += count
        window = tokens[:, max(0, start - hrm.WINDOW) : start]
        assert hidden.shape == (batch, 1, ODD.hidden_size)
        found = hrm.logits(ODD, weights, ops, hidden[:, 0])
        for row in range(batch):  # of a batch, `forward` would halt only together
            alone = hrm.init_state(ODD, 1, cycles=(2, 1))
            fresh, after = hrm.forward(ODD, weights, ops, window[row : row + 1], alone)
            assert torch.allclose(found[row], fresh[0, -1], rtol=1e-5, atol=1e-5)
            assert torch.equal(state.window[row], after.window[0]) and state.valid == after.valid
    assert state.timestep == 70 and state.valid == hrm.WINDOW


@torch.inference_mode()
def test_forward_continues_a_state_and_adopts_its_cycles(backend):
    ops, weights = load_ops(backend, "cpu"), weights_of(ODD, random_tensors(ODD))
    tokens = torch.randint(ODD.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    whole, _ = hrm.forward(ODD, weights, ops, tokens, hrm.init_state(ODD, 2), cycles=(3, 1))
    _, state = hrm.forward(ODD, weights, ops, tokens[:, :5], hrm.init_state(ODD, 2), cycles=(3, 1))
    rest, state = hrm.forward(ODD, weights, ops, tokens[:, 5:], state)
    assert state.cycles == (3, 1) and state.timestep == 12
    torch.testing.assert_close(rest, whole[:, 5:])


@torch.inference_mode()
def test_a_batch_halts_only_together(backend):
    tensors, tokens = random_tensors(ODD), torch.arange(15).view(3, 5)
    # The first row halts after one segment, the others never: the halting head reads one feature that tells them apart.
    seen = run_forward(ODD, tensors, backend, tokens, (2, 2))
    means = seen["segment0.z_H"].mean(dim=1)
    direction = means[0] - means[1:].mean(dim=0)
    threshold = ((means[0] @ direction) + (means[1:] @ direction).max()) / 2
    tensors["q_head.weight"] = torch.stack([direction, torch.zeros_like(direction)])
    tensors["q_head.bias"] = torch.stack([-threshold, torch.tensor(0.0)])
    alone = run_forward(ODD, tensors, backend, tokens[:1], (2, 2))
    together = run_forward(ODD, tensors, backend, tokens, (2, 2))
    assert int(alone["num_segments"]) == 1 < int(together["num_segments"])
    assert (together["steps_taken"] == together["num_segments"]).all()


@torch.inference_mode()
def test_states_are_independent_and_restart_bit_for_bit(backend):
    ops, weights = load_ops(backend, "cpu"), weights_of(ODD, random_tensors(ODD))
    tokens = torch.randint(ODD.vocab_size, (3, 80), generator=torch.Generator().manual_seed(2))
    _, state = hrm.advance(ODD, weights, ops, tokens[:, :62], hrm.init_state(ODD, 3, cycles=(1, 2)))
    kept, fork = state.to_dict(), state.clone()
    for t in range(62, 66):
        hidden, state = hrm.advance(ODD, weights, ops, tokens[:, t : t + 1], state)
    restored = hrm.state_from_dict(ODD, kept, ReferenceOps())
    for t in range(62, 66):
        again, restored = hrm.advance(ODD, weights, ops, tokens[:, t : t + 1], restored)
    assert torch.equal(again, hidden)
    assert fork.timestep == 62 and torch.equal(fork.window, kept["window"])
    assert all(torch.equal(a, b) for a, b in zip(state.to_dict().values(), restored.to_dict().values(), strict=True))
    assert state.nbytes == hrm.init_state(ODD, 3, "meta").nbytes
    fork.become(state)
    assert fork.timestep == 66 and fork.cycles == (1, 2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"window": None}, "'window' is missing"),
        ({"extra": torch.zeros(1)}, "unknown field 'extra'"),
        ({"window": torch.zeros(2, 63, dtype=torch.int64)}, r"\[2, 63\], expected \[2, 64\]"),
        ({"window": torch.zeros(2, 64)}, "torch.float32"),
        ({"window": torch.full((2, 64), 37)}, "outside the vocabulary of 37"),
        ({"window": torch.full((2, 64), -1)}, "outside the vocabulary"),
        ({"valid": torch.tensor(65)}, "do not agree"),
        ({"timestep": torch.tensor(-1)}, "do not agree"),
        ({"cycles": torch.tensor([2, 0])}, "cycles"),
    ],
)
def test_a_damaged_state_is_one_clear_line(change, message):
    fields = {**hrm.init_state(ODD, 2).to_dict(), **change}
    with pytest.raises(CheckpointError, match=message) as caught:
        hrm.state_from_dict(ODD, {name: v for name, v in fields.items() if v is not None}, ReferenceOps())
    assert "\n" not in str(caught.value)


@torch.inference_mode()
def test_int8_stays_close(backend):
    case = Recorded("forward_n2t2")
    ids, cycles = case.io["input_ids"], case.cycles
    exact = run_forward(case.config, case.tensors, backend, ids, cycles)
    rounded = run_forward(case.config, case.tensors, backend, ids, cycles, weights=int8_weights)
    assert distance(rounded["segment0.logits"], exact["segment0.logits"]) < 0.05
    assert distance(rounded["segment0.z_H"], exact["segment0.z_H"]) < 0.05


def test_initial_values_are_the_published_ones(backend):
    config = HRMConfig(vocab_size=400)
    generator = torch.Generator().manual_seed(0)
    tensors = {b.name: hrm.initial(config, b, slice(None), generator) for b in hrm.blocks(config)}
    assert {b.name: tuple(tensors[b.name].shape) for b in hrm.blocks(config)} == {
        b.name: b.shape for b in hrm.blocks(config)
    }
    for name, std in (
        ("input_embedding.embedding_weight", 1 / 16),
        ("output_head.weight", 1 / 16),
        ("z0_H", 1.0),
        ("L_module.layers.2.feed_forward.down_proj.weight", 1 / sqrt(512)),
    ):
        values = tensors[name]
        tolerance = 0.15 if name == "z0_H" else 0.02
        assert abs(values.std().item() / std - 1) < tolerance and abs(values.mean().item()) < tolerance * std
        assert values.abs().max() <= 2 * 1.1369 * std
    assert (tensors["H_module.layers.0.norm2.weight"] == 1).all()
    seen = run_forward(config, tensors, backend, torch.zeros(1, 2, dtype=torch.int64), "fast")
    assert int(seen["num_segments"]) == config.halt_max_steps  # an untrained model never wants to halt
    assert torch.equal(
        Recorded("forward_n1t1").tensors["rope.inv_freq"], hrm.inverse_frequencies(Recorded("forward_n1t1").config)
    )


def test_a_trace_has_the_logits_of_every_segment(backend):
    tensors = random_tensors(ODD)
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    for stream in (True, False):
        with Engine.from_state_dict("hrm", ODD.to_dict(), tensors, backend=backend, stream=stream) as model:
            with model.trace() as trace:
                traced, _ = model.forward(tokens)
            plain, _ = model.forward(tokens)
        step = trace.steps[0]
        found = [step[f"segment{s}.logits"] for s in range(int(step["num_segments"]))]
        assert torch.equal(found[-1], traced)
        assert all(value.shape == traced.shape for value in found)
        torch.testing.assert_close(plain, traced, rtol=1e-5, atol=1e-6)
