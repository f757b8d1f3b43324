"""Integrators that INL-LLM V2 2.0.0 publishes beside its language model, each with its own weights.

A module is a frozen set of options. `blocks()` names its tensors as published; a step takes the weights by those names
and the ops, like a model. Rows: N; context h [N, hidden_dim]; position x and velocity v [N, output_dim].
Options that only choose initial weights (target_value, init_beta, learnable_mu, ...) have no part here.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from thl_engine.models.contract import Ops, Weights
from thl_engine.schedule import Block

CONTROLLER = 64  # hidden features of a two-layer controller, in the language model too


class Control(NamedTuple):
    """What a controller sets for a step, each [N, output_dim]; candidate is None where there is none."""

    alpha: Tensor
    beta: Tensor
    gate: Tensor
    candidate: Tensor | None = None


@dataclass(frozen=True)
class SharedController:
    """One controller for all layers of a model, with a scale and a shift of each output for each layer."""

    hidden_dim: int
    output_dim: int
    num_layers: int
    hidden_controller: int = CONTROLLER

    def blocks(self) -> tuple[Block, ...]:
        """The module's tensors."""
        layers = (self.num_layers, 4)
        return (
            *_summed_blocks(self.hidden_dim, self.output_dim, self.hidden_controller),
            Block("layer_scalers", layers, "vector"),
            Block("layer_biases", layers, "vector"),
        )

    def control(self, weights: Weights, ops: Ops, h: Tensor, x: Tensor, v: Tensor, layer: int) -> Control:
        """What the controller sets in one layer, counted from 0."""
        scales, shifts = weights["layer_scalers"][layer], weights["layer_biases"][layer]
        alpha, beta, gate, candidate = (
            part * scales[k] + shifts[k] for k, part in enumerate(_summed(weights, ops, "", h, x, v).chunk(4, dim=-1))
        )
        return Control(torch.sigmoid(alpha), functional.softplus(beta), torch.sigmoid(gate), candidate)


@dataclass(frozen=True)
class SparseHarmonicINL:
    """An integrator of which, in training, a few features are driven by sines."""

    hidden_dim: int
    output_dim: int
    sparsity: float = 0.1
    dt: float = 0.1

    def blocks(self) -> tuple[Block, ...]:
        """The module's tensors; `excited_indices` holds whole numbers."""
        driven = (max(1, int(self.output_dim * self.sparsity)),)
        return (
            Block("mu", (self.output_dim,), "vector"),
            *_stacked_blocks("controller.", self.hidden_dim, self.output_dim),
            Block("excited_indices", driven, "vector"),
            Block("excitation_amplitude", (), "vector"),
            Block("excitation_gamma", driven, "vector"),
            Block("excitation_phi", driven, "vector"),
        )

    def control(self, weights: Weights, ops: Ops, h: Tensor, x: Tensor, v: Tensor) -> Control:
        """What the controller sets."""
        return _stacked(weights, ops, "controller.", h, x, v)

    def step(
        self, weights: Weights, ops: Ops, h: Tensor, x: Tensor, v: Tensor, t: int, training: bool = False
    ) -> tuple[Tensor, Tensor]:
        """x and v after step `t`, counted from 0."""
        alpha, beta, gate, _ = self.control(weights, ops, h, x, v)
        v = alpha * v - beta * (x - weights["mu"])
        if training and weights["excitation_amplitude"] > 0:
            v = v.index_add(-1, weights["excited_indices"].long(), _excitation(weights, "", t).expand(len(v), -1))
        return x + self.dt * gate * v, v


