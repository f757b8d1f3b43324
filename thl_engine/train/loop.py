"""The training run: update, evaluate, sample, save and resume."""

import logging
import math
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thl_engine.config import parse_config, unapplied
from thl_engine.errors import ConfigError, EngineError
from thl_engine.files import parse_json, read_text
from thl_engine.text.sampler import Sampler, Sampling
from thl_engine.text.tokenizer import Tokenizer, load_tokenizer
from thl_engine.train import checkpoint, data
from thl_engine.train.checkpoint import RESUME_FILE
from thl_engine.train.modules import TrainableModel
from thl_engine.train.objectives import AnyModel, Objective, objective_of
from thl_engine.train.options import TrainOptions
from thl_engine.train.progress import Progress
from thl_engine.train.resume import Evaluation, Record, parse_record, resumed_options
from thl_engine.train.run import Run

_log = logging.getLogger("thl_engine")
DEFAULT_VOCABULARY = 1024
BETAS = (0.9, 0.99)
SAMPLING = Sampling(temperature=0.8, top_k=50, seed=0)


def train(options: TrainOptions) -> Evaluation:
    """Trains a model and leaves a checkpoint folder in `options.out`.

    config.json, model.safetensors and tokenizer.json are those of the update with the best evaluation;
    training.safetensors is what `resume` continues from as if the run had not stopped. Progress goes to
    stderr. Returns the best evaluation. Raises EngineError for files and options that cannot work.
    """
    threads = torch.get_num_threads()
    torch.set_flush_denormal(True)  # slots and states decay into denormals, which slow a CPU down
    try:
        run = prepare(options)
        torch.set_num_threads(run.options.threads or threads)
        return _train(run)
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)


def _train(run: Run) -> Evaluation:
    options = run.options
    if run.step >= options.steps:
        raise ConfigError(
            f"the run in {options.out} has made {run.step} updates already; ask for more than {options.steps}"
        )
    progress = Progress(run)
    while run.step < options.steps:
        progress.update(run.update())
        last = run.step == options.steps
        if last or run.step % options.evaluate_every == 0:
            found = evaluate(run.model, run.held_out, run.tokens_per_character, options.batch_size, run.objective)
            better = run.best is None or found.bits_per_character < run.best.bits_per_character
            if better:
                run.best = found
                checkpoint.export(options.out, run.model.config.to_dict(), run.model.state_dict(), run.tokenizer_text)
            progress.evaluated(found, better, sample(run.model, run.tokenizer, options.sample_tokens))
        if last or run.step % options.save_every == 0:
            run.save()
    assert run.best is not None  # the last update was evaluated
    return run.best


def prepare(options: TrainOptions) -> Run:
    """Reads the files, makes the tokenizer and the model, and restores the run that is to be resumed."""
    resumed = options.out / RESUME_FILE
    tensors: dict[str, Tensor] = {}
    record: Record | None = None
    if options.resume:
        tensors, given_record = checkpoint.load(resumed)
        record = parse_record(given_record, resumed)
        options, changed = resumed_options(options, record, resumed)
        if changed:
            _log.warning("%s: goes on with %s", resumed, ", ".join(changed))
    elif os.path.lexists(resumed):
        raise ConfigError(f"{options.out} holds a training run; resume it, or choose another folder")
    kind = objective_of(options.model_type, options.objective)
    given = parse_json(read_text(options.config, ConfigError), str(options.config), ConfigError)
    text = data.read_text(options.data)
    training, held_out = data.split_text(text, options.held_out)
    tokenizer_text, where = _tokenizer_text(options, kind, given, training, record)
    if options.vocab_size is not None:
        given["vocab_size"] = options.vocab_size
    elif "vocab_size" not in given:
        given["vocab_size"] = load_tokenizer(tokenizer_text, data.LARGEST_VOCABULARY, where).vocab_size
    config = parse_config(given, options.model_type, str(options.config))
    if names := unapplied(given, config):
        _log.warning("%s: not applied in training here: %s; see --dropout", options.config, ", ".join(names))
    objective = kind(config, options.chunk)
    tokenizer = load_tokenizer(tokenizer_text, config.vocab_size, where)
    lanes = data.Lanes(data.encode(tokenizer, training), options.batch_size, options.chunk, options.carry, options.seed)
    held_out_tokens = data.encode(tokenizer, held_out)
    if len(held_out_tokens) < 2:
        raise ConfigError(
            f"the text {options.data} is too short: its held-out part has only {len(held_out_tokens)} tokens"
        )
    model: AnyModel = TrainableModel(config, options.seed, options.dropout, options.weight_dropout, options.precision)
    matrices, others = model.decayed()
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=options.learning_rate, betas=BETAS, weight_decay=options.weight_decay, fused=True
    )
    origin = {"config": config.to_dict(), "objective": kind.name, "text": f"CRC-32 {zlib.crc32(text.encode()):08x}"}
    run = Run(
        options,
        model,
        objective,
        optimizer,
        lanes,
        held_out_tokens,
        len(held_out_tokens) / len(held_out),
        tokenizer,
        tokenizer_text,
        origin,
    )
    if record is not None:
        run.restore(tensors, record)
    else:
        _make_folder(options.out)
    checkpoint.tidy(options.out)
    return run


