"""Training: the same step with gradients, exact resume, and errors that a user can mend."""

import json
import math
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from thl_engine.checkpoint import pack
from thl_engine.config import parse_config
from thl_engine.errors import CheckpointError, ConfigError, EngineError, TokenizerError
from thl_engine.models import thl
from thl_engine.ops.reference import ReferenceOps
from thl_engine.ops.weights import trainable
from thl_engine.text.tokenizer import load_tokenizer
from thl_engine.train import TrainOptions, checkpoint, data, evaluate, loop, train
from thl_engine.train.checkpoint import RESUME_FILE
from thl_engine.train.modules import TrainableModel, chunk_loss
from thl_engine.train.options import rate
from thl_engine.train.run import Run

CONFIG = {
    "vocab_size": 280,
    "embedding_dim": 12,
    "num_tiers": 2,
    "tier_dims": [16, 10],
    "tier_timescales": [1, 4],
    "local_window": 5,
    "memory_slots": 6,
    "memory_dim": 8,
    "query_dim": 4,
    "value_dim": 8,
    "num_heads": 2,
    "head_dim": 4,
    "read_topk": 2,
}


def _text(sentences: int = 400, seed: int = 1) -> str:
    """Text with some structure and characters of one to three bytes."""
    chosen = random.Random(seed)
    words = "king queen crown sword night day love grief café — speak".split()
    return "".join(f"{' '.join(chosen.choices(words, k=6))}.\n" for _ in range(sentences))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def options(tmp_path: Path) -> TrainOptions:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "text.txt").write_text(_text(), encoding="utf-8")
    return TrainOptions(
        "thl",
        tmp_path / "config.json",
        tmp_path / "text.txt",
        tmp_path / "run",
        steps=6,
        batch_size=4,
        chunk=10,
        carry=30,
        warmup=2,
        evaluate_every=3,
        save_every=2,
        sample_tokens=5,
    )


def _model(**given: float) -> TrainableModel:
    return TrainableModel(parse_config(CONFIG, "thl"), **given)


def _tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(280, (batch, length), generator=torch.Generator().manual_seed(3))


def test_parameters_have_the_published_names_and_shapes() -> None:
    model = _model()
    published = {b.name: b.shape for b in thl.blocks(model.config)}
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == published


def test_forward_is_the_step_repeated() -> None:
    model = _model().eval()
    config, tokens = model.config, _tokens(3, 9)
    with torch.no_grad():
        got, end = model(tokens, model.init_state(3))
        weights, ops = trainable(thl.blocks(config), model.state_dict()), ReferenceOps()
        state = thl.init_state(config, 3)
        for t in range(9):
            hidden, state = thl.advance(config, weights, ops, tokens[:, t : t + 1], state)
            torch.testing.assert_close(got[:, t], thl.logits(config, weights, ops, hidden[:, 0]))
    for name, value in state.to_dict().items():
        assert torch.equal(value, end.to_dict()[name]), name


def test_state_carries_over_chunks_and_gradients_do_not() -> None:
    model = _model().eval()
    tokens = _tokens(2, 12)
    whole, _ = model(tokens, model.init_state(2))
    first, state = model(tokens[:, :7], model.init_state(2))
    second, _ = model(tokens[:, 7:], state.detach())
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)

    for given, reached in ((state, True), (state.detach(), False)):
        model.zero_grad()
        chunk_loss(model(tokens[:, 7:8], given)[0], tokens[:, 8:9]).backward(retain_graph=True)
        earlier = tokens[0, :7][~torch.isin(tokens[0, :7], tokens[:, 7])]
        assert bool(model.embedding.weight.grad[earlier].any()) is reached


def test_every_used_parameter_learns() -> None:
    model = _model(dropout=0.1, weight_dropout=0.1).train()
    tokens = _tokens(4, 24)
    logits, _ = model(tokens[:, :-1], model.init_state(4))
    chunk_loss(logits, tokens[:, 1:]).backward()
    still = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == {b.name for b in model.blocks if b.kind == "unused"}
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_noise_is_for_training_only() -> None:
    tokens = _tokens(2, 20)

    def run(model: TrainableModel) -> torch.Tensor:
        with torch.no_grad():
            return model(tokens, model.init_state(2))[0]

    model = _model(dropout=0.2, weight_dropout=0.2)
    assert torch.equal(run(model.eval()), run(model.eval()))
    assert not torch.equal(run(model.train()), run(model.train()))
    assert torch.equal(run(_model(dropout=0.2).train()), run(_model(dropout=0.2).train()))  # seeded
    assert not torch.equal(run(_model().train()), run(_model().eval()))  # the router's