@dataclass(frozen=True)
class MixtureOfIntegrators:
    """A few of several controllers step each row, chosen and weighted by its context."""

    hidden_dim: int
    output_dim: int
    num_experts: int = 4
    top_k: int = 2
    dt: float = 0.1

    def blocks(self) -> tuple[Block, ...]:
        """The module's tensors."""
        experts = [
            block
            for e in range(self.num_experts)
            for block in _stacked_blocks(f"expert_controllers.{e}.", self.hidden_dim, self.output_dim)
        ]
        return (
            Block("mu", (self.output_dim,), "vector"),
            Block("router.weight", (self.num_experts, self.hidden_dim), "matrix"),
            Block("router.bias", (self.num_experts,), "vector"),
            *experts,
        )

    def route(self, weights: Weights, ops: Ops, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(probabilities [N, experts], experts chosen int64 [N, top_k], their weights [N, top_k], which sum to 1)."""
        probabilities = torch.softmax(ops.linear(h, weights["router.weight"], weights["router.bias"]), dim=-1)
        chosen, experts = probabilities.topk(self.top_k, dim=-1)
        return probabilities, experts, chosen / chosen.sum(dim=-1, keepdim=True)

    def step(self, weights: Weights, ops: Ops, h: Tensor, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """x and v after a step. An expert computes only the rows that chose it."""
        _, experts, shares = self.route(weights, ops, h)
        next_x, next_v = torch.zeros_like(x), torch.zeros_like(v)
        for e in range(self.num_experts):
            rows, place = (experts == e).nonzero(as_tuple=True)
            if not len(rows):
                continue
            alpha, beta, gate, _ = _stacked(weights, ops, f"expert_controllers.{e}.", h[rows], x[rows], v[rows])
            moved = alpha * v[rows] - beta * (x[rows] - weights["mu"])
            share = shares[rows, place, None]
            next_v = next_v.index_add(0, rows, share * moved)
            next_x = next_x.index_add(0, rows, share * (x[rows] + self.dt * gate * moved))
        return next_x, next_v


@dataclass(frozen=True)
class IntegratorNeuronLayer:
    """The core layer: a damped pull to mu with a velocity that the controller proposes.

    dynamic_alpha: alpha decays with the row's distance from mu, at the rate alpha_kappa.
    """

    hidden_dim: int
    output_dim: int
    dt: float = 0.1
    hidden_controller: int = CONTROLLER
    velocity_scale: float = 1.0
    dynamic_alpha: bool = True
    alpha_kappa: float = 1.0

    def blocks(self) -> tuple[Block, ...]:
        """The module's tensors."""
        width = (self.output_dim,)
        return (
            *_summed_blocks(self.hidden_dim, self.output_dim, self.hidden_controller),
            Block("mu", width, "vector"),
            Block("excitation_amplitude", (), "vector"),
            Block("excitation_gamma", width, "vector"),
            Block("excitation_phi", width, "vector"),
        )

    def start(self, weights: Weights, rows: int) -> tuple[Tensor, Tensor]:
        """x and v before the first step: at mu, at rest."""
        mu = weights["mu"]
        return mu.expand(rows, -1).clone(), mu.new_zeros(rows, self.output_dim)

    def control(self, weights: Weights, ops: Ops, h: Tensor, x: Tensor, v: Tensor) -> Control:
        """What the controller sets, alpha before it decays with the distance from mu."""
        alpha, beta, gate, candidate = _summed(weights, ops, "", h, x, v).chunk(4, dim=-1)
        return Control(torch.sigmoid(alpha), functional.softplus(beta), torch.sigmoid(gate), candidate)

    def damping(self, alpha: Tensor, error: Tensor) -> Tensor:
        """Alpha as the step uses it: one factor for each row where it is dynamic."""
        if not self.dynamic_alpha:
            return alpha
        return alpha * torch.exp(-self.alpha_kappa * torch.linalg.vector_norm(error, dim=-1, keepdim=True))

    def step(self, weights: Weights, ops: Ops, h: Tensor, x: Tensor, v: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """x and v after step `t`, counted from 0."""
        base, beta, gate, candidate = self.control(weights, ops, h, x, v)
        error = x - weights["mu"]
        alpha = self.damping(base, error)
        assert candidate is not None  # this module's controller has one
        v = alpha * v + (1.0 - alpha) * candidate - beta * error
        if weights["excitation_amplitude"] > 0:
            v = v + _excitation(weights, "", t)
        return x + self.dt * self.velocity_scale * gate * v, v


class Adapted(NamedTuple):
    """Where the rows of an AdaptiveIntegratorNeuronLayer ended.

    x, v [N, D]; iterations int64 [N]; converged bool [N]; trajectories [N, steps + 1, D]; the counters afterwards.
    """

    x: Tensor
    v: Tensor
    iterations: Tensor
    converged: Tensor
    x_trajectory: Tensor
    v_trajectory: Tensor
    avg_iterations: Tensor
    num_forwards: Tensor


@dataclass(frozen=True)
class AdaptiveIntegratorNeuronLayer:
    """An IntegratorNeuronLayer that stops once every row was within the threshold of mu before a tested step."""

    layer: IntegratorNeuronLayer
    convergence_threshold: float = 0.01
    min_iterations: int = 3
    max_iterations: int = 10
    check_interval: int = 1

    def blocks(self) -> tuple[Block, ...]:
        """The module's tensors; `num_forwards` holds a whole number."""
        inner = tuple(Block(f"inl.{block.name}", block.shape, block.kind) for block in self.layer.blocks())
        return *inner, Block("avg_iterations", (), "vector"), Block("num_forwards", (), "vector")

    def run(self, weights: Weights, ops: Ops, h: Tensor, stopping: bool = True) -> Adapted:
        """From mu at rest until all rows have converged, or max_iterations."""
        own = {block.name: weights[f"inl.{block.name}"] for block in self.layer.blocks()}
        x, v = self.layer.start(own, len(h))
        iterations = torch.zeros(len(h), dtype=torch.int64, device=h.device)
        converged = torch.zeros(len(h), dtype=torch.bool, device=h.device)
        xs, vs = [x], [v]
        for t in range(self.max_iterations):
            distance = torch.linalg.vector_norm(x - own["mu"], dim=-1)
            x, v = self.layer.step(own, ops, h, x, v, t)
            xs.append(x)
            vs.append(v)
            iterations += ~converged
            if stopping and t >= self.min_iterations and t % self.check_interval == 0:
                converged = converged | (distance < self.convergence_threshold)
                if bool(converged.all()):
                    break
        average = 0.99 * weights["avg_iterations"] + 0.01 * iterations.float().mean()
        return Adapted(
            x,
            v,
            iterations,
            converged,
            torch.stack(xs, dim=1),
            torch.stack(vs, dim=1),
            average,
            weights["num_forwards"] + 1,
        )


def _linear_blocks(name: str, outputs: int, inputs: int) -> tuple[Block, Block]:
    return Block(f"{name}.weight", (outputs, inputs), "matrix"), Block(f"{name}.bias", (outputs,), "vector")


def _summed_blocks(hidden_dim: int, output_dim: int, controller: int) -> tuple[Block, ...]:
    return (
        *_linear_blocks("controller_h", controller, hidden_dim),
        *_linear_blocks("controller_x", controller, output_dim),
        *_linear_blocks("controller_v", controller, output_dim),
        *_linear_blocks("controller_mlp.1", 4 * output_dim, controller),
    )


def _summed(weights: Weights, ops: Ops, prefix: str, h: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """Raw outputs [N, 4 output_dim] of a controller that adds its three inputs behind a product each."""

    def linear(name: str, value: Tensor) -> Tensor:
        return ops.linear(value, weights[f"{prefix}{name}.weight"], weights[f"{prefix}{name}.bias"])

    hidden = torch.relu(linear("controller_h", h) + linear("controller_x", x) + linear("controller_v", v))
    return linear("controller_mlp.1", hidden)


def _stacked_blocks(prefix: str, hidden_dim: int, output_dim: int) -> tuple[Block, ...]:
    return (
        *_linear_blocks(f"{prefix}0", CONTROLLER, hidden_dim + 2 * output_dim),
        *_linear_blocks(f"{prefix}2", 3 * output_dim, CONTROLLER),
    )


def _stacked(weights: Weights, ops: Ops, prefix: str, h: Tensor, x: Tensor, v: Tensor) -> Control:
    """A controller that joins its three inputs."""
    hidden = ops.linear(torch.cat([h, x, v], dim=-1), weights[f"{prefix}0.weight"], weights[f"{prefix}0.bias"])
    alpha, beta, gate = ops.linear(torch.relu(hidden), weights[f"{prefix}2.weight"], weights[f"{prefix}2.bias"]).chunk(
        3, dim=-1
    )
    return Control(torch.sigmoid(alpha), functional.softplus(beta), torch.sigmoid(gate))


def _excitation(weights: Weights, prefix: str, t: int) -> Tensor:
    """A sine for each driven feature at step `t`."""
    amplitude: Tensor = weights[f"{prefix}excitation_amplitude"]
    return amplitude * torch.sin(weights[f"{prefix}excitation_gamma"] * t + weights[f"{prefix}excitation_phi"])
