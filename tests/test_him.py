"""HIM: the recorded runs, a plain float64 version at odd sizes, the token loop over answer blocks, the batch mode."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import BACKENDS, RECORDED, cases, load_case

from thl_engine import Engine
from thl_engine.cli.batch import answer, answer_file, read_samples
from thl_engine.config import HIMConfig, parse_config
from thl_engine.errors import CheckpointError, ConfigError, TokenizerError
from thl_engine.kernels.linear import widen
from thl_engine.models import architecture, him
from thl_engine.ops import load_ops
from thl_engine.quant import quantize_rows
from thl_engine.sampler import Sampler, Sampling
from thl_engine.tokenizer import CharTokenizer
from thl_engine.weights import Held

CASES = [folder for folder in cases("him") if folder.name != "generate_greedy"]
GENERATION = next(folder for folder in cases("him") if folder.name == "generate_greedy")
TOLERANCE = 2e-5  # relative to the largest magnitude of the tensor
SMALL = HIMConfig(vocab_size=51, embed_dim=66, num_heads=6, num_kv_heads=2, num_encoder_layers=4, dim_feedforward=37,
                  max_answer_len=5, mem_slots=6, mem_rank=9, reasoning_tokens=7, max_seq_len=19)
# Sizes at their limits, and none that a vector register divides.
ODD = [SMALL, replace(SMALL, num_heads=11, num_kv_heads=11), replace(SMALL, num_heads=22, num_kv_heads=1),
       replace(SMALL, num_heads=1, num_kv_heads=1, mem_rank=66), replace(SMALL, mem_slots=1, mem_rank=1),
       replace(SMALL, num_encoder_layers=1), replace(SMALL, num_encoder_layers=2, dim_feedforward=1),
       replace(SMALL, num_encoder_layers=6, reasoning_tokens=1), replace(SMALL, max_answer_len=1, vocab_size=7),
       replace(SMALL, embed_dim=100, num_heads=20, num_kv_heads=5, max_seq_len=1)]


@dataclass(frozen=True)
class Stored(Held):
    """A matrix that notes its name when it is read whole."""

    name: str = ""
    reads: list | None = None

    def parts(self):
        if self.reads is not None:
            self.reads.append(self.name)
        half = self.shape[0] // 2
        for part in Held(self.data, self.scales).parts():
            if half:
                scales = [None, None] if self.scales is None else [self.scales[:half], self.scales[half:]]
                yield replace(part, stop=half, data=part.data[:half], scales=scales[0])
                yield replace(part, start=half, data=part.data[half:], scales=scales[1])
            else:
                yield part

    def rows(self, ids):
        return widen(self.data[ids], None if self.scales is None else self.scales[ids])


def as_weights(config, tensors, quantize=False, reads=None):
    """Tensors as the model's weights, each matrix in two parts."""
    weights = {}
    for block in him.blocks(config):
        value = tensors.get(block.name)
        if block.kind == "matrix":
            data, scales = quantize_rows(value) if quantize else (value, None)
            value = Stored(data, scales, name=block.name, reads=reads)
        weights[block.name] = value
    return weights


