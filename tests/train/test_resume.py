"""A run goes on from its file with the options that it had, and believes nothing in the file before it is checked."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz.mutations import edited
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from thl_engine.cli import main
from thl_engine.errors import MESSAGE_LIMIT, CheckpointError, ConfigError, EngineError
from thl_engine.train import TrainOptions, checkpoint, loop, train
from thl_engine.train.checkpoint import RECORD, RESUME_FILE
from thl_engine.train.options import PLACES

THL = dict(embedding_dim=8, num_tiers=1, tier_dims=[8], tier_timescales=[1], local_window=2, memory_slots=4)
THL |= dict(memory_dim=8, query_dim=4, value_dim=8, num_heads=2, head_dim=4, read_topk=2)
HRM = dict(hidden_size=8, num_heads=2, L_layers=1, H_layers=1, expansion=1.0, halt_max_steps=2)
# Other than the defaults, every one.
TOLD = dict(objective="next-token", tokenizer_type="char", steps=4, batch_size=2, chunk=4, carry=8, learning_rate=0.01)
TOLD |= dict(final_rate=0.5, warmup=1, weight_decay=0.01, clip=0.5, dropout=0.2, weight_dropout=0.3, held_out=0.05)
TOLD |= dict(precision="bfloat16", evaluate_every=2, save_every=1, sample_tokens=1, seed=3, threads=1)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(folder: Path, model_type: str = "thl", **options: Any) -> TrainOptions:
    """Trains a tiny model. Returns what has to be said to resume the run, and nothing else."""
    (folder / "text.txt").write_text("hello world, said the king. " * 40)
    (folder / "config.json").write_text(json.dumps({"thl": THL, "hrm": HRM}[model_type]))
    places = dict(config=folder / "config.json", data=folder / "text.txt", out=folder / "run")
    train(TrainOptions(model_type, **places, **options))
    return TrainOptions(model_type, **places, resume=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainOptions, dict[str, torch.Tensor], dict[str, Any]]:
    resuming = start(tmp_path_factory.mktemp("run"), **TOLD)
    return resuming, *checkpoint.load(resuming.out / RESUME_FILE)


def rewrite(run: tuple, tensors: dict[str, torch.Tensor], record: object, options: TrainOptions | None = None) -> None:
    """Writes a file to resume from as a stranger would, goes on from it, and makes an update."""
    metadata = {"format": "pt", RECORD: record if isinstance(record, str) else json.dumps(record)}
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, run[0].out / RESUME_FILE, metadata)
    loop.prepare(options or run[0]).update()


def again(run: tuple, **given: Any) -> TrainOptions:
    """What is said to resume the run: where it is, and options."""
    return TrainOptions(**{name: getattr(run[0], name) for name in PLACES} | given)


def test_every_option_is_told_in_the_tests_or_has_to_be() -> None:
    assert {field.name for field in fields(TrainOptions)} == TOLD.keys() | {*PLACES, "tokenizer", "vocab_size"}
    assert not [f.name for f in fields(TrainOptions) if f.name in TOLD and f.default == TOLD[f.name]]


def test_what_is_not_said_is_as_it_was(run: tuple, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(run, *run[1:])
    resumed = loop.prepare(run[0])
    assert {name: getattr(resumed.options, name) for name in TOLD} == TOLD
    assert resumed.step == 4 and not caplog.records
    assert resumed.optimizer.param_groups[0]["weight_decay"] == 0.01 and resumed.model.weight_dropout == 0.3


def test_what_is_said_and_differs_is_used_and_said(run: tuple, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(run, *run[1:])
    with caplog.at_level(logging.WARNING):
        resumed = loop.prepare(again(run, steps=9, dropout=0.1, clip=0.5))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "steps 9 (4 before)" in line and "dropout 0.1 (0.2 before)" in line
    assert resumed.options.steps == 9 and resumed.options.dropout == 0.1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(chunk=5), "chunk was 4 and is now 5"),
        (dict(carry=9), "carry was 8 and is now 9"),
        (dict(seed=4), "seed was 3 and is now 4"),
        (dict(held_out=0.1), "held_out was 0.05 and is now 0.1"),
        (dict(batch_size=1), "batch_size was 2 and is now 1"),
        (dict(tokenizer_type="bpe"), "its tokenizer is another one"),
        (dict(tokenizer="config"), "its tokenizer is another one"),
        (dict(vocab_size=50), "config.vocab_size was 18 and is now 50"),
        (dict(objective="deep"), "objective is 'deep'"),
    ],
)
def test_what_cannot_change_is_refused(run: tuple, given: dict, message: str) -> None:
    rewrite(run, *run[1:])
    given = {name: run[0].config if value == "config" else value for name, value in given.items()}
    with pytest.raises(ConfigError, match=message):
        loop.prepare(again(run, **given))


def test_the_same_said_in_other_words_is_the_same(run: tuple) -> None:
    rewrite(run, *run[1:])
    own = run[0].out / "tokenizer.json"
    loop.prepare(again(run, vocab_size=18, tokenizer=own, objective="next-token"))


def test_another_configuration_is_named_by_its_field(run: tuple, tmp_path: Path) -> None:
    rewrite(run, *run[1:])
    (tmp_path / "config.json").write_text(json.dumps({**THL, "memory_slots": 5}))
    with pytest.raises(ConfigError, match=r"config\.memory_slots was 4 and is now 5"):
        loop.prepare(again(run, config=tmp_path / "config.json"))


def test_options_of_the_command_line_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("hello world, said the king. " * 40)
    (tmp_path / "config.json").write_text(json.dumps(THL))
    places = ["--model-type", "thl", "--out", str(tmp_path / "run")]
    for option, name in (("--config", "config.json"), ("--data", "text.txt")):
        places += [option, str(tmp_path / name)]
    first = ["--tokenizer-type", "char", "--steps", "2", "--batch-size", "1", "--chunk", "2", "--dropout", "0.4"]
    assert main(["train", *places, *first, "--clip", "0.5", "--sample-tokens", "0"]) == 0
    assert main(["train", *places, "--resume", "--steps", "3", "--clip", "0.25"]) == 0
    said = capsys.readouterr().err
    assert "goes on with steps 3 (2 before), clip 0.25 (0.5 before)" in said
    options = checkpoint.load(tmp_path / "run" / RESUME_FILE)[1]["options"]
    assert options["dropout"] == 0.4 and options["batch_size"] == 1 and options["clip"] == 0.25


@pytest.mark.parametrize(
    ("objective", "precision"), [("simple", "float32"), ("simple", "bfloat16"), ("deep", "float32")]
)
def test_what_other_objectives_carry_is_checked_too(tmp_path: Path, objective: str, precision: str) -> None:
    told = dict(objective=objective, precision=precision, steps=2, batch_size=2, chunk=8, sample_tokens=0)
    resuming = start(tmp_path, "hrm", **told)
    run = (resuming, *checkpoint.load(resuming.out / RESUME_FILE))
    rewrite(run, *run[1:])
    for name, value in {
        "state.high": torch.zeros(2, 8, 9),
        "state.low": torch.zeros(3),
        "state.x": torch.zeros(1),
    }.items():
        with pytest.raises(CheckpointError, match=name):
            rewrite(run, {**run[1], name: value}, run[2])
    if objective == "simple":
        with pytest.raises(CheckpointError, match=r"state\.low' is missing"):
            rewrite(run, {name: value for name, value in run[1].items() if name != "state.low"}, run[2])


HEAD = "output_head.weight"
TENSORS: list[tuple[str, Callable[[torch.Tensor], torch.Tensor | None], str]] = [
    (f"optimizer.exp_avg.{HEAD}", lambda v: v[:1], r"is torch.float32 \[1, 8\], expected torch.float32 \[18, 8\]"),
    (f"optimizer.exp_avg.{HEAD}", lambda v: v.double(), "is torch.float64"),
    (f"optimizer.exp_avg_sq.{HEAD}", lambda v: v - 1, "negative squares"),
    (f"optimizer.exp_avg_sq.{HEAD}", lambda v: None, "missing"),
    (f"optimizer.step.{HEAD}", lambda v: v * 0 - 5, "is -5, expected a whole number from 1 to 4"),
    (f"optimizer.step.{HEAD}", lambda v: v + 1, "is 5, expected"),
    (f"optimizer.step.{HEAD}", lambda v: v.repeat(2), r"float32 \[2\], expected torch.float32 \[\]"),
    (f"optimizer.exp_avg.{HEAD}", lambda v: v * torch.nan, "holds NaN"),
    (f"model.{HEAD}", lambda v: v / 0, "holds NaN or infinity"),
    (f"model.{HEAD}", lambda v: v.T, "expected torch.float32"),
    (f"model.{HEAD}", lambda v: None, "is missing"),
    ("noise", lambda v: v[1:], "'noise' is torch.uint8"),
    ("noise", lambda v: v * 0, "no state of random numbers"),
    ("noise", lambda v: torch.cat([v[:16], v[16:17] ^ 64, v[17:]]), "no state of random numbers"),
    ("noise", lambda v: None, "'noise' is missing"),
    ("state.timestep", lambda v: v * 0 - 1, "timestep -1"),
    ("state.local_valid", lambda v: v + 100, "local_valid"),
    ("state.tier0", lambda v: torch.zeros(1, 8), "tier0"),
    ("state.more", lambda v: torch.zeros(1), "'state.more' is none of this run's"),
    ("optimizer.exp_avg.more", lambda v: torch.zeros(1), "none of this run's"),
    ("max_exp_avg_sq", lambda v: torch.zeros(1), "none of this run's"),
]


@pytest.mark.parametrize(("name", "change", "message"), TENSORS)
def test_tensors_are_checked(run: tuple, name: str, change: Callable, message: str) -> None:
    options, tensors, record = run
    changed = change(tensors.get(name, torch.zeros(1)))
    others = {key: value for key, value in tensors.items() if key != name}
    with pytest.raises(CheckpointError, match=f"{RESUME_FILE}: .*{message}"):
        rewrite(run, others if changed is None else {**others, name: changed}, record)


def test_an_optimizer_that_was_left_out_is_missed(run: tuple) -> None:
    with pytest.raises(CheckpointError, match="the optimizer's tensors are missing"):
        rewrite(run, {name: value for name, value in run[1].items() if not name.startswith("optimizer.")}, run[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(step=-5), "step is -5"),
        (dict(step=True), "step is True"),
        (dict(step=2.0), r"step is 2\.0"),
        (dict(step=10**400), "step is a number of about 401 digits"),
        (dict(step=3), "expected a whole number from 1 to 3"),
        (dict(best=[1, 2]), "best is"),
        (dict(best={"perplexity": 1.0}), "best lacks 'bits_per_character'"),
        (dict(best={"perplexity": float("nan"), "bits_per_character": 1}), "perplexity is nan"),
        (dict(best={"perplexity": 1, "bits_per_character": "1"}), "bits_per_character is '1'"),
        (dict(origin=None), "origin is None"),
        (dict(origin={}), "origin lacks 'config'"),
        (dict(tokenizer=5), "tokenizer is 5"),
        (dict(tokenizer="{"), "not valid JSON"),
        (dict(options=[]), r"options is \[\]"),
        (dict(options={}), "options lacks 'objective'"),
        (dict(more=1), "unknown field 'more'"),
        (dict(format=1), "in format 1, not 2"),
        (dict(format=None), "of no run"),
    ],
)
def test_records_are_checked(run: tuple, change: dict, message: str) -> None:
    with pytest.raises(EngineError, match=f"{RESUME_FILE}.*{message}"):
        rewrite(run, run[1], {**run[2], **change})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dropout", float("nan"), "dropout is nan"),
        ("dropout", "0.1", "dropout is '0.1'; it must be a number"),
        ("learning_rate", float("inf"), "learning_rate is inf"),
        ("learning_rate", 10**400, "learning_rate is inf"),
        ("warmup", 10**400, "warmup is a number of about 401 digits"),
        ("steps", True, "steps is True; it must be a whole number"),
        ("steps", None, "steps is None"),
        ("tokenizer", 5, "tokenizer is 5; it must be a path"),
        ("precision", {}, "precision is {}; it must be a name"),
        ("precision", "int8", "float32 or bfloat16"),
        ("threads", 10**6, "from 1 to 1024"),
        ("more", 1, "unknown field 'more'"),
    ],
)
def test_recorded_options_are_checked_used_or_not(run: tuple, name: str, value: object, message: str) -> None:
    record = {**run[2], "options": {**run[2]["options"], name: value}}
    for options in (run[0], again(run, dropout=0.1, steps=9, learning_rate=0.1, warmup=1, threads=1)):
        with pytest.raises(CheckpointError, match=f"{RESUME_FILE}: options.*{message}"):
            rewrite(run, run[1], record, options)


def test_a_file_without_a_record_is_no_run(run: tuple) -> None:
    for text in ("", "null", "[]", "{", "{}", "[" * 100_000):
        with pytest.raises(CheckpointError, match=RESUME_FILE):
            rewrite(run, run[1], text)


def test_a_damaged_file_goes_on_or_says_why_not(run: tuple) -> None:
    options, tensors, record = run
    names = [*tensors, "state.", "optimizer.", "optimizer.step", "model.x", "noise.x"]

    @st.composite
    def changed(draw: st.DrawFn) -> dict[str, torch.Tensor]:
        out = dict(tensors)
        for _ in range(draw(st.integers(0, 3))):
            name, other = draw(st.sampled_from(names)), draw(st.sampled_from(list(tensors)))
            match draw(st.integers(0, 5)):
                case 0:
                    out.pop(name, None)
                case 1:
                    out[name] = tensors[other]
                case 2:
                    size = draw(st.lists(st.integers(0, 9), max_size=3))
                    out[name] = torch.zeros(size, dtype=draw(st.sampled_from([torch.float32, torch.int64, torch.bool])))
                case 3:
                    value = draw(st.sampled_from([float("nan"), float("inf"), -1.0, 0.0, 1e38, 1e-45, 2.5]))
                    out[name] = torch.full_like(
                        out.get(name, tensors[other]), value if out.get(name, tensors[other]).is_floating_point() else 1
                    )
                case 4 if name in out and out[name].numel():
                    data = out[name].clone().flatten().view(torch.uint8)
                    data[draw(st.integers(0, len(data) - 1))] ^= draw(st.integers(1, 255))
                    out[name] = data.view(out[name].dtype).reshape(out[name].shape)
                case _:
                    out[name] = tensors[other].reshape(-1)
        return out

    records = st.randoms(use_true_random=False).map(lambda random: edited(random, record))

    @settings(
        max_examples=int(os.environ.get("THL_FUZZ_CASES", "300")),
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(st.one_of(st.tuples(changed(), st.just(record)), st.tuples(st.just(tensors), records)))
    def check(case: tuple) -> None:
        try:
            rewrite(run, case[0], json.dumps(case[1]))
        except EngineError as error:
            assert len(str(error)) <= MESSAGE_LIMIT and str(error).isprintable()

    check()


def test_the_state_of_random_numbers_is_laid_out_as_it_is_checked() -> None:
    """Of this version of torch: how many words are left, and which is next."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(1400):
        state = generator.get_state()
        checkpoint_says = (int(state[8:12].view(torch.int32)), int(state[16:24].view(torch.int64)))
        assert sum(checkpoint_says) == 625 or checkpoint_says == (1, 0)
        torch.rand((), generator=generator)
