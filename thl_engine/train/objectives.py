"""What an update minimises and what is measured on held-out text: one small class for each way of training.

The maths of the models stays in `thl_engine.models`, that of the losses in `inl_losses` and `hrm_losses`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from thl_engine.config import Config, HIMConfig, HRMConfig, HRMTextConfig, INLConfig, THLConfig
from thl_engine.errors import ConfigError
from thl_engine.models import architecture, him, hrm, hrm_text, inl, thl
from thl_engine.text.hrm_tokenizer import vocabulary_of_texts
from thl_engine.train import data
from thl_engine.train.hrm_losses import Carry, deep_supervision, simple_loss
from thl_engine.train.inl_losses import IntegratorLoss, cycle_schedule
from thl_engine.train.modules import TrainableModel, chunk_loss

AnyModel = TrainableModel[Any, Any]

EVALUATION_CHUNK = 64  # tokens whose logits are in memory at a time
EVALUATION_TOKENS = 1 << 15  # of held-out text that is read in windows, at most
EVALUATION_WINDOWS = 256  # of held-out text, where a window is evaluated at its last position only
EVALUATION_BATCH = 32
REASONING = "reasoning_module.reasoning_embeddings"


class Objective(ABC):
    """One way of training. `chunk`: tokens of each sequence that an update reads."""

    name: ClassVar[str]
    tokenizer_type: ClassVar[str] = "bpe"  # of a tokenizer that is made for it

    @staticmethod
    def character_vocabulary(text: str) -> str:
        """The text of a tokenizer that is made of the characters of a text."""
        return data.character_vocabulary(text)

    def __init__(self, config: Config, chunk: int) -> None:
        """Raises ConfigError for chunks that the model cannot read."""
        self.chunk = chunk
        longest = architecture(config.model_type).longest(config)
        if longest is not None and chunk > longest:
            raise ConfigError(f"chunk is {chunk}; the model takes sequences of at most {longest} tokens")

    def fresh(self, model: AnyModel, batch_size: int) -> Any:
        """What the first update carries over; None where updates do not depend on each other."""
        return None

    def carried(self, model: AnyModel, batch_size: int) -> dict[str, Tensor]:
        """What an update leaves for the next one, as its `to_dict` has it, in names, shapes and types only."""
        return {}

    def restore(self, model: AnyModel, fields: Mapping[str, Tensor]) -> Any:
        """What was carried over, from fields as `carried` says. Raises CheckpointError for values that none has."""
        return None

    @abstractmethod
    def loss(self, model: AnyModel, inputs: Tensor, targets: Tensor, carried: Any, epoch: int) -> tuple[Tensor, Any]:
        """Loss () of int64 inputs and the tokens that follow them, both [B, T], and what the next update carries over.

        epoch: passes over the text before this one.
        """

    @abstractmethod
    def measure(self, model: AnyModel, tokens: Tensor, lanes: int) -> float:
        """Mean nats of a token of held-out text, int64 [n] with n of at least 2, read as `lanes` sequences at most."""


class NextToken(Objective):
    """THL: cross-entropy of each next token, step by step, states carried on and cut off from the graph."""

    name = "next-token"

    def fresh(self, model: TrainableModel[THLConfig, thl.State], batch_size: int) -> thl.State:
        return model.init_state(batch_size)

    def carried(self, model: TrainableModel[THLConfig, thl.State], batch_size: int) -> dict[str, Tensor]:
        return model.init_state(batch_size).to_dict()

    def restore(self, model: TrainableModel[THLConfig, thl.State], fields: Mapping[str, Tensor]) -> thl.State | None:
        return model.state_from_dict(fields) if fields else None

    def loss(
        self,
        model: TrainableModel[THLConfig, thl.State],
        inputs: Tensor,
        targets: Tensor,
        carried: thl.State,
        epoch: int,
    ) -> tuple[Tensor, thl.State]:
        logits, state = model(inputs, carried)
        return chunk_loss(logits, targets), state.detach()

    def measure(self, model: TrainableModel[THLConfig, thl.State], tokens: Tensor, lanes: int) -> float:
        """The state goes from a lane's beginning to its end."""
        lanes = min(lanes, len(tokens) - 1)
        length = (len(tokens) - 1) // lanes
        inputs = tokens[: lanes * length].view(lanes, length)
        targets = tokens[1 : lanes * length + 1].view(lanes, length)
        state, total = model.init_state(lanes), 0.0
        for start in range(0, length, EVALUATION_CHUNK):
            part = slice(start, start + EVALUATION_CHUNK)
            logits, state = model(inputs[:, part], state)
            total += float(chunk_loss(logits, targets[:, part], "sum"))
        return total / (lanes * length)


