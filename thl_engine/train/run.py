"""A training run between two updates, and how well it does."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from thl_engine.errors import ConfigError, EngineError
from thl_engine.text.tokenizer import Tokenizer
from thl_engine.train import checkpoint, data
from thl_engine.train.objectives import AnyModel, Objective
from thl_engine.train.options import TrainOptions, rate

RESUME_FILE = "training.safetensors"


@dataclass(frozen=True)
class Evaluation:
    """Mean loss on held-out text: perplexity of a token, and bits per character of text."""

    perplexity: float
    bits_per_character: float


@dataclass
class Run:
    """A training run between two updates.

    held_out: int64 [n]. origin: what a resumed run must have in common with its beginning.
    state: what the objective carries from update to update. best: the best evaluation so far.
    """

    options: TrainOptions
    model: AnyModel
    objective: Objective
    optimizer: torch.optim.Optimizer
    lanes: data.Lanes
    held_out: Tensor
    tokens_per_character: float
    tokenizer: Tokenizer
    tokenizer_text: str
    origin: dict[str, Any]
    step: int = 0
    state: Any = None
    best: Evaluation | None = None

    def update(self) -> float:
        """One update on the next chunk. Returns the chunk's loss; where it is a cross-entropy, in nats a token."""
        options, model = self.options, self.model
        inputs, targets = self.lanes.read(self.step)
        if self.lanes.fresh(self.step):
            self.state = self.objective.fresh(model, options.batch_size)
        for group in self.optimizer.param_groups:
            group["lr"] = rate(options, self.step)
        model.train()
        with model.casting():
            loss, state = self.objective.loss(
                model, inputs, targets, self.state, self.step // self.lanes.chunks_per_pass
            )
        value = float(loss.detach())
        if not math.isfinite(value):
            raise EngineError(
                f"the loss is {value} at update {self.step + 1}; resume with a learning rate "
                f"below {options.learning_rate:g}"
            )
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        self.optimizer.step()
        self.state, self.step = state, self.step + 1
        return value

    def save(self) -> None:
        """Writes the file that `restore` continues from."""
        tensors = {"noise": self.model.noise.get_state()}
        for name, parameter in self.model.named_parameters():
            tensors[f"model.{name}"] = parameter
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        if self.state is not None:
            tensors |= {f"state.{name}": value for name, value in self.state.to_dict().items()}
        best = None if self.best is None else asdict(self.best)
        record = {"step": self.step, "best": best, "origin": self.origin, "tokenizer": self.tokenizer_text}
        checkpoint.save(self.options.out / RESUME_FILE, tensors, record)

    def restore(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Continues from what `save` wrote. Raises ConfigError where that was a different run."""
        for key, value in self.origin.items():
            was = record["origin"].get(key)
            if was != value:
                raise ConfigError(
                    f"cannot resume {self.options.out}: {key} was {was} and is now {value}; "
                    f"give the same as before, or start a new run in another folder"
                )
        fields: dict[str, Tensor] = {}
        named = dict(self.model.named_parameters())
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            if part == "model":
                named[name].data.copy_(value)
            elif part == "optimizer":
                slot, _, name = name.partition(".")
                self.optimizer.state[named[name]][slot] = value
            elif part == "state":
                fields[name] = value
        self.state = self.objective.restore(self.model, fields)
        self.model.noise.set_state(tensors["noise"])
        self.step = record["step"]
        self.best = None if record["best"] is None else Evaluation(**record["best"])
