"""Training INL, HIM and HRM: the loss falls, what is written runs, and a run that was interrupted goes on exactly."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from thl_engine import Engine
from thl_engine.cli import main
from thl_engine.config import CONFIGS, parse_config
from thl_engine.errors import ConfigError
from thl_engine.train import TrainOptions, loop, train
from thl_engine.train.modules import TrainableModel
from thl_engine.train.objectives import OBJECTIVES, objective_of
from thl_engine.train.run import RESUME_FILE, Run

SIZES = {
    "inl": {
        "d_model": 16,
        "num_layers": 2,
        "num_heads": 2,
        "num_iterations_per_layer": 4,
        "feedforward_dim": 24,
        "max_seq_len": 24,
        "hierarchical_group_size": 5,
    },
    "him": {
        "embed_dim": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "num_encoder_layers": 3,
        "dim_feedforward": 24,
        "max_answer_len": 4,
        "mem_slots": 3,
        "mem_rank": 4,
        "reasoning_tokens": 4,
        "max_seq_len": 24,
    },
    "hrm": {"hidden_size": 16, "num_heads": 2, "L_layers": 1, "H_layers": 1, "halt_max_steps": 2},
}
WAYS = [(model, objective.name) for model in SIZES for objective in OBJECTIVES[model]]


@pytest.fixture
def options(tmp_path: Path):
    """Options of a short run of a model on a text that is easy to learn."""
    chosen = random.Random(1)
    text = "".join(chosen.choice(["king ", "queen ", "crown "]) for _ in range(400))
    (tmp_path / "text.txt").write_text(text)

    def make(model: str, objective: str | None = None, **given) -> TrainOptions:
        (tmp_path / f"{model}.json").write_text(json.dumps(SIZES[model]))
        usual = {
            "steps": 6,
            "batch_size": 8,
            "chunk": 16,
            "carry": 64,
            "warmup": 2,
            "learning_rate": 0.01,
            "dropout": 0.0,
            "weight_dropout": 0.0,
            "evaluate_every": 60,
            "sample_tokens": 6,
            "tokenizer_type": "char",
        }
        return TrainOptions(
            model, tmp_path / f"{model}.json", tmp_path / "text.txt", tmp_path / model, objective, **{**usual, **given}
        )

    return make


@pytest.mark.parametrize("model", SIZES)
def test_a_model_learns_and_runs(model, options, capsys):
    given = options(model, steps=40)
    run = loop.prepare(given)
    before = loop.evaluate(run.model, run.held_out, 1.0, 8, run.objective)
    losses = [run.update() for _ in range(40)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert loop.evaluate(run.model, run.held_out, 1.0, 8, run.objective).perplexity < 0.7 * before.perplexity
    found = train(replace(given, steps=2, out=given.out.with_name("again")))
    with Engine.from_pretrained(given.out.with_name("again")) as engine:
        assert engine.model_type == model and len(list(engine.generate("king", max_new_tokens=5, seed=0))) >= 1
    capsys.readouterr()
    argv = ["run", "--model", str(given.out.with_name("again")), "--prompt", "king", "--max-new-tokens", "4"]
    assert main([*argv, "--temperature", "0"]) == 0 and capsys.readouterr().out.endswith("\n")
    assert found.bits_per_character > 0


def test_fields_that_act_in_the_published_training_are_told(options, caplog):
    given = options("inl")
    given.config.write_text(json.dumps({**SIZES["inl"], "dropout": 0.1, "use_gradient_checkpointing": True}))
    loop.prepare(given)
    assert "not applied in training here: dropout, use_gradient_checkpointing; see --dropout" in caplog.text


@pytest.mark.parametrize("model, objective", WAYS)
def test_every_way_trains_every_parameter_that_it_uses(model, objective, options):
    config = parse_config({"vocab_size": 30, **SIZES[model]}, model)
    way, trainable = objective_of(model, objective)(config, 16), TrainableModel(config).train()
    if model == "him":  # a fresh one gives back its input so well that nothing is left to learn
        trainable.embedding.weight.data.mul_(0.05)
    tokens = torch.randint(4, 30, (3, 17), generator=torch.Generator().manual_seed(0))
    loss, carried = way.loss(trainable, tokens[:, :-1], tokens[:, 1:], way.fresh(trainable, 3), 0)
    if carried is not None:  # the states of the first batch change the second
        loss, _ = way.loss(trainable, tokens[:, :-1], tokens[:, 1:], carried, 0)
    loss.backward()
    still = {name for name, p in trainable.named_parameters() if p.grad is None or not p.grad.any()}
    expected = {block.name for block in trainable.blocks if block.kind == "unused"}
    # Starting states and counters are buffers in the published models.
    expected |= {
        name
        for name in still
        if name.startswith(("z0_", "memory.memory")) or name.endswith(("avg_iterations", "num_forwards"))
    }
    if objective == "simple":
        expected |= {"q_head.weight", "q_head.bias"}
    if objective == "reconstruction":
        expected |= {name for name in still if name.startswith(("decoder_query", "decoder_cross_attention"))}
    if model == "him":  # the slots of an empty memory are alike: what tells them apart does not matter
        expected.add("memory.read_key.weight")
    assert still <= expected


@pytest.mark.parametrize("model, objective", WAYS)
def test_resume_is_the_run_that_was_not_interrupted(model, objective, options, monkeypatch):
    given = options(model, objective, steps=5, save_every=2, dropout=0.1, weight_dropout=0.1, sample_tokens=0)
    train(given)
    stopped, update = replace(given, out=given.out.with_name("stopped")), Run.update

    def fail_at_the_third(run: Run) -> float:
        if run.step == 2:
            raise KeyboardInterrupt
        return update(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "update", fail_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            train(stopped)
    train(replace(stopped, resume=True))
    for name in ("model.safetensors", RESUME_FILE):
        whole, resumed = load_file(given.out / name), load_file(stopped.out / name)
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize("model", SIZES)
def test_bfloat16_trains(model, options):
    run = loop.prepare(options(model, precision="bfloat16", dropout=0.1, weight_dropout=0.1))
    losses = [run.update() for _ in range(8)]
    assert min(losses[4:]) < losses[0] and all(p.dtype == torch.float32 for p in run.model.parameters())


@pytest.mark.parametrize(
    "model, change, words",
    [
        ("inl", {"chunk": 25}, "chunk is 25; the model takes sequences of at most 24 tokens"),
        ("him", {"chunk": 3}, "at least max_answer_len .4."),
        ("hrm", {"chunk": 65}, "sees 64 tokens at once"),
        ("hrm", {"objective": "shallow"}, "'shallow'; a model of type hrm has simple and deep"),
    ],
)
def test_options_that_cannot_work(model, change, words, options):
    with pytest.raises(ConfigError, match=words):
        loop.prepare(options(model, **change))


def test_a_model_without_an_objective_is_told(options):
    with pytest.raises(ConfigError, match="cannot be trained; these can: thl, inl, hrm, hrm_text, him"):
        objective_of("abacus")
    assert set(OBJECTIVES) <= set(CONFIGS)
