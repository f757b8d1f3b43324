"""A trainable model: parameters under their published names; the maths stays in `thl_engine.models`.

The step that generates text is the step that is trained. Only the weights differ (parameters instead of
stored rows) and the ops: `TrainingOps` adds the published Gumbel noise to the router while training.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from thl_engine.config import Config
from thl_engine.kernels import slot_memory
from thl_engine.models import architecture
from thl_engine.models.state import State
from thl_engine.ops.reference import ReferenceOps
from thl_engine.ops.weights import Matrix, Trainable, trainable
from thl_engine.schedule import Block

C = TypeVar("C", bound=Config)
S = TypeVar("S", bound=State)


class TrainingOps(ReferenceOps):
    """The reference with Gumbel noise on the router's scores, as the published model trains."""

    name = "training"

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, blocked: Tensor | None = None
    ) -> Tensor:
        """torch's own, whose backward pass keeps no scores: a window of 256 takes a third of the time."""
        mask = None if blocked is None else ~blocked
        return functional.scaled_dot_product_attention(
            query, key, value, mask, scale=scale, enable_gqa=query.shape[1] > key.shape[1]
        )

    def slot_topk(self, scores: Tensor, k: int, capacity: int | None = None) -> tuple[Tensor, Tensor]:
        uniform = torch.rand(scores.shape, generator=self.generator, device=scores.device)
        noise = -torch.log(-torch.log(uniform + 1e-9) + 1e-9)
        return slot_memory.slot_topk(scores + noise, k, capacity)


class DroppingOps(TrainingOps):
    """Training with a share of the features that enter the output head zeroed. `head`: its weights, as a parameter."""

    name = "dropping"

    def __init__(self, generator: torch.Generator, share: float) -> None:
        super().__init__(generator)
        self.share = share
        self.head: Tensor | None = None

    def product(self, x: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
        if self.share and isinstance(matrix, Trainable) and matrix.tensor is self.head:
            x = x * mask(x.shape, self.share, self.generator)
        return super().product(x, matrix, bias)


class MixedOps(DroppingOps):
    """Products with matrices in bfloat16, under autocast, and float32 for everything else.

    States and gates stay in float32: a GRU's (1 - z) s would lose every z below 1/256.
    """

    name = "mixed"

    def product(self, x: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
        return super().product(x, matrix, bias).float()

    def linear_heads(self, x: Tensor, matrix: Matrix) -> Tensor:
        return super().linear_heads(x, matrix).float()

    def linear_transposed(self, x: Tensor, matrix: Matrix) -> Tensor:
        return super().linear_transposed(x, matrix).float()

    def linear_transposed_heads(self, x: Tensor, matrix: Matrix) -> Tensor:
        return super().linear_transposed_heads(x, matrix).float()

    def window_mix(self, query: Tensor, buffer: Tensor, valid: int | Tensor, scale: float) -> Tensor:
        return super().window_mix(query, buffer, valid, scale).float()


class TrainableModel(nn.Module, Generic[C, S]):
    """Parameters of a configuration, initialised as published; `state_dict()` is a published state dict.

    dropout: share of the features entering the output head that are zeroed in training.
    weight_dropout: share of the weights that are zeroed for a whole chunk in training, in every matrix but
    the head's (after Merity et al. 2017, arXiv 1708.02182, who drop recurrent weights).
    precision: of training; "bfloat16" computes the products with matrices in it, the rest in float32.
    """

    def __init__(
        self, config: C, seed: int = 0, dropout: float = 0.0, weight_dropout: float = 0.0, precision: str = "float32"
    ) -> None:
        super().__init__()
        self.config = config
        self.arch = architecture(config.model_type)
        self.blocks: tuple[Block, ...] = self.arch.blocks(config)
        self.weight_dropout = weight_dropout
        self.noise = torch.Generator().manual_seed(seed)  # of the router and of both kinds of dropout
        self._head = frozenset(self.arch.head(config))
        self.mixed = precision == "bfloat16"
        self._training_ops = (MixedOps if self.mixed else DroppingOps)(self.noise, dropout)
        self._plain_ops = ReferenceOps()
        drawn = torch.Generator().manual_seed(seed)
        for block in self.blocks:
            _insert(self, block.name, nn.Parameter(self.arch.initial(config, block, slice(None), drawn)))
        self._training_ops.head = self.get_parameter(self.arch.head(config)[0])

    def init_state(self, batch_size: int) -> S:
        """The empty state of `batch_size` fresh sequences."""
        with torch.no_grad():
            state: S = self.arch.init_state(self.config, batch_size, weights=dict(self.named_parameters()))
        return state

    def state_from_dict(self, fields: Mapping[str, Tensor]) -> S:
        """The state that `state.to_dict()` described."""
        state: S = self.arch.state_from_dict(self.config, fields, self._plain_ops)
        return state

    def forward(self, tokens: Tensor, state: S) -> tuple[Tensor, S]:
        """Logits after each token of a chunk, and the state behind it.

        tokens: int64 [B, T]. Returns float32 [B, T, vocab_size] and the next state, which is still part of
        the graph: `state.detach()` truncates the backpropagation there.
        """
        with self.casting():
            weights, hidden = self.weights(), []
            for column in tokens.unbind(dim=1):
                features, state = self.arch.advance(self.config, weights, self.ops, column[:, None], state)
                hidden.append(features)
            features = torch.cat(hidden, dim=1)  # [B, T, features]
            logits = self.arch.logits(self.config, weights, self.ops, features.flatten(0, 1))
            return logits.unflatten(0, tokens.shape), state

    def casting(self) -> AbstractContextManager[object]:
        """Inside of it products are computed in the precision of training, while training."""
        # A cache of the cast weights would have their gradients summed over the steps in bfloat16.
        return torch.autocast("cpu", torch.bfloat16, enabled=self.training and self.mixed, cache_enabled=False)

    @property
    def ops(self) -> ReferenceOps:
        """What the models compute with: with noise and dropout while training."""
        return self._training_ops if self.training else self._plain_ops

    def decayed(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The parameters that weight decay applies to (matrices), and the other ones that are used."""
        named = dict(self.named_parameters())
        matrices = [named[b.name] for b in self.blocks if b.kind == "matrix"]
        return matrices, [named[b.name] for b in self.blocks if b.kind in ("table", "vector")]

    def weights(self) -> dict[str, Any]:
        """The parameters as models take them; while training, anew with each call, with a share of the weights zero."""
        return trainable(
            self.blocks, dict(self._dropped() if self.training and self.weight_dropout else self.named_parameters())
        )

    def _dropped(self) -> Iterator[tuple[str, Tensor]]:
        named = dict(self.named_parameters())
        for block in self.blocks:
            value: Tensor = named[block.name]
            if block.kind == "matrix" and block.name not in self._head:
                value = value * mask(value.shape, self.weight_dropout, self.noise)
            yield block.name, value


def mask(shape: torch.Size, share: float, generator: torch.Generator | None) -> Tensor:
    """Zeros with probability `share`, elsewhere what keeps the expectation."""
    return torch.rand(shape, generator=generator).ge_(share).div_(1.0 - share)


def chunk_loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of the next tokens: logits [B, T, V], targets int64 [B, T]."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


def _insert(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Registers a parameter under a dotted name, which torch spells as modules within modules."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.register_parameter(last, parameter)
