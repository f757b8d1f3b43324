"""Operations that are made of others, as models want them together; a backend may make one in a single go."""

from collections.abc import Sequence

import torch
from torch import Tensor

from thl_engine.weights import Adapted, Held, Matrix


class Compositions:
    """Part of every backend's ops, in terms of the rest."""

    def low_rank(self, x: Tensor, matrix: Adapted) -> Tensor:
        """What an adapter adds to the product of its base."""
        return self.linear(self.linear(x, matrix.down).mul_(matrix.scale), matrix.up)

    def linear_joined(self, places: Sequence[Tensor], matrix: Matrix, bias: Tensor | None = None) -> Tensor:
        """`linear` of activations [B, C_i] that lie in several places, side by side."""
        return self.linear(torch.cat(places, dim=-1), matrix, bias)

    def gru_cell(self, update: tuple[Matrix, Tensor], reset: tuple[Matrix, Tensor], candidate: tuple[Matrix, Tensor],
                 state: Tensor, below: Tensor, context: Tensor, addend: Tensor | None = None) -> Tensor:
        """The next state [B, d] of a GRU that sees state, below and context + addend; its weights with their biases."""
        if addend is not None:
            context = context + addend
        inputs = torch.cat([state, below, context], dim=-1)
        z, r = self.linear(inputs, *update), self.linear(inputs, *reset)
        inputs = torch.cat([self.gru_reset(r, state), below, context], dim=-1)
        return self.gru_update(z, self.linear(inputs, *candidate), state)

    def window_read(self, query: Tensor, buffer: Tensor, valid: int | Tensor, entry: Tensor,
                    scale: float) -> tuple[Tensor, Tensor]:
        """`window_mix` of the first `valid` entries, at most all, and the buffer after `window_append` of a new one."""
        valid = min(valid, buffer.shape[1])
        mixed = self.window_mix(query, buffer, valid, scale)
        return mixed, self.window_append(buffer, valid, entry)[0]

    def geglu_linears(self, x: Tensor, gate: Matrix | Adapted, up: Matrix | Adapted) -> Tensor:
        """`geglu` of x through both matrices."""
        return self.geglu(*self.linears(x, [gate, up]))

    def geglu_sparse(self, gate: Tensor, x: Tensor, up: Matrix | Adapted, down: Matrix | Adapted,
                     quantile: float) -> Tensor:
        """`linear_sparse` of `geglu_linear`: a whole feed-forward layer but for its gate."""
        return self.linear_sparse(self.geglu_linear(gate, x, up, quantile), down)

    def rms_norm_add(self, x: Tensor, weight: Tensor | None, eps: float, addend: Tensor, second: Tensor | None = None,
                     scale: float = 1.0) -> Tensor:
        """(addend + `rms_norm` of x + second) * scale, all [..., D]."""
        total = addend + self.rms_norm(x, weight, eps)
        if second is not None:
            total = total + second
        return total if scale == 1.0 else total * scale

    def altup_coefficients(self, x: Tensor, weight: Tensor, eps: float, router: Tensor, matrix: Tensor,
                           offset: float = 0.0) -> Tensor:
        """AltUp's coefficients [..., m] for x [..., D]: matrix [m, n] times the tanh of router [n, D] times `rms_norm`
        of x over D, plus offset."""
        routed = self.linear(self.rms_norm(x, weight, eps) / x.shape[-1], Held(router))
        out = self.linear(torch.tanh(routed), Held(matrix))
        return out + offset if offset else out

    def altup_spread(self, streams: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Streams [n, ..., D] with `rms_norm` of x [..., D] added to all but the first."""
        return torch.cat([streams[:1], streams[1:] + self.rms_norm(x, weight, eps)])