class Equilibrium(Objective):
    """INL: cross-entropy, and the last layer's way to its equilibrium in the phases of the balanced schedule."""

    name = "equilibrium"

    def __init__(self, config: INLConfig, chunk: int) -> None:
        super().__init__(config, chunk)
        self.schedule = cycle_schedule("balanced")

    def loss(
        self, model: TrainableModel[INLConfig, inl.State], inputs: Tensor, targets: Tensor, carried: None, epoch: int
    ) -> tuple[Tensor, None]:
        seen: dict[str, Tensor] = {}
        logits, _ = inl.forward(
            model.config,
            model.weights(),
            model.ops,
            inputs,
            model.init_state(len(inputs)),
            seen.__setitem__,
            training=True,
        )
        name, phase = self.schedule.phase(epoch)
        exploration = name == "exploration"
        last = f"layer{model.config.num_layers - 1}."
        plain, mean = IntegratorLoss(), phase.lambda_mean
        weighted = (
            replace(plain, exploration_lambda_mean=mean) if exploration else replace(plain, lambda_mean_init=mean)
        )
        losses = weighted(
            logits.flatten(0, 1),
            targets.flatten(),
            seen[f"{last}x_trajectory"],
            seen[f"{last}v_trajectory"],
            epoch,
            exploration,
        )
        return losses.total, None

    def measure(self, model: TrainableModel[INLConfig, inl.State], tokens: Tensor, lanes: int) -> float:
        """In windows of a chunk, each token stopping by itself, as text is written."""

        def nats(inputs: Tensor, targets: Tensor) -> Tensor:
            weights = model.weights()
            hidden, _ = inl.advance(model.config, weights, model.ops, inputs, model.init_state(len(inputs)))
            return chunk_loss(inl.logits(model.config, weights, model.ops, hidden), targets)

        return _over_windows(tokens, self.chunk, nats)


class NextTokenInWindow(Objective):
    """HRM-Text: cross-entropy of each next token in windows, through all cycles, with the published k-step gradient.

    A window is read as the model reads what it is given: where `config.prefix_lm` says so, its beginning is a prefix,
    of another length in every window, and only what follows it counts.
    """

    name = "next-token"

    def loss(
        self,
        model: TrainableModel[HRMTextConfig, hrm_text.State],
        inputs: Tensor,
        targets: Tensor,
        carried: None,
        epoch: int,
    ) -> tuple[Tensor, None]:
        count = inputs.shape[1]
        lengths = torch.zeros(len(inputs), 1)
        if model.config.prefix_lm:
            lengths = torch.rand(len(inputs), 1, generator=model.noise).mul_(count).floor_()
        return self._nats(model, inputs, targets, lengths), None

    def measure(self, model: TrainableModel[HRMTextConfig, hrm_text.State], tokens: Tensor, lanes: int) -> float:
        """The second halves of windows, behind the first ones: as a text is read, with half a window at least before
        each token; where the model takes a prefix, the first half is one."""

        def nats(inputs: Tensor, targets: Tensor) -> Tensor:
            half = inputs.shape[1] // 2
            # What the last token of the prefix predicts is the first that counts.
            lengths = torch.full((len(inputs), 1), float(half + 1 if model.config.prefix_lm else 0))
            return self._nats(model, inputs, targets, lengths, first=half)

        return _over_windows(tokens, self.chunk, nats)

    def _nats(
        self,
        model: TrainableModel[HRMTextConfig, hrm_text.State],
        inputs: Tensor,
        targets: Tensor,
        lengths: Tensor,
        first: int = 0,
    ) -> Tensor:
        """Mean nats () of the tokens that follow prefixes of these lengths [B, 1], and position `first`."""
        positions = torch.arange(inputs.shape[1])
        prefix = positions < lengths
        logits, _ = hrm_text.forward(
            model.config,
            model.weights(),
            model.ops,
            inputs,
            hrm_text.init_state(model.config, len(inputs), "meta", context=1),
            token_type_ids=prefix.long() if bool(prefix.any()) else None,
            training=True,
        )
        counted = (positions >= lengths - 1) & (positions >= first)
        return functional.cross_entropy(logits[counted], targets[counted])


