"""HIM in the token loop: its state, answers block by block, streamed runs, the batch mode."""

import json

import pytest
import torch
from him_small import ODD, SMALL, as_weights, close, ids, random_tensors, serve

from thl_engine import Engine
from thl_engine.engine.him_batch import answer, answer_file, read_samples
from thl_engine.errors import CheckpointError, ConfigError, TokenizerError
from thl_engine.models import him
from thl_engine.ops.backends import load_ops
from thl_engine.text.sampler import Sampler, Sampling
from thl_engine.text.tokenizer import CharTokenizer

# --- state and batch rule ---------------------------------------------------------------------------------------------


@pytest.fixture
def model(backend):
    """(weights, ops, fresh state of a batch) of the small model."""
    weights = as_weights(SMALL, random_tensors(SMALL))
    return weights, load_ops(backend, "cpu"), lambda batch=1: him.init_state(SMALL, batch, weights=weights)


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


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.ones(2, 5), r"expected a tensor of shape \[2, 6\], as the tokens, found \[2, 5\]"),
        ([[1] * 6] * 2, "found list"),
        (torch.full((2, 6), 2), "entries must be 1"),
        (torch.full((2, 6), float("nan")), "entries must be 1"),
        (torch.tensor([[1] * 6, [0] * 6]), "row 1 blocks every position"),
    ],
)
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
    first, *others = [
        him.forward(SMALL, weights, ops, tokens, new(2), mask=mask.to(kind))[0]
        for kind in (torch.int64, torch.bool, torch.float32)
    ]
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


@pytest.mark.parametrize(
    "change, message",
    [
        ({"memory": None}, "'memory' is missing"),
        ({"answer": None}, "'answer' is missing"),
        ({"tier0": torch.zeros(1)}, "unknown field 'tier0'"),
        ({"memory": torch.zeros(3, 6, 66)}, "'memory' has shape"),
        ({"memory": torch.zeros(6, 66)}, "'memory' has shape"),
        ({"answer": torch.zeros(2, 4, 66)}, "'answer' has shape"),
        ({"context": torch.zeros(0, 19)}, "'context' has shape"),
        ({"context": torch.tensor(1)}, "'context' has shape"),
        ({"context": torch.full((2, 19), 51)}, "id 51, outside the vocabulary of 51"),
        ({"context_valid": torch.tensor(20)}, "context_valid"),
        ({"timestep": torch.tensor(-1)}, "timestep -1"),
    ],
)
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
    return Engine.from_state_dict(
        "him", SMALL.to_dict(), random_tensors(SMALL), device="cpu", backend=backend, quantize=quantize, **options
    )


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


def test_half_a_surrogate_pair_in_a_sample_stays(engine, tmp_path):
    source, target = tmp_path / "samples.json", tmp_path / "results.json"
    source.write_text('[{"prompt": "abc", "note": "\\ud800 é"}]')
    answer_file(engine, source, target)
    text = target.read_bytes().decode()  # UTF-8, as JSON has to be
    assert "\\ud800 é" in text and json.loads(text)[0]["note"] == "\ud800 é"


def test_an_answer_ends_with_the_end_token(engine):
    first, _ = answer(engine, [5, 6], engine.new_state(), Sampler(Sampling(temperature=0)), None)
    assert len(first) == SMALL.max_answer_len
    cut, _ = answer(engine, [5, 6], engine.new_state(), Sampler(Sampling(temperature=0)), first[1])
    assert cut == first[: first.index(first[1]) + 1]


@pytest.mark.parametrize(
    "content, error, message",
    [
        ("{", ConfigError, "not valid JSON"),
        ('{"prompt": "a"}', ConfigError, "holds a JSON dict"),
        ('[{"prompt": "a"}, {"text": "b"}]', ConfigError, r"sample 1 is \{'text': 'b'\}, expected an object with text"),
        ('[{"prompt": 5}]', ConfigError, "sample 0"),
        ('["a"]', ConfigError, "sample 0 is 'a'"),
        ('[{"prompt": ""}]', TokenizerError, "sample 0 has an empty prompt"),
        ('[{"prompt": "a"}, {"prompt": "A"}]', TokenizerError, "not in the model's character vocabulary"),
        ("[" * 10**5, ConfigError, "not valid JSON"),
        ('[{"prompt": "a", "prompt": "b"}]', ConfigError, "'prompt' occurs twice"),
        ("[" + "[]," * 10**6 + "[]]", ConfigError, "more than 500000 values"),
    ],
)
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