@torch.no_grad()
def evaluate(
    model: AnyModel, tokens: Tensor, tokens_per_character: float, lanes: int = 1, objective: Objective | None = None
) -> Evaluation:
    """Loss of a text without noise and dropout, as the objective measures it; None for the model's usual one.

    tokens: int64 [n], at least 2. With several lanes the text is cut into as many parts, read side by side,
    which is faster and, where a state is carried on, a little pessimistic: each part starts from an empty one.
    Raises EngineError where the loss is not finite.
    """
    model.eval()
    objective = objective or objective_of(model.config.model_type)(model.config, TrainOptions.chunk)
    nats = objective.measure(model, tokens, lanes)
    if not math.isfinite(nats):
        raise EngineError(f"the loss of the held-out text is {nats}; train with a lower learning rate")
    return Evaluation(math.exp(min(nats, 700.0)), nats * tokens_per_character / math.log(2))


@torch.no_grad()
def sample(model: AnyModel, tokenizer: Tokenizer, length: int, prompt: str = "\n") -> str:
    """`length` tokens of text that the model writes after `prompt`."""
    model.eval()
    sampler, state, weights, arch = Sampler(SAMPLING), model.init_state(1), model.weights(), model.arch
    given = torch.tensor(tokenizer.encode(prompt))
    longest = arch.longest(model.config)
    written: list[int] = []
    for _ in range(length if longest is None else min(length, longest - len(given))):
        for token in given:
            hidden, state = arch.advance(model.config, weights, model.ops, token.view(1, 1), state)
        logits = arch.logits(model.config, weights, model.ops, hidden[:, -1])
        given, _ = sampler.sample(logits)
        written.append(int(given))
    return tokenizer.decode(written)


def _tokenizer_text(
    options: TrainOptions, kind: type[Objective], given: dict[str, Any], training: str, record: Record | None
) -> tuple[str, str]:
    """The tokenizer's JSON and where it came from: the run to be resumed, a file, or the training text."""
    made = options.tokenizer_type or kind.tokenizer_type
    if record is not None:
        before = record.options
        other = options.tokenizer is not None and str(options.tokenizer) != before["tokenizer"]
        if (other and data.read_text(Path(str(options.tokenizer))) != record.tokenizer) or (
            before["tokenizer"] is None and made != (before["tokenizer_type"] or kind.tokenizer_type)
        ):
            raise ConfigError(
                f"cannot resume {options.out}: its tokenizer is another one; give none, or start a new run in another "
                "folder"
            )
        return record.tokenizer, f"{options.out / RESUME_FILE}"
    if options.tokenizer is not None:
        return data.read_text(options.tokenizer), str(options.tokenizer)
    if made == "char":
        return kind.character_vocabulary(training), "character vocabulary"
    size = options.vocab_size or given.get("vocab_size", DEFAULT_VOCABULARY)
    if isinstance(size, bool) or not isinstance(size, int):
        raise ConfigError(f"{options.config}: vocab_size must be a whole number, found {size!r}")
    return data.train_bpe(training, size), "trained tokenizer"


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {path}: {error.strerror}; choose another") from None
