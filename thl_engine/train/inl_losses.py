"""What INL trains towards: task, equilibrium, speed and energy, and the phases that weigh them (INL-LLM V2 2.0.0)."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from thl_engine.errors import ConfigError


@dataclass(frozen=True)
class Losses:
    """The parts of a loss and their sum, each a scalar. lambda_mean: the weight that went into `mean`."""

    total: Tensor
    task: Tensor
    mean: Tensor
    speed: Tensor
    energy: Tensor
    lambda_mean: float


@dataclass(frozen=True)
class IntegratorLoss:
    """Options of the loss, by their published names.

    energy_p: power of the velocity. task_loss_type: "ce" or "mse". annealing_schedule: "exponential" or "linear".
    """

    target_value: float = 0.0
    lambda_mean_init: float = 1.0
    lambda_speed: float = 0.1
    lambda_energy: float = 0.01
    energy_p: float = 2.0
    annealing_schedule: str = "exponential"
    annealing_factor: float = 0.1
    annealing_epochs: int = 100
    exploration_lambda_mean: float = 0.05
    exploration_lambda_energy: float = 0.001
    variance_weighted: bool = True
    task_loss_type: str = "ce"

    def __post_init__(self) -> None:
        _one_of("task_loss_type", self.task_loss_type, ("ce", "mse"))
        _one_of("annealing_schedule", self.annealing_schedule, ("exponential", "linear"))
        if self.annealing_epochs < 1:
            raise ConfigError(f"annealing_epochs is {self.annealing_epochs}; it must be at least 1")

    def lambda_mean(self, epoch: int, exploration: bool = False) -> float:
        """Weight of the equilibrium's part at an epoch, counted from 0."""
        if exploration:
            return self.exploration_lambda_mean
        done = min(epoch / self.annealing_epochs, 1.0)
        if self.annealing_schedule == "linear":
            return self.lambda_mean_init * (1.0 - done * (1.0 - self.annealing_factor))
        return float(self.lambda_mean_init * self.annealing_factor**done)

    def __call__(
        self,
        predictions: Tensor,
        targets: Tensor,
        x: Tensor,
        v: Tensor,
        epoch: int,
        exploration: bool = False,
        learned_mu: Tensor | None = None,
    ) -> Losses:
        """The loss at an epoch, counted from 0.

        predictions [N, V] and int64 targets [N] ("ce"), or two tensors alike ("mse"); trajectories x, v [M, T + 1, D].
        learned_mu [D] takes target_value's place in the equilibrium's part.
        """
        weight = self.lambda_mean(epoch, exploration)
        measure = functional.cross_entropy if self.task_loss_type == "ce" else functional.mse_loss
        task = measure(predictions, targets)
        mean = weight * self._distance(x[:, -1], self.target_value if learned_mu is None else learned_mu)
        steps = x.shape[1] - 1
        early = torch.softmax(-3.0 * torch.arange(1, steps + 1, device=x.device) / steps, dim=0)
        speed = self.lambda_speed * torch.einsum("t,ntd->nd", early, (x[:, 1:] - self.target_value).abs()).mean()
        cost = self.exploration_lambda_energy if exploration else self.lambda_energy
        energy = cost * v.abs().pow(self.energy_p).mean()
        return Losses(task + mean + speed + energy, task, mean, speed, energy, weight)

    def _distance(self, x: Tensor, target: Tensor | float) -> Tensor:
        """How far x [M, D] ended from its target; features that vary little across the rows count more."""
        if not self.variance_weighted:
            return (x.mean(dim=0) - target).square().mean()
        certainty = 1.0 / (1.0 + x.var(dim=0))
        certainty = certainty * (len(certainty) / certainty.sum())
        return (certainty * (x - target).square().mean(dim=0)).mean()


def convergence_metrics(x: Tensor, target: Tensor | float, epsilon: float) -> dict[str, float]:
    """How a trajectory x [N, T + 1, D] approaches its target: a scalar or [D].

    time_to_converge: mean over rows of the first step with all features within epsilon, or T where there is none.
    """
    steps, final = x.shape[1] - 1, x[:, -1]
    within = ((x[:, 1:] - target).abs() <= epsilon).all(dim=-1)
    first = torch.where(within.any(dim=1), within.int().argmax(dim=1) + 1, steps)
    return {
        "final_rmse": float((final - target).square().mean().sqrt()),
        "final_mean": float(final.mean()),
        "final_std": float(final.std()),
        "fraction_converged": float(((final - target).abs() <= epsilon).float().mean()),
        "time_to_converge": float(first.float().mean()),
    }


@dataclass(frozen=True)
class Phase:
    """What holds in a phase of training, for `duration_epochs` epochs."""

    lambda_mean: float
    excitation_amplitude: float
    duration_epochs: int


@dataclass(frozen=True)
class Segment:
    """A stretch of epochs [start_epoch, end_epoch) in one phase, "equilibrium" or "exploration"."""

    name: str
    phase: str
    start_epoch: int
    end_epoch: int


@dataclass(frozen=True)
class CycleSchedule:
    """A warm-up in equilibrium, then cycles of equilibrium and exploration; exploration ever after."""

    warmup_epochs: int
    num_cycles: int
    equilibrium_config: Phase
    exploration_config: Phase

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The stretches in order."""
        out = [Segment("warmup", "equilibrium", 0, self.warmup_epochs)]
        for cycle in range(self.num_cycles):
            for phase in ("equilibrium", "exploration"):
                start = out[-1].end_epoch
                out.append(Segment(f"cycle_{cycle}_{phase}", phase, start, start + self._of(phase).duration_epochs))
        return tuple(out)

    @property
    def total_epochs(self) -> int:
        """Epochs until the last cycle has ended."""
        return self.segments[-1].end_epoch

    def phase(self, epoch: int) -> tuple[str, Phase]:
        """The phase of an epoch, counted from 0: its name and what holds in it."""
        name = next((s.phase for s in self.segments if s.start_epoch <= epoch < s.end_epoch), "exploration")
        return name, self._of(name)

    def _of(self, phase: str) -> Phase:
        return self.equilibrium_config if phase == "equilibrium" else self.exploration_config


CYCLES: dict[str, CycleSchedule] = {
    "conservative": CycleSchedule(20, 4, Phase(0.8, 0.0, 15), Phase(0.1, 0.02, 15)),
    "balanced": CycleSchedule(10, 5, Phase(0.5, 0.0, 10), Phase(0.05, 0.05, 20)),
    "aggressive": CycleSchedule(5, 6, Phase(0.3, 0.0, 5), Phase(0.01, 0.08, 25)),
}


def cycle_schedule(preset: str = "balanced", overrides: Mapping[str, Any] | None = None) -> CycleSchedule:
    """A preset with other values in places; `equilibrium_config` and `exploration_config` may name single fields."""
    _one_of("preset", preset, tuple(CYCLES))
    schedule, changed = CYCLES[preset], {}
    for name, value in (overrides or {}).items():
        _one_of("override", name, tuple(field.name for field in fields(CycleSchedule)))
        if isinstance(value, Mapping):
            for key in value:
                _one_of(name, key, tuple(field.name for field in fields(Phase)))
            value = replace(getattr(schedule, name), **value)
        changed[name] = value
    return replace(schedule, **changed)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
