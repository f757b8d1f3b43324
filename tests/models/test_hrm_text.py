"""HRM-Text: the recorded runs, its ways of reading against each other, its plan, its gradient."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import FIXTURES, cases, load_case
from safetensors.torch import save_file

from thl_engine import CheckpointError, ConfigError, Engine
from thl_engine.checkpoint.convert import init_checkpoint, quantize_checkpoint
from thl_engine.checkpoint.page import extent
from thl_engine.checkpoint.store import open_store
from thl_engine.config import HRMTextConfig, parse_config
from thl_engine.models import hrm_text, hrm_text_block
from thl_engine.ops.reference import ReferenceOps
from thl_engine.ops.weights import trainable
from thl_engine.paging.page_schedule import PageSchedule
from thl_engine.paging.prediction import bytes_in_order
from thl_engine.schedule import Walk

TOLERANCE = 2e-5  # relative to the largest magnitude of the tensor
CASE = load_case(FIXTURES / "hrm_text" / "causal")
CAUSAL = {**CASE.config, "prefix_lm": False}


def engine(backend: str, case=CASE, config=None, **options) -> Engine:
    return Engine.from_state_dict(
        "hrm_text", config or case.config, case.weights, device="cpu", backend=backend, **options
    )


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def text(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(101, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pieces(monkeypatch):
    """Prompts go through the blocks a few tokens at a time."""
    monkeypatch.setattr(hrm_text_block, "PIECE", 5)


@pytest.mark.parametrize("folder", [f for f in cases("hrm_text") if "greedy" not in f.name], ids=lambda f: f.name)
def test_recorded_forward(folder, backend):
    case = load_case(folder)
    inputs = {"token_type_ids": case.io["token_type_ids"]} if "token_type_ids" in case.io else {}
    logits, state = engine(backend, case).forward(case.io["input_ids"], **inputs)
    close(logits, case.io["logits"])
    assert state.timestep == logits.shape[1]


@pytest.mark.parametrize("folder", [f for f in cases("hrm_text") if "greedy" in f.name], ids=lambda f: f.name)
def test_recorded_greedy_tokens(folder, backend):
    case = load_case(folder)
    model = engine(backend, case, {**case.config, "prefix_lm": case.meta["run"]["prefix"]})
    ids = case.io["prompt_ids"]
    logits, state = model.prefill(ids, model.new_state())
    for step in range(case.meta["run"]["new_tokens"]):
        close(logits, case.io["step_logits"][:, step])
        following = logits.argmax(dim=-1)
        ids = torch.cat([ids, following[:, None]], dim=1)
        logits, state = model.step(following, state)
    assert torch.equal(ids, case.io["output_ids"])


def test_causally_one_by_one_in_pieces_and_whole(backend, pieces):
    model = engine(backend, config=CAUSAL)
    tokens = text(2, 70)
    whole, _ = model.forward(tokens)
    state, at = model.new_state(2), 0
    for count in (1, 4, 5, 6, 1, 31, 22):
        logits, state = model.forward(tokens[:, at : at + count], state)
        close(logits, whole[:, at : at + count])
        at += count
    assert at == 70
    state, at = model.new_state(2), 0
    for count in (2, 9, 1, 40, 18):
        logits, state = model.prefill(tokens[:, at : at + count], state)
        at += count
        close(logits, whole[:, at - 1])
    state = model.new_state(2)
    for t in range(70):
        logits, state = model.step(tokens[:, t], state)
        close(logits, whole[:, t])


@pytest.mark.parametrize("length", [1, 4, 5, 12])
def test_a_prompt_is_a_prefix_where_the_model_says_so(backend, pieces, length):
    model = engine(backend)
    tokens = text(2, 20)
    types = (torch.arange(20) < length).long().expand(2, -1)
    whole, _ = model.forward(tokens, token_type_ids=types)
    logits, state = model.prefill(tokens[:, :length], model.new_state(2))
    close(logits, whole[:, length - 1])
    for t in range(length, 20):
        logits, state = model.step(tokens[:, t], state)
        close(logits, whole[:, t])


def test_prefixes_in_pieces_equal_prefixes_at_once(backend, monkeypatch):
    """Of any pattern, also behind a context, and of another in each row."""
    model = engine(backend)
    tokens, types = text(3, 23), torch.randint(2, (3, 23), generator=torch.Generator().manual_seed(5))
    _, context = model.prefill(text(3, 7, seed=2), model.new_state(3))
    for state in (model.new_state(3), context):
        whole, _ = model.forward(tokens, state.clone(), token_type_ids=types)
        monkeypatch.setattr(hrm_text_block, "PIECE", 4)
        close(model.forward(tokens, state.clone(), token_type_ids=types)[0], whole)
        monkeypatch.undo()


def test_rows_do_not_depend_on_the_batch(backend):
    for quantize in ("none", "int8"):
        model = engine(backend, quantize=quantize)
        tokens = text(3, 30, seed=2)
        logits, together = model.prefill(tokens, model.new_state(3))
        alone = [model.prefill(tokens[b : b + 1], model.new_state()) for b in range(3)]
        close(torch.cat([made for made, _ in alone]), logits)
        logits, _ = model.step(tokens[:, 0], together)
        one_by_one = torch.cat([model.step(tokens[b : b + 1, 0], alone[b][1])[0] for b in range(3)])
        assert torch.equal(one_by_one, logits) if backend == "native" else close(one_by_one, logits) is None


def test_prompts_of_several_lengths_give_what_each_gives_alone():
    model = engine("reference")
    prompts = [text(n, seed=n).tolist() for n in (7, 3, 7, 12)]
    for config in (CASE.config, CAUSAL):
        model = engine("reference", config=config)
        texts: list[list[int]] = [[] for _ in prompts]
        for i, piece in model.generate_batch(prompts, max_new_tokens=6, temperature=0.0):
            texts[i].append(piece.id)
        assert texts == [[p.id for p in model.generate(q, max_new_tokens=6, temperature=0.0)] for q in prompts]


def test_a_saved_context_goes_on_bit_for_bit(backend, tmp_path):
    model = engine(backend)
    tokens = text(2, 40, seed=3)
    for length in (0, 3, 21):
        state = model.new_state(2)
        if length:
            _, state = model.prefill(tokens[:, :length], state)
        model.save_state(state, tmp_path / "state.safetensors")
        restored = model.load_state(tmp_path / "state.safetensors")
        for t in range(length, length + 4):
            logits, state = model.step(tokens[:, t], state)
            assert torch.equal(model.step(tokens[:, t], restored)[0], logits)


def test_other_cycles_are_another_computation(backend):
    """As a model whose configuration has them; a context stays with its own."""
    model, tokens = engine(backend), text(1, 9)
    for cycles, (high, low) in (("fast", (1, 1)), ("3x2", (3, 2)), ((2, 1), (2, 1))):
        other = engine(backend, config={**CASE.config, "H_cycles": high, "L_cycles": low})
        state = model.new_state(cycles=cycles)
        assert len(state.cache.layers) == high * (low + 1) * 2
        expected, _ = other.prefill(tokens, other.new_state())
        logits, state = model.prefill(tokens, state)
        assert torch.equal(logits, expected)
        with pytest.raises(ConfigError, match=f"the context was read with {high} and {low}"):
            hrm_text.with_options(model.config, state, cycles="4x1")
    fields = state.to_dict()
    assert model.state_from_dict(fields).cycles == (2, 1)
    with pytest.raises(CheckpointError, match="'cycles' is missing"):
        model.state_from_dict({name: value for name, value in fields.items() if name != "cycles"})
    with pytest.raises(ConfigError, match="cycles is 'swift'"):
        model.new_state(cycles="swift")


def test_options_and_inputs_that_do_not_fit(backend):
    model, tokens = engine(backend), text(1, 50)
    expected, _ = model.forward(tokens)
    small = model.new_state(context=50, kv_cache="int8")
    found, small = model.forward(tokens, small)
    close(found, expected, 0.05)
    with pytest.raises(ConfigError, match=r"51 tokens long; the context ends at 50 \(option context\)"):
        model.step(tokens[:, 0], small)
    for options, message in (
        ({"kv_cache": "int4"}, "kv_cache is 'int4'; it must be one of float32, int8"),
        ({"context": 129}, "from 1 to max_position_embeddings"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.new_state(**options)
    for types in (torch.ones(1, 49, dtype=torch.int64), torch.ones(1, 50), [1] * 50):
        with pytest.raises(ConfigError, match=r"token_type_ids: expected int64 \[1, 50\]"):
            model.forward(tokens, token_type_ids=types)


def test_int8_weights_stay_close(backend):
    expected, _ = engine(backend).forward(CASE.io["input_ids"])
    found, _ = engine(backend, quantize="int8").forward(CASE.io["input_ids"])
    close(found, expected, 0.05)


def published(**fields) -> dict:
    return {"model_type": "hrm_text", **fields}


def test_both_forms_of_the_configuration():
    one = parse_config(published(num_hidden_layers=3, H_cycles=2, L_cycles=3))
    other = parse_config(published(num_hidden_layers=24, num_layers_per_stack=3, rope_theta=1e4))
    assert one == other and one.num_layers_per_stack == 3 and one.scale == 50.0
    assert parse_config(published(embedding_scale=2.0)).scale == 2.0
    nested = published(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert parse_config(nested).rope_theta == parse_config(published(rope_theta=5e5)).rope_theta == 5e5
    for fields, message in (
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported is 'silu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: rope_type is 'yarn'"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling is .*; supported is null"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by another tool"),
        ({"H_cycles": 0}, "H_cycles is 0; it must be from 1"),
        ({"L_bp_cycles": [-1]}, "L_bp_cycles"),
        ({"num_hidden_layers": "many"}, "num_layers_per_stack must be a whole number"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config(published(**fields))


def test_folders_of_earlier_checkpoints(tmp_path):
    """Their projections are joined and named otherwise; opened, and packed, they are the same model."""
    fields, weights = CASE.config, dict(CASE.weights)
    for stack in "LH":
        for j in range(2):
            prefix = f"model.{stack}_module.layers.{j}."
            parts = [weights.pop(f"{prefix}self_attn.{name}_proj.weight") for name in ("gate", "q", "k", "v")]
            weights[f"{prefix}attn.gqkv_proj.weight"] = torch.cat(parts)
            weights[f"{prefix}attn.o_proj.weight"] = weights.pop(f"{prefix}self_attn.o_proj.weight")
            parts = [weights.pop(f"{prefix}mlp.{name}_proj.weight") for name in ("gate", "up")]
            weights[f"{prefix}mlp.gate_up_proj.weight"] = torch.cat(parts)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    save_file(weights, tmp_path / "model.safetensors")
    expected = engine("reference").forward(CASE.io["input_ids"])[0]
    with Engine.from_pretrained(tmp_path, backend="reference") as model:
        assert torch.equal(model.forward(CASE.io["input_ids"])[0], expected)
    quantize_checkpoint(tmp_path, tmp_path / "int8.safetensors")
    packed = engine("reference", quantize="int8").forward(CASE.io["input_ids"])[0]
    with Engine.from_pretrained(tmp_path / "int8.safetensors", backend="reference") as model:
        assert torch.equal(model.forward(CASE.io["input_ids"])[0], packed)


VARIANTS = {
    "biased": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "narrow heads": {"head_dim": 6},
    "one cycle": {"H_cycles": 1, "L_cycles": 1},
}
SIZES = {
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("counts", [[2], [1, 3], [3, 3], [0]])
def test_equals_transformers(variant, counts, backend):
    """Logits, and the gradient of every parameter, of tiny random models."""
    transformers = pytest.importorskip("transformers", minversion="5.9")
    torch.manual_seed(0)
    config = transformers.HrmTextConfig(**SIZES | VARIANTS[variant], L_bp_cycles=counts, attn_implementation="eager")
    model = transformers.HrmTextForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids, types = torch.randint(31, (2, 9)), torch.tensor([[1] * 4 + [0] * 5, [0, 1, 1, 0, 1, 1, 0, 0, 0]])
    expected = model.train()(ids, token_type_ids=types, use_cache=False).logits
    tensors = {name: value.detach().clone() for name, value in model.named_parameters()}
    native = Engine.from_state_dict("hrm_text", config.to_dict(), tensors, backend=backend)
    close(native.forward(ids, token_type_ids=types)[0], expected.detach())
    own = parse_config(config.to_dict())
    parameters = {name: torch.nn.Parameter(value) for name, value in tensors.items()}
    logits, _ = hrm_text.forward(
        own,
        trainable(hrm_text.blocks(own), parameters),
        ReferenceOps(),
        ids,
        hrm_text.init_state(own, 2, "meta"),
        token_type_ids=types,
        training=True,
    )
    weighting = torch.randn_like(logits)
    (logits * weighting).sum().backward()
    (expected * weighting).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert parameters[name].grad is None, name
        else:
            close(parameters[name].grad, parameter.grad)


def test_which_passes_training_follows_back():
    config = HRMTextConfig(H_cycles=3, L_cycles=2, L_bp_cycles=(2, 0))
    assert hrm_text.gradient_passes(config, (3, 2)) == [False, True, True, True, True, True, False, False, True]
    assert hrm_text.gradient_passes(config, (1, 3)) == [False, True, True, True]


def test_the_walk_of_a_step_and_of_a_prompt(pieces):
    config = parse_config(CASE.config)
    step = hrm_text.walk(config).reads(0)
    assert len(step) == 8 * (2 * 3 + 2) * 2
    assert hrm_text.pass_walk(config, 5).reads(0) == step
    long = hrm_text.pass_walk(config, 12).reads(0)
    assert len(long) == 3 * len(step) - 2 * 6 and set(long) == set(step)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Stacks of four blocks whose pages are of several sizes."""
    folder = tmp_path_factory.mktemp("hrm_text")
    config = {**CASE.config, "num_layers_per_stack": 4, "hidden_size": 64, "intermediate_size": 176}
    path = folder / "model.safetensors"
    init_checkpoint("hrm_text", config, path, seed=3, quantize="int8")
    return path