def test_bfloat16_trains_close_to_float32_and_evaluates_the_same() -> None:
    tokens = _tokens(4, 24)

    def gradients(model: TrainableModel) -> tuple[float, torch.Tensor]:
        logits, _ = model.train()(tokens[:, :-1], model.init_state(4))
        loss = chunk_loss(logits, tokens[:, 1:])
        loss.backward()
        return float(loss.detach()), model.output_head.weight.grad

    (loss, exact), (mixed_loss, mixed) = gradients(_model()), gradients(_model(precision="bfloat16"))
    assert mixed_loss == pytest.approx(loss, rel=0.02)
    assert mixed.dtype == torch.float32 and (mixed - exact).norm() < 0.1 * exact.norm()
    models = _model().eval(), _model(precision="bfloat16").eval()
    plain, rounded = (model(tokens, model.init_state(4))[0] for model in models)
    assert torch.equal(plain, rounded)


def test_weight_decay_is_for_matrices_only() -> None:
    matrices, others = _model().decayed()
    assert all(p.dim() == 2 for p in matrices)
    assert [p.dim() for p in others].count(2) == 1  # the embedding
    assert len(matrices) + len(others) == len(thl.blocks(_model().config)) - 1


def test_rate_warms_up_and_falls_to_its_floor(options: TrainOptions) -> None:
    given = replace(options, steps=100, warmup=10, learning_rate=1.0, final_rate=0.1)
    rates = [rate(given, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)


def test_lanes_continue_where_they_stopped() -> None:
    tokens = torch.arange(1000)
    lanes = data.Lanes(tokens, batch_size=3, chunk=11, carry=22, seed=5)
    assert lanes.chunks_per_pass == 30
    seen, last = [], None
    for index in range(lanes.chunks_per_pass):
        inputs, targets = lanes.read(index)
        assert inputs.shape == targets.shape == (3, 11)
        assert torch.equal(targets, (inputs + 1) % 1000)
        if last is not None:
            assert torch.equal(inputs[:, 0], last)
        last = targets[:, -1]
        seen += inputs.flatten().tolist()
    assert len(set(seen)) == len(seen) == 990  # each token once, but for the rest that fills no chunk
    assert not torch.equal(lanes.read(30)[0], lanes.read(0)[0])  # the next pass starts elsewhere
    assert [lanes.fresh(i) for i in range(6)] == [True, False] * 3
    assert torch.equal(data.Lanes(tokens, 3, 11, 22, 5).read(17)[0], lanes.read(17)[0])


@pytest.mark.parametrize("text", [_text(), "ROMEO:\n\n  \t déjà vu — 日本 \u0000\r\n", ""])
def test_byte_bpe_gives_back_any_text(text: str) -> None:
    tokenizer = load_tokenizer(data.train_bpe(_text(), 280), 280, "test")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizers_see_the_training_part_only(options: TrainOptions) -> None:
    training, held_out = data.split_text(_text(), 0.1)
    options.data.write_text(training + "\u03a9" * len(held_out), encoding="utf-8")
    run = loop.prepare(options)
    assert run.tokenizer_text == data.train_bpe(training, 280)
    assert run.tokenizer.decode(run.held_out.tolist()) == "\u03a9" * len(held_out)

    options.config.write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "vocab_size"}))
    run = loop.prepare(replace(options, tokenizer_type="char"))
    assert run.model.config.vocab_size == len(set(training)) + 1
    assert run.held_out.tolist() == [0] * len(held_out)  # <unk>


def test_a_run_learns_and_leaves_a_published_checkpoint(options: TrainOptions) -> None:
    found = train(replace(options, steps=60, learning_rate=0.02, evaluate_every=30, batch_size=8))
    assert found.bits_per_character < 2.2  # 4 bits before training; the words alone carry 3.46 / 5.2 bits
    folder = options.out
    config = parse_config(json.loads((folder / "config.json").read_text()))
    tensors = load_file(folder / "model.safetensors")
    published = {b.name: b.shape for b in thl.blocks(config)}
    assert {name: tuple(t.shape) for name, t in tensors.items()} == published
    tokenizer = load_tokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"), 280, "test")

    model = TrainableModel(config)
    model.load_state_dict(tensors)
    _, held_out = data.split_text(_text(), 0.1)
    tokens = data.encode(tokenizer, held_out)
    again = evaluate(model, tokens, len(tokens) / len(held_out), lanes=8)
    assert again.bits_per_character == pytest.approx(found.bits_per_character, rel=1e-6)
    assert again.perplexity == pytest.approx(2 ** (again.bits_per_character * len(held_out) / len(tokens)))
    assert not [p.name for p in folder.iterdir() if p.name.endswith(".tmp")]


def test_lanes_of_an_evaluation_agree() -> None:
    model, tokens = _model(), _tokens(1, 481)[0]
    one, several = (evaluate(model, tokens, 0.4, lanes).perplexity for lanes in (1, 6))
    assert several == pytest.approx(one, rel=0.05)
    assert evaluate(model, tokens[:2], 0.4, lanes=8).perplexity > 1


