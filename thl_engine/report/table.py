"""Tables of a report: lines of a name and what is said of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from thl_engine.memory import size


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of the same number of cells as lines with aligned columns, without trailing spaces."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def on_device(found: Mapping[str, Any]) -> str:
    """An engine's memory on its device, and what lies beside it, for people."""
    kept = (
        ""
        if found["memory_budget"] is None
        else ", the budget enforced"
        if found["budget_enforced"]
        else (", the budget planned but not enforced")
    )
    return (
        f"{size(found['peak_device_bytes'])}{kept}; besides it {size(found['device_bytes_besides'])} of the CUDA "
        "context, kernels and other programs"
    )
