"""What every backend's ops have, as far as other operations are made of it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor

from thl_engine.ops.weights import Adapted, Matrix


class Products(ABC):
    """Declarations alone; `ReferenceOps` says what each of them does."""

    rms_norm: Callable[[Tensor, Tensor | None, float], Tensor]
    geglu: Callable[..., Tensor]
    gru_reset: Callable[[Tensor, Tensor], Tensor]

    @abstractmethod
    def linear(
        self,
        x: Tensor,
        matrix: Matrix | Adapted,
        bias: Tensor | None = None,
        *,
        norm: tuple[Tensor, Tensor] | None = None,
        gelu: bool = False,
        addend: Tensor | None = None,
    ) -> Tensor: ...

    @abstractmethod
    def linears(self, x: Tensor, matrices: Sequence[Matrix | Adapted]) -> list[Tensor]: ...

    @abstractmethod
    def linear_sparse(self, x: Tensor, matrix: Matrix | Adapted) -> Tensor: ...

    @abstractmethod
    def geglu_linear(self, gate: Tensor, x: Tensor, up: Matrix | Adapted, quantile: float) -> Tensor: ...

    @abstractmethod
    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor: ...