class SimpleSegment(Objective):
    """HRM as its published trainer trains: cross-entropy after one segment, from the states that the last batch left.

    As published, every position of the chunk is to give the next token and sees it, all but the last: what is learned
    about language is learned there, and there it is measured.
    """

    name = "simple"
    tokenizer_type = "char"

    @staticmethod
    def character_vocabulary(text: str) -> str:
        return vocabulary_of_texts([text]).text

    def __init__(self, config: HRMConfig, chunk: int) -> None:
        super().__init__(config, chunk)
        if chunk > hrm.WINDOW:
            raise ConfigError(f"chunk is {chunk}; an hrm model sees {hrm.WINDOW} tokens at once")

    def carried(self, model: TrainableModel[HRMConfig, hrm.State], batch_size: int) -> dict[str, Tensor]:
        states = torch.empty(batch_size, self.chunk, model.config.hidden_size, device="meta")
        return {"high": states, "low": states}

    def restore(self, model: TrainableModel[HRMConfig, hrm.State], fields: Mapping[str, Tensor]) -> Carry | None:
        return Carry(**fields) if fields else None

    def loss(
        self,
        model: TrainableModel[HRMConfig, hrm.State],
        inputs: Tensor,
        targets: Tensor,
        carried: Carry | None,
        epoch: int,
    ) -> tuple[Tensor, Carry | None]:
        return simple_loss(model.config, model.weights(), model.ops, inputs, targets, carried)

    def measure(self, model: TrainableModel[HRMConfig, hrm.State], tokens: Tensor, lanes: int) -> float:
        """The token after a window, for windows of a chunk spread over the text, with all segments of inference."""
        length = min(self.chunk, len(tokens) - 1)
        starts = torch.linspace(0, len(tokens) - 1 - length, min(EVALUATION_WINDOWS, len(tokens) - length)).long()
        weights, total = model.weights(), 0.0
        for some in starts.split(EVALUATION_BATCH):
            windows = tokens[some[:, None] + torch.arange(length + 1)]
            hidden, _ = hrm.advance(model.config, weights, model.ops, windows[:, :-1], model.init_state(len(some)))
            logits = hrm.logits(model.config, weights, model.ops, hidden[:, -1])
            total += float(functional.cross_entropy(logits, windows[:, -1], reduction="sum"))
        return total / len(starts)


class DeepSupervision(SimpleSegment):
    """HRM as its model defines it: a stablemax loss and targets for halting after each of `halt_max_steps` segments.

    Published so, raw logits are among the targets, which leaves the loss without a lower bound; it may turn negative.
    """

    name = "deep"

    def carried(self, model: TrainableModel[HRMConfig, hrm.State], batch_size: int) -> dict[str, Tensor]:
        return {}

    def loss(
        self,
        model: TrainableModel[HRMConfig, hrm.State],
        inputs: Tensor,
        targets: Tensor,
        carried: Carry | None,
        epoch: int,
    ) -> tuple[Tensor, None]:
        return deep_supervision(model.config, model.weights(), model.ops, inputs, targets).loss, None


