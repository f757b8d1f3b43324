"""HIM: the recorded runs, a plain float64 version at odd sizes, configuration and initialisation."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import BACKENDS, RECORDED, cases, load_case
from him_small import ODD, SMALL, as_weights, close, ids, random_tensors, serve

from thl_engine.config import HIMConfig, parse_config
from thl_engine.engine.him_batch import answer
from thl_engine.errors import ConfigError
from thl_engine.models import him
from thl_engine.ops.backends import load_ops
from thl_engine.text.sampler import Sampler, Sampling

CASES = [folder for folder in cases("him") if folder.name != "generate_greedy"]
GENERATION = next(folder for folder in cases("him") if folder.name == "generate_greedy")


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
        logits, state = him.forward(
            config,
            weights,
            ops,
            tokens,
            state,
            blocks.__setitem__,
            mask=mask,
            reconstruction=case.meta["kind"] == "him_reconstruction",
        )
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
        state = him.state_from_dict(
            config, {name: case.io[key + name] for name in ("memory", "reasoning_embeddings")}, ops
        )
        if number in case.meta["run"].get("reset_before", []):
            state.reset_memory()
        mask = case.io["attention_mask"][number] if "attention_mask" in case.io else None
        logits, _ = him.forward(
            config,
            weights,
            ops,
            case.io["input_ids"][number],
            state,
            mask=mask,
            reconstruction=case.meta["kind"] == "him_reconstruction",
        )
        assert close(logits, case.io[f"pass{number}.logits"])


class OnePass:
    """The part of an engine that `answer` calls, which keeps the logits of the last pass."""

    def __init__(self, config, tensors, backend):
        self.config, self.architecture = config, him.ARCHITECTURE
        self._weights, self._ops = as_weights(config, tensors), load_ops(backend, "cpu")

    def new_state(self, batch_size=1):
        return him.init_state(self.config, batch_size, weights=self._weights)

    def forward(self, tokens, state, **inputs):
        self.logits, state = him.forward(self.config, self._weights, self._ops, tokens, state, **inputs)
        return self.logits, state

    def sample(self, sampler, logits, history):
        return sampler.sample(logits, history)


def test_recorded_generation(backend):
    case = load_case(GENERATION)
    run = case.meta["run"]
    config = parse_config({**case.config, "max_seq_len": run["max_seq_len"]}, "him")
    engine = OnePass(config, case.weights, backend)
    state = engine.new_state()
    for number, (prompt, length) in enumerate(zip(case.io["prompts"], case.io["prompt_lengths"].tolist(), strict=True)):
        found, state = answer(
            engine, prompt[:length].tolist(), state, Sampler(Sampling(top_k=1)), run["eos_id"], run["pad_id"]
        )
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
    q, k, v = (
        x @ w[f"{prefix}{name}.weight"].T for x, name in ((queries, "q_proj"), (source, "k_proj"), (source, "v_proj"))
    )
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
    expected = plain_forward(
        SMALL, tensors, tokens, state.memory, state.reasoning_embeddings, torch.ones_like(tokens), False
    )[0]
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


# --- configuration and initialisation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_heads": 5}, r"embed_dim is 66; it must be a multiple of num_heads \(5\)"),
        ({"num_kv_heads": 4}, r"num_heads is 6; it must be a multiple of num_kv_heads \(4\)"),
        ({"embed_dim": 62, "num_heads": 2}, "embed_dim is 62; it must be even and at least 64"),
        ({"embed_dim": 65, "num_heads": 5}, "embed_dim is 65"),
        ({"mem_rank": 67}, r"at most embed_dim \(66\)"),
        ({"max_seq_len": 513}, "max_seq_len is 513; it must be at most 512"),
        ({"mem_slots": 0}, "mem_slots is 0"),
        ({"vocab_size": -3}, "vocab_size is -3"),
        ({"num_encoder_layers": 0}, "num_encoder_layers"),
        ({"max_answer_len": 1.5}, "max_answer_len must be a whole number"),
        ({"num_layers": 3}, "unknown field 'num_layers'"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(ConfigError, match=message):
        parse_config({**SMALL.to_dict(), **change})


def test_published_configuration():
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
    logits, _ = him.forward(
        SMALL, weights, load_ops(backend, "cpu"), ids(SMALL, 2, 9), him.init_state(SMALL, 2, weights=weights)
    )
    assert logits.isfinite().all() and logits.std() > 0.1