def random_tensors(config, seed=0):
    """A state dict in which every tensor matters."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for block in him.blocks(config):
        values = torch.randn(block.shape, generator=generator)
        if block.kind == "matrix" and block.name != him.TIED:
            values = values / block.shape[1] ** 0.5
        elif "norm" in block.name:
            values = values * 0.1 + float(block.name.endswith("weight"))
        elif block.name.endswith("bias"):
            values = values * 0.1
        tensors[block.name] = values
    return tensors


def ids(config, batch, length, seed=0):
    return torch.randint(0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(found, expected, tolerance=TOLERANCE):
    assert found.shape == expected.shape
    return (found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-30)


# --- the recorded runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_recorded_passes(folder, backend):
    case = load_case(folder)
    config = parse_config(case.config, "him")
    weights, ops = as_weights(config, case.weights), load_ops(backend, "cpu")
    state = him.init_state(config, 1, weights=weights)
    compared = 0
    for number, tokens in enumerate(case.io["input_ids"]):
        if number in case.meta["run"].get("reset_before", []):
            state.reset_memory()
        blocks = {}
        mask = case.io["attention_mask"][number] if "attention_mask" in case.io else None
        logits, state = him.forward(config, weights, ops, tokens, state, blocks.__setitem__, mask=mask,
                                    reconstruction=case.meta["kind"] == "him_reconstruction")
        got = {"logits": logits, **state.named(), **blocks}
        for name, expected in case.io.items():
            if name.startswith(f"pass{number}."):
                assert close(got[name.removeprefix(f"pass{number}.")], expected), name
                compared += 1
    assert compared >= 6


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_recorded_passes_restart_from_recorded_state(folder, backend):
    case = load_case(folder)
    config = parse_config(case.config, "him")
    weights, ops = as_weights(config, case.weights), load_ops(backend, "cpu")
    for number in range(1, len(case.io["input_ids"])):
        key = f"pass{number - 1}."
        state = him.state_from_dict(config, {name: case.io[key + name] for name in ("memory", "reasoning_embeddings")},
                                    ops)
        if number in case.meta["run"].get("reset_before", []):
            state.reset_memory()
        mask = case.io["attention_mask"][number] if "attention_mask" in case.io else None
        logits, _ = him.forward(config, weights, ops, case.io["input_ids"][number], state, mask=mask,
                                reconstruction=case.meta["kind"] == "him_reconstruction")
        assert close(logits, case.io[f"pass{number}.logits"])


class OnePass:
    """The part of an engine that `answer` calls, which keeps the logits of the last pass."""

    def __init__(self, config, tensors, backend):
        self.config = config
        self._weights, self._ops = as_weights(config, tensors), load_ops(backend, "cpu")

    def new_state(self, batch_size=1):
        return him.init_state(self.config, batch_size, weights=self._weights)

    def forward(self, tokens, state, **inputs):
        self.logits, state = him.forward(self.config, self._weights, self._ops, tokens, state, **inputs)
        return self.logits, state


def test_recorded_generation(backend):
    case = load_case(GENERATION)
    run = case.meta["run"]
    config = parse_config({**case.config, "max_seq_len": run["max_seq_len"]}, "him")
    engine = OnePass(config, case.weights, backend)
    state = engine.new_state()
    for number, (prompt, length) in enumerate(zip(case.io["prompts"], case.io["prompt_lengths"].tolist(), strict=True)):
        found, state = answer(engine, prompt[:length].tolist(), state, Sampler(Sampling(top_k=1)), run["eos_id"],
                              run["pad_id"])
        key = f"call{number}."
        assert found == case.io[f"{key}output_ids"].tolist()
        got = {"logits": engine.logits, **state.named()}
        for name in ("logits", "memory", "reasoning_embeddings"):
            assert close(got[name], case.io[key + name]), name


def test_tensors_are_the_published_ones():
    for folder in cases("him"):
        case = load_case(folder)
        config = parse_config(case.config)  # recognised by its fields
        shapes = {block.name: block.shape for block in him.blocks(config)}
        unused = {block.name for block in him.blocks(config) if block.kind == "unused"}
        assert unused == {"pos_encoder.pe"} and shapes.keys() - case.weights.keys() <= unused
        assert all(tuple(tensor.shape) == shapes[name] for name, tensor in case.weights.items())
        assert him.aliases(config) == case.meta["tied"]
        if "pos_encoder.pe" in case.weights:
            block = next(block for block in him.blocks(config) if block.name == "pos_encoder.pe")
            assert torch.equal(him.initial(config, block, slice(0, 1), torch.Generator()), case.weights[block.name])


# --- a plain version, from the published equations --------------------------------------------------------------------


def plain_attention(config, w, prefix, queries, source, mask):
    d = config.embed_dim // config.num_heads
    q, k, v = (x @ w[f"{prefix}{name}.weight"].T for x, name in
               ((queries, "q_proj"), (source, "k_proj"), (source, "v_proj")))
    heads = []
    for h in range(config.num_heads):
        shared = h * config.num_kv_heads // config.num_heads
        own, theirs = slice(h * d, h * d + d), slice(shared * d, shared * d + d)
        scores = q[..., own] @ k[..., theirs].transpose(1, 2) / d**0.5
        scores = scores.masked_fill(mask[:, None, :] == 0, float("-inf"))
        heads.append(scores.softmax(-1) @ v[..., theirs])
    return torch.cat(heads, -1) @ w[f"{prefix}o_proj.weight"].T


def plain_forward(config, tensors, tokens, memory, reasoning, mask, reconstruction):
    """Logits, memory and reasoning embeddings of one pass in float64."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    c, (batch, length) = config, tokens.shape
    memory, reasoning = memory.double().expand(batch, -1, -1), reasoning.double()

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x if name is None else x * w[f"{name}.weight"] + w[f"{name}.bias"]

    places = torch.arange(length, dtype=torch.float64)[:, None]
    angles = places * 10000.0 ** (-torch.arange(0, c.embed_dim, 2) / c.embed_dim)
    pe = torch.zeros(length, c.embed_dim, dtype=torch.float64)
    pe[:, 0::2], pe[:, 1::2] = angles.sin(), angles.cos()
    x = c.embed_dim**0.5 * w["embedding.weight"][tokens] + pe
    for i in range(c.num_encoder_layers):
        p = f"transformer_encoder.{i}."
        n = norm(x, f"{p}norm1")
        x = x + plain_attention(c, w, f"{p}attention.", n, n, mask)
        y = norm(x, f"{p}norm2")
        f = f"{p}multi_speed.slow_ffn."
        gate, up = y @ w[f"{f}w_gate.weight"].T, y @ w[f"{f}w_up.weight"].T
        slow, a = (gate * gate.sigmoid() * up) @ w[f"{f}w_down.weight"].T, w[f"{p}multi_speed.gate"].sigmoid()
        x = x + a * slow + (1 - a) * y
        keys = memory[:, :, : c.mem_rank]
        scores = (x @ w["memory.read_key.weight"].T) @ keys.transpose(1, 2) / c.mem_rank**0.5
        x = x + 0.1 * (scores.softmax(-1) @ memory)[..., : c.mem_rank] @ w["memory.read_value.weight"].T
        inputs = x.mean(1) @ w["memory.write_key.weight"].T
        erase, add = (inputs @ w["memory.write_erase.weight"].T).sigmoid(), inputs @ w["memory.write_add.weight"].T
        memory = norm(memory * (1 - erase[:, None]) + add[:, None], None)
        if (i + 1) % 3 == 0:
            query = x.mean(1) @ w["reasoning_module.project_to_reasoning.weight"].T
            content = (query @ reasoning[:, :64].T).softmax(-1) @ reasoning
            reasoning = 0.9 * reasoning + 0.1 * x.mean((0, 1))
            x = x + 0.1 * (content[:, :64] @ w["reasoning_module.project_from_reasoning.weight"].T)[:, None]
    if not reconstruction:
        p, tgt = "decoder_cross_attention.", w["decoder_query"].expand(batch, -1, -1)
        x = norm(tgt + plain_attention(c, w, p, tgt, x, mask), f"{p}norm")
    return x @ w["embedding.weight"].T + w["decoder_projection.bias"], memory, reasoning