@pytest.mark.parametrize("piece", [5, hrm_text_block.PIECE])
def test_streamed_equals_resident(checkpoint, piece, monkeypatch):
    """Bit for bit at several budgets, for steps, prompts, forward and batches. A prompt of one piece takes the bytes of
    one token, any other those of one for each piece at most."""
    monkeypatch.setattr(hrm_text_block, "PIECE", piece)
    tokens, seen = text(2, 23), []
    with Engine.from_pretrained(checkpoint, backend="native", context=40, batch_size=2) as whole:
        everything = whole.plan().peak_memory_bytes
    with Engine.from_pretrained(checkpoint, backend="native", context=40, batch_size=2, stream=True) as least:
        smallest = least.plan().least_budget
    for budget in (everything, (everything + smallest) // 2, smallest):
        with Engine.from_pretrained(
            checkpoint, backend="native", context=40, batch_size=2, memory_budget=budget, stream=budget < everything
        ) as model:
            made = [model.forward(tokens, token_type_ids=torch.ones_like(tokens))[0]]
            before = model.stats()["bytes_streamed"]
            logits, state = model.prefill(tokens, model.new_state(2))
            prompt = model.stats()["bytes_streamed"] - before
            made.append(logits)
            for t in range(6):
                logits, state = model.step(tokens[:, t], state)
                made.append(logits)
            seen.append(made)
            step = model.plan().bytes_streamed_per_token
            assert (step > 0) == (budget < everything)
            assert prompt <= -(-23 // piece) * (step + model.plan().slots * model.plan().slot_bytes)
    for made in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made, seen[0], strict=True))


