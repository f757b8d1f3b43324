"""HRM-Gemma: a fresh one against its base, adapters against merged weights, the recurrence against its equations."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import BACKENDS, FIXTURES, load_case, reasoning_case

from thl_engine import CheckpointError, ConfigError, Engine
from thl_engine.config import HRMGemma3nConfig, parse_config
from thl_engine.engine.resources import touched
from thl_engine.models import gemma3n, hrm_gemma3n, low_rank
from thl_engine.ops.backends import load_ops
from thl_engine.ops.weights import Adapted, Held
from thl_engine.paging.plan import SLOT_CHOICES

CASE = load_case(FIXTURES / "gemma3n" / "forward48")
CONFIG, WEIGHTS = reasoning_case()
TOKENS = torch.randint(110, (2, 13), generator=torch.Generator().manual_seed(1))


def engine(backend: str, weights=WEIGHTS, config=CONFIG, **options) -> Engine:
    return Engine.from_state_dict("hrm_gemma3n", config, weights, device="cpu", backend=backend, **options)


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def reference(weights, x: torch.Tensor, n: int, t: int, threshold: float) -> dict:
    """The module's equations for one position x [D], float64, one operation after the other."""
    w = {name.removeprefix("hrm."): value.double() for name, value in weights.items() if name.startswith("hrm.")}

    def linear(name, v):
        return w[f"{name}.weight"] @ v + w.get(f"{name}.bias", 0.0)

    def norm(name, v):
        centred = v - v.mean()
        return centred / (centred.square().mean() + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(v):
        return v * (1 + torch.erf(v / 2**0.5)) / 2

    low, high = (gelu(norm(f"{s}.start_norm", linear(f"{s}.start", x))) for s in "LH")
    size = len(low)
    joined = torch.cat([w["L.from_L.weight"], w["L.from_H.weight"], w["L.from_x.weight"]], dim=1)
    steps, residuals, q_values = [], [], []
    for _ in range(n):
        for made in range(1, t + 1):  # noqa: B007 - counts the updates
            seen = torch.cat([low, linear("P_HL", high), linear("P_xL", x)])
            both = joined @ seen + w["L.from_L.bias"]
            gate = 1 / (1 + torch.exp(-both[:size]))
            old, low = low, norm("L.norm", gate * torch.tanh(both[size:]) + (1 - gate) * low)
            residual = (low - old).square().sum().sqrt()
            if residual < threshold:
                break
        planned = linear("H.planning", gelu(linear("H.transform", torch.cat([high, linear("P_LH", low)]))))
        high = norm("H.norm", high + planned)
        q = linear("q_head", high)
        steps.append(made)
        residuals.append(float(residual))
        q_values.append(q)
        if q[0] > q[1]:
            break
        low = linear("reset", high)
    return {
        "z_H": high,
        "out": x + w["P_out.weight"] @ high,
        "steps": steps,
        "residuals": residuals,
        "q": torch.stack(q_values),
    }


@pytest.mark.parametrize(
    "options", [{}, {"cycles": "agent"}, {"cycles": (2, 1)}, {"cycles": "code", "max_cycles": 2}], ids=str
)
def test_the_recurrence_follows_the_equations(backend, options):
    model = engine(backend)
    state = model.new_state(2, **options)
    n, t = state.cycles
    with model.trace() as trace:
        logits, _ = model.forward(TOKENS, state)
    traced = trace.steps[0]
    used, steps = traced["cycles_used"], traced["L_steps"]
    for p, x in enumerate(traced["x"]):
        wanted = reference(WEIGHTS, x.double(), n, t, model.config.hrm.L_threshold)
        made = len(wanted["steps"])
        assert used[p] == made and steps[p].tolist() == wanted["steps"] + [0] * (n - made)
        close(traced["z_H"][p].double(), wanted["z_H"])
        close(traced["q_values"][p, :made].double(), wanted["q"])
        assert traced["L_residual"][p, :made].tolist() == pytest.approx(wanted["residuals"], rel=1e-3, abs=1e-5)
        assert bool(traced["L_residual"][p, made:].isnan().all())
        hidden = wanted["out"] / (wanted["out"].square().mean() + 1e-6).sqrt() * WEIGHTS["model.norm.weight"].double()
        scores = WEIGHTS["model.embed_tokens.weight"].double() @ hidden
        close(logits.flatten(0, 1)[p].double(), 12.0 * torch.tanh(scores / 12.0))


def test_positions_stop_at_different_times():
    """The case is one in which nothing above is idle: both kinds of stop happen, and not to all positions alike."""
    model = engine("reference")
    with model.trace() as trace:
        model.forward(TOKENS)
    used, steps = trace.steps[0]["cycles_used"], trace.steps[0]["L_steps"]
    assert len(set(used.tolist())) > 1 and used.max() == model.config.hrm.cycles
    assert len(set(steps[steps > 0].tolist())) > 1


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_a_fresh_model_equals_its_base(backend, quantize):
    config = parse_config(CONFIG, "hrm_gemma3n")
    generator = torch.Generator().manual_seed(2)
    weights = {
        b.name: hrm_gemma3n.initial(config, b, slice(0, b.shape[0]), generator) for b in hrm_gemma3n.blocks(config)
    }
    weights |= CASE.weights
    fresh = engine(backend, weights, quantize=quantize)
    base = Engine.from_state_dict(
        "gemma3n", CASE.config, CASE.weights, device="cpu", backend=backend, quantize=quantize
    )
    assert torch.equal(fresh.forward(TOKENS)[0], base.forward(TOKENS)[0])
    state, plain = fresh.new_state(2), base.new_state(2)
    for t in range(13):
        logits, state = fresh.step(TOKENS[:, t], state)
        assert torch.equal(logits, base.step(TOKENS[:, t], plain)[0])


def test_adapters_act_as_merged_weights(backend):
    """q, k, v with alpha / rank of L, gate, up, down with that of H, in every layer."""
    merged = dict(CASE.weights)
    sides = {"L": 3.0 / 2, "H": 5.0 / 3}
    for name in CASE.weights:
        module = name.removesuffix(".weight")
        side = next((s for s, targets in low_rank.TARGETS.items() if module.endswith(targets)), None)
        if side is not None:
            up, down = WEIGHTS[module + ".lora_B.weight"], WEIGHTS[module + ".lora_A.weight"]
            merged[name] = merged[name] + sides[side] * up @ down
    assert len([1 for name in merged if merged[name] is not CASE.weights[name]]) == 32  # two layers have no k, v
    base = Engine.from_state_dict("gemma3n", CASE.config, merged, device="cpu", backend=backend)
    still = WEIGHTS | {"hrm.P_out.weight": torch.zeros_like(WEIGHTS["hrm.P_out.weight"])}
    close(engine(backend, still).forward(TOKENS)[0], base.forward(TOKENS)[0])


def test_linear_of_an_adapted_matrix(backend):
    ops, generator = load_ops(backend, "cpu"), torch.Generator().manual_seed(3)
    for shape, dtype in (((1, 37), torch.float32), ((3, 5, 37), torch.bfloat16), ((11, 37), torch.float16)):
        x = torch.randn(shape, generator=generator)
        base, down, up = (torch.randn(size, generator=generator) for size in ((23, 37), (4, 37), (23, 4)))
        down, up, bias = down.to(dtype), up.to(dtype), torch.randn(23, generator=generator)
        matrix = Adapted(Held(base), Held(down), Held(up), 0.5)
        assert matrix.shape == (23, 37)
        wanted = x.double() @ (base.double() + 0.5 * up.double() @ down.double()).T + bias
        close(ops.linear(x, matrix, bias).double(), wanted, 1e-5)
        gate = torch.randn(*shape[:-1], 23, generator=generator)
        for quantile in (0.8, 1.6):
            assert torch.equal(
                ops.geglu_linear(gate, x, matrix, quantile), ops.geglu(gate, ops.linear(x, matrix), quantile)
            )


def test_int8_leaves_the_adapters_as_floats(backend):
    model = engine(backend, quantize="int8")
    config = model.config
    for block in hrm_gemma3n.blocks(config):
        dtype = model._store.tensors[block.name].dtype
        lora = "lora_" in block.name
        assert dtype == (torch.float32 if lora or block.kind == "vector" else torch.int8), block.name
    with model.trace() as trace:
        model.forward(TOKENS)
    assert trace.steps[0]["cycles_used"].shape == (26,)


def test_only_the_last_token_of_a_pass_is_thought_about(backend):
    model, ids = engine(backend), torch.randint(110, (1, 70), generator=torch.Generator().manual_seed(4))
    with model.trace() as trace:
        logits, _ = model.prefill(ids, model.new_state())
    assert [step.get("cycles_used", torch.empty(0)).shape[0] for step in trace.steps] == [1, 1]
    close(logits, model.forward(ids)[0][:, -1])


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_thoughts_do_not_depend_on_the_batch(quantize):
    """On the native backend, bit for bit."""
    model = engine("native" if "native" in BACKENDS else "reference", quantize=quantize)
    x = 3.0 * torch.randn(9, 40, generator=torch.Generator().manual_seed(5))
    together, effort = hrm_gemma3n.reason(model.config, model._passes.weights, model.ops, x, (3, 4))
    for p in range(9):
        alone, own = hrm_gemma3n.reason(model.config, model._passes.weights, model.ops, x[p : p + 1], (3, 4))
        close(alone[0], together[p])
        if model.ops.name == "native":
            assert torch.equal(alone[0], together[p])
            for name, values in effort.items():
                assert torch.equal(own[name][0].nan_to_num(), values[p].nan_to_num()), name


def test_a_saved_context_goes_on_bit_for_bit(backend, tmp_path):
    model = engine(backend)
    _, state = model.prefill(TOKENS, model.new_state(2, cycles=(3, 2), max_cycles=2))
    model.save_state(state, tmp_path / "state.safetensors")
    restored, fork = model.load_state(tmp_path / "state.safetensors"), state.clone()
    assert restored.cycles == fork.cycles == (2, 2)
    for t in range(4):
        logits, state = model.step(TOKENS[:, t], state)
        for other in (restored, fork):
            assert torch.equal(model.step(TOKENS[:, t], other)[0], logits)
    fields = state.to_dict()
    for bad in (torch.tensor([0, 1]), torch.tensor([1.0, 2.0]), torch.tensor(3)):
        with pytest.raises(CheckpointError, match="cycles"):
            model.state_from_dict(fields | {"cycles": bad})


def test_more_cycles_change_the_result(backend):
    model = engine(backend)
    one = model.forward(TOKENS, model.new_state(2, max_cycles=1))[0]
    assert not torch.equal(one, model.forward(TOKENS)[0])
    assert torch.equal(one, model.forward(TOKENS, max_cycles=1)[0])
    _, state = model.forward(TOKENS, cycles=(2, 5))
    assert state.cycles == (2, 5)
    assert model.new_state(cycles="math").cycles == (4, 8) and model.new_state().cycles == (3, 4)
    assert model.new_state(cycles="code", max_cycles=9).cycles == (9, 12)
    for options, message in (
        ({"cycles": "deep"}, "math, code, agent"),
        ({"cycles": (0, 1)}, "from 1 to 64"),
        ({"max_cycles": 65}, "max_cycles is 65"),
        ({"max_cycles": True}, "max_cycles is True"),
        ({"depth": 2}, "no option depth"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.new_state(**options)


def test_configuration():
    config = parse_config(CONFIG)  # recognised by `hrm`, beside the base's fields
    assert isinstance(config, HRMGemma3nConfig) and config.hrm.L_size == 17
    assert parse_config(json.loads(json.dumps(config.to_dict()))) == config
    assert parse_config({**CASE.config, "hrm": {}}).hrm.L_rank == 32
    assert parse_config(CASE.config).model_type == "gemma3n"
    defaults = HRMGemma3nConfig().hrm
    assert (defaults.L_size, defaults.H_size, defaults.cycles, defaults.L_steps) == (2048, 4096, 4, 8)
    assert (defaults.L_rank, defaults.L_alpha, defaults.H_rank, defaults.H_alpha) == (32, 16.0, 64, 32.0)
    nested = {
        "model_type": "hrm_gemma3n",
        "hrm": {"L_size": 5},
        "base_model": "x",
        "text_config": {"model_type": "gemma3n_text", "hidden_size": 64},
        "vision_config": {},
    }
    assert parse_config(nested).hrm.L_size == 5 and parse_config(nested).hidden_size == 64
    for hrm, message in (
        ({"L_sise": 3}, "hrm: unknown field 'L_sise' for this object; did you mean 'L_size'"),
        ({"L_size": 0}, "hrm: L_size is 0; it must be at least 1"),
        ({"cycles": 65}, "hrm: cycles is 65; it must be from 1 to 64"),
        ({"L_threshold": -1}, "hrm: L_threshold is -1.0; it must be 0"),
        ({"H_alpha": 0}, "hrm: H_alpha is 0.0; it must be more than 0"),
        ({"H_rank": 2.5}, "hrm: H_rank must be a whole number"),
        (3, "hrm must be an object of fields, found 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config({**CONFIG, "hrm": hrm})


def test_names_of_published_and_adapter_files():
    config = HRMGemma3nConfig()
    module = "layers.3.mlp.up_proj"
    shared = "model.layers.20.self_attn.k_proj"
    for name, stored in {
        f"base_model.model.model.{module}.lora_A.weight": f"model.{module}.lora_A.weight",
        f"base_model.model.model.language_model.{module}.lora_B.weight": f"model.{module}.lora_B.weight",
        f"model.{module}.lora_B.weight": f"model.{module}.lora_B.weight",
        f"base_model.model.{shared}.lora_A.weight": None,
        f"{shared}.weight": None,
        f"model.language_model.{module}.weight": f"model.{module}.weight",
        "hrm.P_out.weight": "hrm.P_out.weight",
        "model.vision_tower.x": None,
    }.items():
        assert hrm_gemma3n.stored_name(config, name) == stored, name


def test_the_walk_is_the_base_once_and_the_recurrence_revisited():
    config = parse_config(CONFIG)
    reads = [name for name, _ in hrm_gemma3n.walk(config).clocked]
    base = [name for name, _ in gemma3n.DECODER.walk(config).clocked]
    assert [name for name in reads if name in base] == base
    assert [reads.count(f"hrm.{name}.weight") for name in ("L.from_L", "H.planning", "reset", "P_xL")] == [12, 3, 2, 1]
    matrices = {b.name for b in hrm_gemma3n.blocks(config) if b.kind == "matrix"}
    assert set(reads) | set(hrm_gemma3n.ARCHITECTURE.head(config)) == matrices


def test_the_recurrence_is_pinned_first(backend):
    model = engine(backend, stream=True)
    plan = model.plan()
    revisited = {
        page.index
        for name, tensor in model._store.tensors.items()
        for page in tensor.pages
        if name.startswith("hrm.") and model._passes.schedules[()].uses().get(page.index, 0) > 1
    }
    room = sum(4096 * -(-model._store.pages[p].nbytes // 4096) for p in revisited)
    ring = SLOT_CHOICES[-1] * plan.slot_bytes  # whatever of it the plan takes
    tight = engine(backend, stream=True, memory_budget=plan.least_budget + ring + room)
    assert revisited and set(tight.plan().pinned) >= revisited


def test_sparse_matrices_are_counted_as_the_base_counts_them(tmp_path):
    """Of a matrix behind a sparse gate a step reads what the gate lets through, adapted or not."""
    config, weights = reasoning_case()
    model = Engine.from_state_dict("hrm_gemma3n", config, weights, device="cpu", backend="native", quantize="int8")
    base = gemma3n.ARCHITECTURE.touched(model.config)
    assert base and hrm_gemma3n.ARCHITECTURE.touched(model.config) == base
    kept = {name for name in base if "up" in name or model._store.tensors[name].transposed}
    assert touched(model._store, SimpleNamespace(sparse_share=1.0), 1) == {name: base[name] for name in kept}