@pytest.mark.parametrize("config", ODD)
@pytest.mark.parametrize("reconstruction", [False, True])
def test_odd_sizes(config, reconstruction, backend):
    tensors = random_tensors(config)
    weights, ops = as_weights(config, tensors), load_ops(backend, "cpu")
    tokens = ids(config, 2, min(config.max_seq_len, 7))
    mask = torch.ones_like(tokens)
    mask[0, 3:5] = 0
    mask[1, 1:] = 0
    state = him.init_state(config, 2, weights=weights)
    memory, reasoning = state.memory, state.reasoning_embeddings
    for _ in range(2):
        expected, memory, reasoning = plain_forward(config, tensors, tokens, memory, reasoning, mask, reconstruction)
        logits, state = him.forward(config, weights, ops, tokens, state, mask=mask, reconstruction=reconstruction)
        assert logits.dtype == torch.float32 and close(logits.double(), expected)
        assert close(state.memory.double(), memory) and close(state.reasoning_embeddings.double(), reasoning)


@pytest.mark.parametrize("batch", range(1, 9))
def test_batch_sizes(batch, backend):
    tensors = random_tensors(SMALL)
    weights, ops = as_weights(SMALL, tensors), load_ops(backend, "cpu")
    tokens = ids(SMALL, batch, SMALL.max_seq_len, batch)
    state = him.init_state(SMALL, batch, weights=weights)
    expected = plain_forward(SMALL, tensors, tokens, state.memory, state.reasoning_embeddings,
                             torch.ones_like(tokens), False)[0]
    served, state = serve(SMALL, weights, ops, tokens, state, ids(SMALL, batch, SMALL.max_answer_len - 1))
    assert close(served.double(), expected)