def test_resume_is_the_run_that_was_not_interrupted(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    given = replace(options, steps=9, dropout=0.1, weight_dropout=0.1)
    expected = train(given)
    stopped = replace(given, out=given.out.with_name("stopped"))
    update = Run.update

    def fail_at_the_sixth(run: Run) -> float:
        if run.step == 5:
            raise KeyboardInterrupt
        return update(run)

    monkeypatch.setattr(Run, "update", fail_at_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    monkeypatch.undo()
    assert train(replace(stopped, resume=True)) == expected
    for name in ("model.safetensors", "training.safetensors"):
        whole, resumed = load_file(given.out / name), load_file(stopped.out / name)
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    records = [checkpoint.load(folder / RESUME_FILE)[1] for folder in (given.out, stopped.out)]
    assert records[0] == records[1]


def test_resume_refuses_another_run(options: TrainOptions) -> None:
    with pytest.raises(CheckpointError, match="no run to resume"):
        train(replace(options, resume=True))
    train(options)
    with pytest.raises(ConfigError, match="holds a training run; resume it"):
        train(options)
    with pytest.raises(ConfigError, match="6 updates already"):
        train(replace(options, resume=True))
    with pytest.raises(ConfigError, match="batch_size was 4 and is now 5"):
        train(replace(options, resume=True, batch_size=5))
    options.data.write_text(_text(seed=2), encoding="utf-8")
    with pytest.raises(ConfigError, match="text was CRC-32"):
        train(replace(options, resume=True))
    (options.out / RESUME_FILE).write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointError, match="training.safetensors: "):
        train(replace(options, resume=True))


def test_a_failed_save_leaves_the_last_one(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    train(options)
    before = {p.name: p.read_bytes() for p in options.out.iterdir()}

    def full(descriptor: int, buffer: bytes, offset: int) -> None:
        os.pwrite(descriptor, b"half", offset)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack, "write_at", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        train(replace(options, resume=True, steps=8))
    assert {p.name: p.read_bytes() for p in options.out.iterdir()} == before


def _break(options: TrainOptions, what: str) -> TrainOptions:
    other = options.data.with_name("other.json")
    match what:
        case "no text":
            return replace(options, data=Path("nowhere.txt"))
        case "empty":
            options.data.write_text(" \n")
        case "binary":
            options.data.write_bytes(b"\xff\xfe\x00")
        case "short":
            return replace(options, batch_size=1000)
        case "no config":
            return replace(options, config=Path("nowhere.json"))
        case "bad config":
            options.config.write_text("{")
        case "typo":
            options.config.write_text(json.dumps({**CONFIG, "memory_slot": 4}))
        case "tokenizer":
            other.write_text(data.train_bpe(_text(), 290))
            return replace(options, tokenizer=other)
        case "no tokenizer":
            return replace(options, tokenizer=Path("nowhere.json"))
        case "vocabulary":
            return replace(options, vocab_size=100)
        case "large vocabulary":
            return replace(options, vocab_size=5000)
        case "folder":
            options.out.write_text("a file")
    return options


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("no text", ConfigError, "cannot read the text nowhere.txt: No such file"),
        ("empty", ConfigError, "is empty"),
        ("binary", ConfigError, "is not UTF-8 text"),
        ("short", ConfigError, "the text is too short"),
        ("no config", ConfigError, "nowhere.json: cannot read the file: No such file"),
        ("bad config", ConfigError, "is not valid JSON"),
        ("typo", ConfigError, "did you mean 'memory_slots'"),
        ("tokenizer", TokenizerError, "290 ids"),
        ("no tokenizer", ConfigError, "nowhere.json"),
        ("vocabulary", ConfigError, "at least 256"),
        ("large vocabulary", ConfigError, "5000; set vocab_size to"),
        ("folder", ConfigError, "cannot make the folder"),
    ],
)
def test_bad_input_is_one_clear_line(options: TrainOptions, what: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        train(_break(options, what))
    assert isinstance(caught.value, EngineError) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("chunk", 0),
        ("dropout", 1.0),
        ("learning_rate", math.nan),
        ("held_out", 0.0),
        ("precision", "float16"),
        ("tokenizer_type", "words"),
        ("clip", 0.0),
        ("threads", 0),
        ("warmup", -1),
    ],
)
def test_options_are_checked(options: TrainOptions, field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        replace(options, **{field: value})


def test_a_diverging_run_stops(options: TrainOptions) -> None:
    run = loop.prepare(options)
    with torch.no_grad():
        run.model.output_head.bias.fill_(math.nan)
    with pytest.raises(EngineError, match="loss is nan at update 1"):
        run.update()
