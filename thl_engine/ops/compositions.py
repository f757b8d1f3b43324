"""Operations that are made of others, as models want them together; a backend may make one in a single go."""

import torch
from torch import Tensor

from thl_engine.ops.products import Products
from thl_engine.ops.weights import Adapted, Held, Matrix


class Compositions(Products):
    """Part of every backend's ops, in terms of the rest."""

    def low_rank(self, x: Tensor, matrix: Adapted) -> Tensor:
        """What an adapter adds to the product of its base."""
        return self.linear(self.linear(x, matrix.down).mul_(matrix.scale), matrix.up)

    def sigmoid_gate(self, gate: Tensor, x: Tensor) -> Tensor:
        """sigmoid(gate) * x, both [..., D]: what a GRU does with its state, and gated attention with its output."""
        width = x.shape[-1]
        return self.gru_reset(gate.reshape(-1, width), x.reshape(-1, width)).view(x.shape)

    def geglu_linears(self, x: Tensor, gate: Matrix | Adapted, up: Matrix | Adapted) -> Tensor:
        """`geglu` of x through both matrices."""
        return self.geglu(*self.linears(x, [gate, up]))

    def geglu_sparse(
        self, gate: Tensor, x: Tensor, up: Matrix | Adapted, down: Matrix | Adapted, quantile: float
    ) -> Tensor:
        """`linear_sparse` of `geglu_linear`: a whole feed-forward layer but for its gate."""
        return self.linear_sparse(self.geglu_linear(gate, x, up, quantile), down)

    def rms_norm_add(
        self,
        x: Tensor,
        weight: Tensor | None,
        eps: float,
        addend: Tensor,
        second: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """(addend + `rms_norm` of x + second) * scale, all [..., D]."""
        total = addend + self.rms_norm(x, weight, eps)
        if second is not None:
            total = total + second
        return total if scale == 1.0 else total * scale

    def altup_coefficients(
        self, x: Tensor, weight: Tensor, eps: float, router: Tensor, matrix: Tensor, offset: float = 0.0
    ) -> Tensor:
        """AltUp's coefficients [..., m] for x [..., D]: matrix [m, n] times the tanh of router [n, D] times `rms_norm`
        of x over D, plus offset."""
        routed = self.linear(self.rms_norm(x, weight, eps) / x.shape[-1], Held(router))
        out = self.linear(torch.tanh(routed), Held(matrix))
        return out + offset if offset else out

    def altup_spread(self, streams: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Streams [n, ..., D] with `rms_norm` of x [..., D] added to all but the first."""
        return torch.cat([streams[:1], streams[1:] + self.rms_norm(x, weight, eps)])
