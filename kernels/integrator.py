"""INL's integrator: a position and a velocity per feature, moved by a controller that sees both and a fixed context.

Source: INL-LLM V2 2.0.0. One step of a row, with [a; b] joined along features:

    alpha, beta, gate = sigmoid, softplus, sigmoid of the thirds of W2 relu(W1 [context; x; v] + b1) + b2
    v' = alpha * v - beta * (x - mu)
    x' = x + DT * gate * v'

The same two matrices serve every step, so an implementation reads them once and keeps them close. W1 context does not
change between steps either: it is computed once.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

DT = 0.1  # of the language model
FIRST_CHECK = 3  # steps, counted from 0, before the first test for convergence


class Integration(NamedTuple):
    """Where the rows ended.

    x, v [N, D]; iterations int64 [N]: steps until a row converged, that one included; steps: those made, () on a
    device where the host does not know.
    x_trajectory, v_trajectory [N, steps + 1, D] from the start on, where they were asked for.
    """

    x: Tensor
    v: Tensor
    iterations: Tensor
    steps: int | Tensor
    x_trajectory: Tensor | None = None
    v_trajectory: Tensor | None = None


def spread(mu: Tensor, group: int, width: int) -> Tensor:
    """mu [ceil(width / group)] for each of the features: [width]."""
    return mu[:, None].expand(-1, group).flatten()[:width]


def integrate(
    x: Tensor,
    context: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    mu: Tensor,
    *,
    steps: int,
    threshold: float | None = None,
    together: bool = False,
    trajectory: bool = False,
    group: int = 1,
) -> Integration:
    """Up to `steps` steps from x [N, D] at rest.

    context [N, D]; w1 [C, 3 D], b1 [C], w2 [3 D, C], b2 [3 D] of the controller; mu [ceil(D / group)], the equilibrium,
    the same for runs of `group` features.
    A row has converged when a step moves it by less than `threshold` (Euclidean norm), tested from step FIRST_CHECK on
    and never taken back; None makes all steps. A converged row stops there. With `together`, as published, all rows go
    on until the last one has converged, which makes a row depend on the others.
    """
    width = x.shape[1]
    mu = spread(mu, group, width)
    start = functional.linear(context, w1[:, :width], b1)
    moving = w1[:, width:]
    v = torch.zeros_like(x)
    iterations = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    converged = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    xs, vs, made = [x], [v], 0
    for t in range(steps):
        hidden = torch.relu(start + functional.linear(torch.cat([x, v], dim=-1), moving))
        alpha, beta, gate = functional.linear(hidden, w2, b2).chunk(3, dim=-1)
        next_v = torch.sigmoid(alpha) * v - functional.softplus(beta) * (x - mu)
        next_x = x + DT * torch.sigmoid(gate) * next_v
        iterations += ~converged
        made = t + 1
        before = converged
        if threshold is not None and t >= FIRST_CHECK:
            converged = converged | (torch.linalg.vector_norm(next_x - x, dim=-1) < threshold)
        if together or threshold is None:
            x, v = next_x, next_v
        else:
            x, v = torch.where(before[:, None], x, next_x), torch.where(before[:, None], v, next_v)
        if trajectory:
            xs.append(x)
            vs.append(v)
        if threshold is not None and t >= FIRST_CHECK and bool(converged.all()):
            break
    if not trajectory:
        return Integration(x, v, iterations, made)
    return Integration(x, v, iterations, made, torch.stack(xs, dim=1), torch.stack(vs, dim=1))