@pytest.mark.parametrize("change", [{}, {"num_kv_heads": 1}, {"mem_rank": 1}])
def test_int8_stays_near_float_and_backends_agree(change):
    config = replace(SMALL, **change)
    tensors = random_tensors(config)
    tokens = ids(config, 3, 12)
    outputs = {}
    for quantize in (False, True):
        for name in BACKENDS:
            weights = as_weights(config, tensors, quantize)
            state = him.init_state(config, 3, weights=weights)
            outputs[quantize, name] = him.forward(config, weights, load_ops(name, "cpu"), tokens, state)[0]
    exact = outputs[False, "reference"]
    for name in BACKENDS:
        assert close(outputs[True, name], outputs[True, "reference"], 2e-4)  # int8 activations of 16 bits
        assert close(outputs[True, name], exact, 0.05)


# --- state and batch rule ---------------------------------------------------------------------------------------------


@pytest.fixture
def model(backend):
    """(weights, ops, fresh state of a batch) of the small model."""
    weights = as_weights(SMALL, random_tensors(SMALL))
    return weights, load_ops(backend, "cpu"), lambda batch=1: him.init_state(SMALL, batch, weights=weights)


def serve(config, weights, ops, prompt, state, following):
    """Logits of the prompt's answer and of each following token [B, n]: [B, 1 + n, V]."""
    rows = []
    for tokens in (prompt, *following.split(1, dim=1)):
        hidden, state = him.advance(config, weights, ops, tokens, state)
        assert hidden.shape == (len(tokens), 1, config.embed_dim)
        rows.append(him.logits(config, weights, ops, hidden[:, 0]))
    return torch.stack(rows, dim=1), state


def test_a_new_state_has_the_checkpoint_s_values_and_leaves_them(model):
    weights, ops, new = model
    state = new(2)
    kept = {name: weights[name].clone() for name in ("memory.memory", "reasoning_module.reasoning_embeddings")}
    assert torch.equal(state.memory, kept["memory.memory"]) and state.batch_size == 2
    _, after = him.forward(SMALL, weights, ops, ids(SMALL, 2, 6), state)
    assert after.memory.shape == (2, SMALL.mem_slots, SMALL.embed_dim)
    assert not torch.equal(after.reasoning_embeddings, state.reasoning_embeddings)
    assert all(torch.equal(weights[name], value) for name, value in kept.items())
    assert him.init_state(SMALL, 2, "meta").nbytes == new(2).nbytes


def test_batch_rule(model):
    weights, ops, new = model
    _, state = him.forward(SMALL, weights, ops, ids(SMALL, 3, 6), new(1))  # from memory batch 1, any batch
    assert state.batch_size == 3
    with pytest.raises(ConfigError, match=r"batch of 2, but the memory holds 3 sequences.*reset_memory"):
        him.forward(SMALL, weights, ops, ids(SMALL, 2, 6), state)
    with pytest.raises(ConfigError, match="batch of 1, but the memory holds 3"):
        him.advance(SMALL, weights, ops, ids(SMALL, 1, 6), state)
    reasoning = state.reasoning_embeddings.clone()
    state.reset_memory()
    assert state.memory.shape == (1, SMALL.mem_slots, SMALL.embed_dim) and not state.memory.any()
    assert torch.equal(state.reasoning_embeddings, reasoning)
    _, state = him.forward(SMALL, weights, ops, ids(SMALL, 2, 6), state)
    assert state.memory.shape[0] == state.batch_size == 2
    _, state = him.advance(SMALL, weights, ops, ids(SMALL, 2, 6), state)
    state.reset_memory()
    with pytest.raises(ConfigError, match="batch of 4, but the state has read 2"):
        him.forward(SMALL, weights, ops, ids(SMALL, 4, 6), state)


