"""Operations of the triton backend on recurrent states: tier cells, the window of recent inputs, the slot memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from thl_engine.kernels.norm import LAYER_NORM_EPS
from thl_engine.kernels.triton import elementwise, novelty_write, slot_read, tier_cell, window_attention
from thl_engine.kernels.triton.linear import FEW_ROWS, Weights
from thl_engine.ops.triton_products import TritonProducts
from thl_engine.ops.weights import Matrix, Part


class TritonState(TritonProducts):
    """State tensors are updated in place. Uses of matrices go through `each_part`."""

    gru_reset = staticmethod(elementwise.gru_reset)
    gru_update = staticmethod(elementwise.gru_update)
    slot_norms = staticmethod(novelty_write.slot_norms)
    slot_read = staticmethod(slot_read.slot_read)
    novelty_write = staticmethod(novelty_write.novelty_write)
    window_read = staticmethod(window_attention.window_read)

    def linear_joined(self, places: Sequence[Tensor], matrix: Matrix, bias: Tensor | None = None) -> Tensor:
        if len(places) > tier_cell.PLACES or len(places[0]) > FEW_ROWS:
            return super().linear_joined(places, matrix, bias)
        out = places[0].new_empty(len(places[0]), matrix.shape[0])
        self._joined(places, matrix, bias, out)
        return out

    def layer_norm_joined(self, places: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
        if len(places) > tier_cell.PLACES:
            return super().layer_norm_joined(places, weight, bias)
        return tier_cell.joined_layer_norm(places, weight, bias, LAYER_NORM_EPS)

    def gru_cell(
        self,
        update: tuple[Matrix, Tensor],
        reset: tuple[Matrix, Tensor],
        candidate: tuple[Matrix, Tensor],
        state: Tensor,
        below: Tensor,
        context: Tensor,
        addend: Tensor | None = None,
    ) -> Tensor:
        if len(state) > FEW_ROWS:
            return super().gru_cell(update, reset, candidate, state, below, context, addend)
        z, kept = (torch.empty(state.shape, device=state.device) for _ in range(2))
        self._joined((state, below, context), *update, z, addend, gate="update")
        self._joined((state, below, context), *reset, kept, addend, gate="reset", state=state)
        self._joined((kept, below, context), *candidate, state, addend, gate="candidate", update=z, state=state)
        return state

    def _joined(
        self,
        places: Sequence[Tensor],
        matrix: Matrix,
        bias: Tensor | None,
        out: Tensor,
        addend: Tensor | None = None,
        gate: str | None = None,
        **gated: Tensor,
    ) -> None:
        def use(part: Part) -> None:
            rows = slice(part.start, part.stop)
            weights = Weights(part.data, part.scales, part.group)
            tier_cell.joined_linear(
                places,
                weights,
                None if bias is None else bias[rows],
                out[:, rows],
                addend=addend,
                gate=gate,
                **{name: x[:, rows] for name, x in gated.items()},
            )

        self.each_part(matrix, use)
