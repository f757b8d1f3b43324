"""Intermediates of steps, for plots and for tests."""

from torch import Tensor


class Trace:
    """Named intermediates of the steps made while it was open: `steps[i][name]` is a copy. `names`: None for all."""

    def __init__(self, names: frozenset[str] | None = None) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self._names = names

    def values(self) -> dict[str, list[Tensor]]:
        """What was recorded under each name, in the order of the steps."""
        out: dict[str, list[Tensor]] = {}
        for step in self.steps:
            for name, value in step.items():
                out.setdefault(name, []).append(value)
        return out

    def record(self, name: str, value: Tensor) -> None:
        """Notes a value of the current step."""
        if self._names is None or name in self._names:
            self.steps[-1][name] = value.detach().cpu().clone()