@pytest.mark.parametrize("mask, message", [
    (torch.ones(2, 5), r"expected a tensor of shape \[2, 6\], as the tokens, found \[2, 5\]"),
    ([[1] * 6] * 2, "found list"),
    (torch.full((2, 6), 2), "entries must be 1"),
    (torch.full((2, 6), float("nan")), "entries must be 1"),
    (torch.tensor([[1] * 6, [0] * 6]), "row 1 blocks every position"),
])
def test_bad_masks_change_nothing(model, mask, message):
    weights, ops, new = model
    state = new(2)
    before = state.to_dict()
    with pytest.raises(ConfigError, match=message):
        him.forward(SMALL, weights, ops, ids(SMALL, 2, 6), state, mask=mask)
    assert all(torch.equal(value, before[name]) for name, value in state.to_dict().items())


def test_mask_types_agree(model):
    weights, ops, new = model
    tokens, mask = ids(SMALL, 2, 6), torch.tensor([[1, 1, 0, 1, 0, 1], [1] * 6])
    first, *others = [him.forward(SMALL, weights, ops, tokens, new(2), mask=mask.to(kind))[0]
                      for kind in (torch.int64, torch.bool, torch.float32)]
    assert all(torch.equal(first, other) for other in others)
    without = him.forward(SMALL, weights, ops, tokens, new(2))[0]
    assert torch.equal(without, him.forward(SMALL, weights, ops, tokens, new(2), mask=torch.ones(2, 6))[0])


def test_prompt_longer_than_the_model_s_maximum(model):
    weights, ops, new = model
    tokens = ids(SMALL, 1, SMALL.max_seq_len + 4)
    with pytest.raises(ConfigError, match=r"sequence of 23 is longer than the model's max_seq_len \(19\)"):
        him.forward(SMALL, weights, ops, tokens, new())
    hidden, state = him.advance(SMALL, weights, ops, tokens, new())
    cut, _ = him.advance(SMALL, weights, ops, tokens[:, 4:], new())
    assert torch.equal(hidden, cut) and torch.equal(state.context, tokens[:, 4:])


def test_a_saved_state_continues_bit_for_bit(model):
    weights, ops, new = model
    prompt, following = ids(SMALL, 2, 6), ids(SMALL, 2, 9, 1)
    for read in range(8):  # within the first block, at its end, and in the second
        _, state = serve(SMALL, weights, ops, prompt, new(2), following[:, :read])
        rebuilt, fork = him.state_from_dict(SMALL, state.to_dict(), ops), state.clone()
        expected, last = serve(SMALL, weights, ops, following[:, read : read + 1], state, following[:, read + 1 :])
        for other in (rebuilt, fork):
            found, end = serve(SMALL, weights, ops, following[:, read : read + 1], other, following[:, read + 1 :])
            assert torch.equal(found, expected)
            assert all(torch.equal(value, end.to_dict()[name]) for name, value in last.to_dict().items())


def test_a_clone_does_not_follow(model):
    weights, ops, new = model
    _, state = serve(SMALL, weights, ops, ids(SMALL, 1, 6), new(), ids(SMALL, 1, 2))
    fork, before = state.clone(), state.to_dict()
    fork.reset_memory()
    for value in (fork.context, fork.answer, fork.reasoning_embeddings):
        value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in state.to_dict().items())


