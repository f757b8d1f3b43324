"""Intermediates of steps, for plots and for tests."""

from torch import Tensor


class Trace:
    """Named intermediates of the steps made while it was open: `steps[i][name]` is a copy. `names`: None for all."""

    def __init__(self, names: frozenset[str] | None = None) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self._names = names

    def record(self, name: str, value: Tensor) -> None:
        """Notes a value of the current step."""
        if self._names is None or name in self._names:
            self.steps[-1][name] = value.detach().cpu().clone()