def test_the_plan_pins_the_stack_that_is_read_most(checkpoint):
    """Bytes a token are within a slot's uses of the bound of the fractional knapsack, at budgets from one stack on."""
    with Engine.from_pretrained(checkpoint, backend="native", context=40) as whole:
        everything = whole.plan().peak_memory_bytes
    store = open_store(checkpoint)
    sizes = {name: sum(extent(page)[1] for page in store.tensors[name].pages) for name in store.tensors}
    reads = [*hrm_text.walk(store.config).reads(0), *hrm_text.head(store.config)]
    uses = {name: reads.count(name) for name in reads}
    fast = sum(sizes[name] for name in uses if "L_module" in name)
    for share in (0.0, 0.3, 0.6, 0.9):
        with Engine.from_pretrained(checkpoint, backend="native", context=40, stream=True) as least:
            base = least.plan().least_budget + fast
        budget = int(base + share * (everything - base))
        with Engine.from_pretrained(
            checkpoint, backend="native", context=40, memory_budget=budget, stream=True
        ) as model:
            plan = model.plan()
        room, bound = budget - (plan.peak_memory_bytes - plan.pinned_bytes - plan.slot_bytes * plan.slots), 0.0
        for name in sorted(uses, key=uses.__getitem__, reverse=True):
            kept = min(room, sizes[name])
            room -= kept
            bound += uses[name] * (sizes[name] - kept)
        assert "read in order instead" in str(plan)
        assert bound <= plan.bytes_streamed_per_token <= bound + max(uses.values()) * plan.slots * plan.slot_bytes


def test_what_a_reader_moves_who_does_not_know_the_schedule():
    """Of two stacks L L L H twice: with room for L and a page, L once a pass of three and H each time."""
    store = SimpleNamespace(tensors={})
    for k, name in enumerate("abcd"):
        store.tensors[name] = SimpleNamespace(kind="matrix", pages=[SimpleNamespace(index=k)])
    schedule = PageSchedule(store, Walk(tuple((name, 1) for name in "abababcd" * 2)), ())
    pages = dict.fromkeys(range(4), 10)
    assert bytes_in_order(schedule, pages, 10) == 160
    assert bytes_in_order(schedule, pages, 29) == 2 * 40
    assert bytes_in_order(schedule, pages, 40) == 0