class Answers(Objective):
    """HIM: cross-entropy of the max_answer_len tokens that follow those it was given, all at once."""

    name = "answers"

    def __init__(self, config: HIMConfig, chunk: int) -> None:
        super().__init__(config, chunk)
        if chunk < config.max_answer_len:
            raise ConfigError(
                f"chunk is {chunk}; it must be at least max_answer_len ({config.max_answer_len}), the "
                "tokens of an answer"
            )

    def loss(
        self, model: TrainableModel[HIMConfig, him.State], inputs: Tensor, targets: Tensor, carried: None, epoch: int
    ) -> tuple[Tensor, None]:
        given = inputs.shape[1] - model.config.max_answer_len + 1
        return chunk_loss(self.logits(model, inputs[:, :given]), targets[:, given - 1 :]), None

    def measure(self, model: TrainableModel[HIMConfig, him.State], tokens: Tensor, lanes: int) -> float:
        if len(tokens) <= self.chunk:
            raise ConfigError(f"chunk is {self.chunk}; the held-out text has only {len(tokens)} tokens")

        def nats(inputs: Tensor, targets: Tensor) -> Tensor:
            return self.loss(model, inputs, targets, None, 0)[0]

        return _over_windows(tokens, self.chunk, nats)

    def logits(self, model: TrainableModel[HIMConfig, him.State], tokens: Tensor, **inputs: Any) -> Tensor:
        """One pass from the checkpoint's memory and reasoning buffer, the latter as part of the graph."""
        weights = model.weights()
        state = replace(him.init_state(model.config, 1, weights=weights), reasoning_embeddings=weights[REASONING])
        return him.forward(model.config, weights, model.ops, tokens, state, **inputs)[0]


class Reconstruction(Answers):
    """HIM: cross-entropy of the tokens that it was given. What writes answers takes no part and is not trained.

    The embedding is also the projection, so that a fresh model gives tokens back almost perfectly.
    """

    name = "reconstruction"

    def loss(
        self, model: TrainableModel[HIMConfig, him.State], inputs: Tensor, targets: Tensor, carried: None, epoch: int
    ) -> tuple[Tensor, None]:
        return chunk_loss(self.logits(model, inputs, reconstruction=True), inputs), None


# By model_type; the first is the usual one.
OBJECTIVES: dict[str, tuple[type[Objective], ...]] = {
    "thl": (NextToken,),
    "inl": (Equilibrium,),
    "hrm": (SimpleSegment, DeepSupervision),
    "hrm_text": (NextTokenInWindow,),
    "him": (Answers, Reconstruction),
}


def objective_of(model_type: str, name: str | None = None) -> type[Objective]:
    """The way of training that `name` means for a kind of model, or the usual one. Raises ConfigError."""
    known = OBJECTIVES.get(model_type)
    if known is None:
        raise ConfigError(f"model_type {model_type!r} cannot be trained; these can: {', '.join(OBJECTIVES)}")
    found = next((one for one in known if name in (None, one.name)), None)
    if found is None:
        raise ConfigError(
            f"objective is {name!r}; a model of type {model_type} has " + " and ".join(one.name for one in known)
        )
    return found


def _over_windows(tokens: Tensor, length: int, nats: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Mean of `nats` (inputs, targets), both [B, length], over windows side by side, spread over the text."""
    length = min(length, len(tokens) - 1)
    count = min((len(tokens) - 1) // length, -(-EVALUATION_TOKENS // length))
    starts = torch.linspace(0, len(tokens) - 1 - length, count).long()
    total = 0.0
    for some in starts.split(EVALUATION_BATCH):
        windows = tokens[some[:, None] + torch.arange(length + 1)]
        total += float(nats(windows[:, :-1], windows[:, 1:])) * len(some)
    return total / count