@pytest.mark.parametrize("change, message", [
    ({"memory": None}, "'memory' is missing"), ({"answer": None}, "'answer' is missing"),
    ({"tier0": torch.zeros(1)}, "unknown field 'tier0'"),
    ({"memory": torch.zeros(3, 6, 66)}, "'memory' has shape"), ({"memory": torch.zeros(6, 66)}, "'memory' has shape"),
    ({"answer": torch.zeros(2, 4, 66)}, "'answer' has shape"), ({"context": torch.zeros(0, 19)}, "'context' has shape"),
    ({"context": torch.tensor(1)}, "'context' has shape"),
    ({"context": torch.full((2, 19), 51)}, "id 51, outside the vocabulary of 51"),
    ({"context_valid": torch.tensor(20)}, "context_valid"), ({"timestep": torch.tensor(-1)}, "timestep -1"),
])
def test_bad_state_fields(model, change, message):
    weights, ops, new = model
    fields = {name: value for name, value in {**new(2).to_dict(), **change}.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        him.state_from_dict(SMALL, fields, ops)


# --- the token loop ---------------------------------------------------------------------------------------------------


def test_the_loop_serves_what_forward_gives(model):
    weights, ops, new = model
    prompt, following = ids(SMALL, 2, 6), ids(SMALL, 2, 12, 1)
    served, _ = serve(SMALL, weights, ops, prompt, new(2), following)
    state, length = new(2), SMALL.max_answer_len
    context = prompt
    for start in range(0, served.shape[1], length):
        expected, state = him.forward(SMALL, weights, ops, context[:, -SMALL.max_seq_len :], state)
        found = served[:, start : start + length]
        assert close(found, expected[:, : found.shape[1]], 1e-6)
        context = torch.cat([prompt, following[:, : start + length]], dim=1)  # drained tokens included


def test_one_token_starts_a_block(model):
    weights, ops, new = model
    token = ids(SMALL, 1, 1)
    hidden, state = him.advance(SMALL, weights, ops, token, new())
    expected, _ = him.forward(SMALL, weights, ops, token, new())
    assert close(him.logits(SMALL, weights, ops, hidden[:, 0]), expected[:, 0], 1e-6) and state.timestep == 1


def test_a_prompt_in_the_middle_of_a_block_encodes_anew(model):
    weights, ops, new = model
    prompt, more = ids(SMALL, 1, 6), ids(SMALL, 1, 3, 1)
    _, state = serve(SMALL, weights, ops, prompt, new(), ids(SMALL, 1, 2, 2))
    assert state.timestep == 3 and him.starts_at(SMALL, state, 1) == 3 and him.starts_at(SMALL, state, 3) == 5
    context = torch.cat([prompt, ids(SMALL, 1, 2, 2), more], dim=1)
    expected, _ = him.forward(SMALL, weights, ops, context, state)
    hidden, state = him.advance(SMALL, weights, ops, more, state)
    assert close(him.logits(SMALL, weights, ops, hidden[:, 0]), expected[:, 0], 1e-6) and state.timestep == 6


@pytest.mark.parametrize("config", ODD[:1] + ODD[5:9])
def test_reads_are_the_walk(config, backend):
    reads = []
    weights, ops = as_weights(config, random_tensors(config), reads=reads), load_ops(backend, "cpu")
    state, walk = him.init_state(config, 1, weights=weights), him.walk(config)
    for count in (4, *[1] * (config.max_answer_len + 2), 3, 1, 1, 2, 1):
        t = him.starts_at(config, state, count)
        hidden, state = him.advance(config, weights, ops, ids(config, 1, count), state)
        assert tuple(reads) == walk.reads(t) and bool(reads) == (t % config.max_answer_len == 0)
        assert state.timestep == t + 1
        reads.clear()
        him.logits(config, weights, ops, hidden[:, 0])
        assert tuple(reads) == him.head(config)
        reads.clear()
    for reconstruction in (False, True):
        tokens = ids(config, 1, 5)
        him.forward(config, weights, ops, tokens, state, reconstruction=reconstruction)
        assert tuple(reads) == him.forward_walk(config, tokens.shape, reconstruction=reconstruction).reads(0)
        reads.clear()
    used = {name for name, _ in walk.clocked} | {him.TIED}
    assert used == {block.name for block in him.blocks(config) if block.kind == "matrix"}


# --- on the engine ----------------------------------------------------------------------------------------------------


def make(backend, quantize="none", **options):
    return Engine.from_state_dict("him", SMALL.to_dict(), random_tensors(SMALL), device="cpu", backend=backend,
                                  quantize=quantize, **options)


def budgets(backend, quantize):
    least, whole = (make(backend, quantize, stream=stream).plan() for stream in (True, False))
    least, whole = least.least_budget, whole.peak_memory_bytes
    return sorted({least, least + 1, (3 * least + whole) // 4, (least + whole) // 2, whole - 1, whole})


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_streamed_loop_equals_resident(backend, quantize):
    prompt, following, more = ids(SMALL, 1, 6), ids(SMALL, 1, 8, 1), ids(SMALL, 1, 3, 2)

    def run(engine):
        state = engine.new_state()
        logits, state = engine.prefill(prompt, state)
        rows = [logits]
        for token in following[0]:
            logits, state = engine.step(token.view(1), state)
            rows.append(logits)
        return torch.cat([*rows, engine.prefill(more, state)[0]]), state.to_dict()  # in the middle of a block

    expected, last = run(make(backend, quantize))
    for budget in budgets(backend, quantize):
        with make(backend, quantize, stream=True, memory_budget=budget) as engine:
            found, end = run(engine)
        assert torch.equal(found, expected), budget
        assert all(torch.equal(value, end[name]) for name, value in last.items()), budget


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_streamed_forward_equals_resident(backend, quantize):
    tokens, mask = ids(SMALL, 1, 6), torch.tensor([[1, 1, 0, 1, 1, 0]])

    def run(engine):
        first, state = engine.forward(tokens, mask=mask)
        return first, engine.forward(tokens, state, reconstruction=True)[0]

    expected = run(make(backend, quantize))
    for budget in budgets(backend, quantize):
        with make(backend, quantize, stream=True, memory_budget=budget) as engine:
            for found, row in zip(run(engine), expected, strict=True):
                assert torch.equal(found, row), budget


def test_generate_drains_answer_blocks(backend):
    engine = make(backend)
    pieces = [piece.id for piece in engine.generate([3, 4, 5], max_new_tokens=7, temperature=0)]
    first, state = engine.forward(torch.tensor([[3, 4, 5]]))
    assert pieces[:5] == first[0].argmax(dim=-1).tolist()
    second, _ = engine.forward(torch.tensor([[3, 4, 5, *pieces[:5]]]), state)
    assert pieces[5:] == second[0, :2].argmax(dim=-1).tolist()


# --- configuration and initialisation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("change, message", [
    ({"num_heads": 5}, r"embed_dim is 66; it must be a multiple of num_heads \(5\)"),
    ({"num_kv_heads": 4}, r"num_heads is 6; it must be a multiple of num_kv_heads \(4\)"),
    ({"embed_dim": 62, "num_heads": 2}, "embed_dim is 62; it must be even and at least 64"),
    ({"embed_dim": 65, "num_heads": 5}, "embed_dim is 65"), ({"mem_rank": 67}, r"at most embed_dim \(66\)"),
    ({"max_seq_len": 513}, "max_seq_len is 513; it must be at most 512"), ({"mem_slots": 0}, "mem_slots is 0"),
    ({"vocab_size": -3}, "vocab_size is -3"), ({"num_encoder_layers": 0}, "num_encoder_layers"),
    ({"max_answer_len": 1.5}, "max_answer_len must be a whole number"),
    ({"num_layers": 3}, "unknown field 'num_layers'"),
])
def test_bad_configurations(change, message):
    with pytest.raises(ConfigError, match=message):
        parse_config({**SMALL.to_dict(), **change})


def test_published_configuration():
    assert architecture("him") is him
    config = parse_config({**HIMConfig().to_dict(), "dropout": 0.1})
    assert config == HIMConfig() and parse_config(config.to_dict()) == config
    file = RECORDED.parent / "configs" / "him-7m.json"
    if file.exists():
        assert parse_config(json.loads(file.read_text())) == config
    assert sum(block.numel for block in him.blocks(config) if block.kind != "unused") == 7_456_640


def test_a_fresh_model_runs(backend):
    generator = torch.Generator().manual_seed(0)
    blocks = him.blocks(SMALL)
    tensors = {block.name: him.initial(SMALL, block, slice(0, block.shape[0]), generator) for block in blocks}
    assert all(tensors[block.name].shape == block.shape for block in blocks)
    weights = as_weights(SMALL, tensors)
    logits, _ = him.forward(SMALL, weights, load_ops(backend, "cpu"), ids(SMALL, 2, 9),
                            him.init_state(SMALL, 2, weights=weights))
    assert logits.isfinite().all() and logits.std() > 0.1


# --- the batch mode ---------------------------------------------------------------------------------------------------


LETTERS = {letter: 5 + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
CHARACTERS = CharTokenizer(LETTERS, {"<s>": 0, "<pad>": 1, "</s>": 2}, None, 2, SMALL.vocab_size)


@pytest.fixture
def engine(backend):
    engine = make(backend)
    engine.tokenizer = CHARACTERS
    return engine


def test_a_file_of_samples(engine, tmp_path):
    source, target = tmp_path / "samples.json", tmp_path / "results.json"
    samples = [{"prompt": "abc", "id": 7}, {"input": "x" * 40}, {"prompt": "abc"}]
    source.write_text(json.dumps(samples))
    seen = []
    sampling = Sampling(top_k=50, top_p=0.9, seed=4)
    assert answer_file(engine, source, target, sampling, progress=lambda done, of: seen.append((done, of))) == 3
    results = json.loads(target.read_text())
    assert seen == [(1, 3), (2, 3), (3, 3)] and sorted(tmp_path.iterdir()) == [target, source]
    for sample, result in zip(samples, results, strict=True):
        assert sample.items() <= result.items() and result["output"] == CHARACTERS.decode(result["ids"])
        assert len(result["ids"]) == SMALL.max_answer_len or result["ids"][-1] == 2
    again = tmp_path / "again.json"
    answer_file(engine, source, again, sampling)
    assert again.read_text() == target.read_text()
    state, expected, sampler = engine.new_state(), [], Sampler(sampling)
    for sample in samples:  # the reasoning buffer carries over from prompt to prompt, the memory does not
        text = sample.get("prompt", sample.get("input"))
        found, state = answer(engine, CHARACTERS.encode(text), state, sampler, 2)
        expected.append(found)
    assert [result["ids"] for result in results] == expected


def test_an_answer_ends_with_the_end_token(engine):
    first, _ = answer(engine, [5, 6], engine.new_state(), Sampler(Sampling(temperature=0)), None)
    assert len(first) == SMALL.max_answer_len
    cut, _ = answer(engine, [5, 6], engine.new_state(), Sampler(Sampling(temperature=0)), first[1])
    assert cut == first[: first.index(first[1]) + 1]


@pytest.mark.parametrize("content, error, message", [
    ("{", ConfigError, "not valid JSON"), ('{"prompt": "a"}', ConfigError, "holds a JSON dict"),
    ('[{"prompt": "a"}, {"text": "b"}]', ConfigError, r"sample 1 is \{'text': 'b'\}, expected an object with text"),
    ('[{"prompt": 5}]', ConfigError, "sample 0"), ('["a"]', ConfigError, "sample 0 is 'a'"),
    ('[{"prompt": ""}]', TokenizerError, "sample 0 has an empty prompt"),
    ('[{"prompt": "a"}, {"prompt": "A"}]', TokenizerError, "not in the model's character vocabulary"),
    ("[" * 10**5, ConfigError, "not valid JSON"),
])
def test_bad_samples(engine, tmp_path, content, error, message):
    source = tmp_path / "samples.json"
    source.write_text(content)
    with pytest.raises(error, match=message):
        answer_file(engine, source, tmp_path / "results.json")
    assert [file.name for file in tmp_path.iterdir()] == ["samples.json"]


def test_bad_files_and_models(engine, small, tmp_path):
    source = tmp_path / "samples.json"
    with pytest.raises(ConfigError, match="cannot read the file"):
        read_samples(source)
    source.write_text('[{"prompt": "a"}]')
    with pytest.raises(CheckpointError, match="existing folder"):
        answer_file(engine, source, tmp_path / "nowhere" / "results.json")
    with pytest.raises(CheckpointError, match="existing folder"):
        answer_file(engine, source, tmp_path)
    with pytest.raises(ConfigError, match="is the file being read"):
        answer_file(engine, source, source)
    with pytest.raises(TokenizerError, match="no tokenizer"):
        answer_file(make("reference"), source, tmp_path / "results.json")
    with pytest.raises(ConfigError, match="thl model"):
        answer_file(Engine.from_state_dict("thl", *small, device="cpu"), source, tmp_path / "results.json")
