"""A training run between two updates, and how well it does."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thl_engine.errors import CheckpointError, EngineError, said
from thl_engine.text.tokenizer import Tokenizer
from thl_engine.train import checkpoint, data
from thl_engine.train.checkpoint import RESUME_FILE
from thl_engine.train.objectives import AnyModel, Objective
from thl_engine.train.options import TrainOptions, rate
from thl_engine.train.resume import Evaluation, Record, check_moments, check_noise, check_origin, check_tensors, moments


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
        record = Record(self.step, self.best, self.origin, self.tokenizer_text, self.options.recorded())
        checkpoint.save(self.options.out / RESUME_FILE, tensors, record.to_dict())

    def restore(self, tensors: dict[str, Tensor], record: Record) -> None:
        """Continues from what `save` wrote.

        Raises ConfigError where that was a different run, CheckpointError for a tensor that does not belong to this one
        or cannot be: the fused optimizer would write past its end, or go on with nonsense.
        """
        where = self.options.out / RESUME_FILE
        check_origin(self.options, record, self.origin, where)
        named = dict(self.model.named_parameters())
        learning = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        expected = {"noise": self.model.noise.get_state()}
        expected |= {f"model.{name}": parameter for name, parameter in named.items()}
        learnt = []
        for name, parameter in named.items():
            if id(parameter) in learning and any(slot in tensors for slot in moments(name).values()):
                learnt.append(name)
                expected |= dict.fromkeys(moments(name).values(), parameter) | {
                    moments(name)["step"]: torch.zeros((), dtype=torch.float32)
                }
        carried = self.objective.carried(self.model, self.options.batch_size) if record.step else {}
        expected |= {f"state.{name}": value for name, value in carried.items()}
        check_tensors(tensors, expected, where)
        check_noise(tensors["noise"], where)
        for name in learnt:
            check_moments(tensors, name, record.step, where)
        if record.step and not learnt:
            raise CheckpointError(f"{where}: after {record.step} updates the optimizer's tensors are missing")
        try:
            state = self.objective.restore(self.model, {name: tensors[f"state.{name}"] for name in carried})
            self.model.noise.set_state(tensors["noise"])
        except (CheckpointError, RuntimeError) as error:
            raise CheckpointError(f"{where}: {said(error)}") from None
        for name, parameter in named.items():
            parameter.data.copy_(tensors[f"model.{name}"])
        for name in learnt:
            self.optimizer.state[named[name]] = {slot: tensors[key] for slot, key in moments(name).items()}
        self.state, self.step, self.best = state, record.step, record.best
