"""HRM's two published training objectives, in terms of the model's own segments.

Both give gradients through the last update of each module only; `thl_engine.models.hrm.segment` holds that rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from thl_engine.config import HRMConfig
from thl_engine.kernels.stablemax import stablemax_cross_entropy
from thl_engine.models import hrm
from thl_engine.models.contract import Ops, Weights

IGNORED = -100  # label of positions without a target
PADDING = 0  # target of positions without one in the simple objective
Q_SHARE = 0.5  # weight of the halting head's two losses


@dataclass(frozen=True)
class SegmentLoss:
    """What one segment contributed: float64 losses (), values of the halting head [B], rows that were all right [B]."""

    loss: Tensor
    lm_loss: Tensor
    q_halt_logits: Tensor
    q_continue_logits: Tensor
    row_correct: Tensor


@dataclass(frozen=True)
class Supervised:
    """Loss to minimise, float64 (), what its segments were, and the last one's logits [B, T, vocab_size]."""

    loss: Tensor
    segments: tuple[SegmentLoss, ...]
    logits: Tensor


@dataclass(frozen=True)
class Carry:
    """States [B, T, h] that the simple objective takes from one batch to the next."""

    high: Tensor
    low: Tensor

    def to_dict(self) -> dict[str, Tensor]:
        """The fields by name."""
        return {"high": self.high, "low": self.low}


def deep_supervision(
    config: HRMConfig,
    weights: Weights,
    ops: Ops,
    tokens: Tensor,
    labels: Tensor,
    cycles: str | Sequence[int] = hrm.NORMAL,
) -> Supervised:
    """Stablemax cross-entropy and halting targets after every one of `halt_max_steps` segments.

    tokens and labels int64 [B, T]; a label of -100 has no loss but counts in the mean, and its row is never right.
    """
    pair = hrm.parse_cycles(cycles)
    inputs, high, low = hrm.begin(config, weights, ops, tokens)
    segments = []
    for s in range(config.halt_max_steps):
        high, low = hrm.segment(config, weights, ops, inputs, high, low, pair)
        scores = hrm.logits(config, weights, ops, high.flatten(0, 1)).view(*tokens.shape, -1)
        halt, proceed = hrm.q_values(weights, high)
        correct = (scores.detach().argmax(dim=-1) == labels).all(dim=1)
        halt_target, proceed_target = _targets(halt, proceed, correct, s == config.halt_max_steps - 1)
        lm_loss = stablemax_cross_entropy(scores, labels, IGNORED).mean()
        halting = functional.binary_cross_entropy_with_logits(
            halt, halt_target
        ) + functional.binary_cross_entropy_with_logits(proceed, proceed_target)
        segments.append(SegmentLoss(lm_loss + Q_SHARE * halting, lm_loss, halt, proceed, correct))
    return Supervised(torch.stack([part.loss for part in segments]).mean(), tuple(segments), scores)


def _targets(halt: Tensor, proceed: Tensor, correct: Tensor, last: bool) -> tuple[Tensor, Tensor]:
    """What the halting head should have said. Raw logits among the targets are published so.

    The last segment's target of `proceed` is not cut off from the graph: the recorded gradients show that it, unlike
    all others, pulls at `halt`.
    """
    if last:
        return correct.float(), halt
    return correct.float(), torch.where(correct, halt, torch.sigmoid(proceed)).detach()


def simple_loss(
    config: HRMConfig,
    weights: Weights,
    ops: Ops,
    tokens: Tensor,
    targets: Tensor,
    carry: Carry | None = None,
    cycles: str | Sequence[int] = hrm.NORMAL,
) -> tuple[Tensor, Carry]:
    """Cross-entropy after a single segment, over positions whose target is not 0: float32 (), and the next carry.

    tokens and targets int64 [B, T]. `carry` holds the states that the batch before ended with; None starts afresh.
    Batches that follow each other must have the same shape. The halting head takes no part.
    """
    inputs, high, low = hrm.begin(config, weights, ops, tokens)
    if carry is not None:
        high, low = carry.high, carry.low
    high, low = hrm.segment(config, weights, ops, inputs, high, low, hrm.parse_cycles(cycles))
    scores = hrm.logits(config, weights, ops, high.flatten(0, 1))
    loss = functional.cross_entropy(scores, targets.flatten(), ignore_index=PADDING)
    return loss, Carry(high.detach(), low.detach())
