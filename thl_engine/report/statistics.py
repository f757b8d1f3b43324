"""What an engine did, as text: speed, traffic and memory."""

from collections.abc import Mapping, Sequence
from typing import Any

from thl_engine.engine.engine import Engine
from thl_engine.memory import size
from thl_engine.ops.backends import isa, threads
from thl_engine.report.table import on_device, table


def backend(engine: Engine) -> str:
    """What computes, for people."""
    kind = isa(engine.ops)
    return f"backend {engine.ops.name}{f' ({kind})' if kind else ''} on {engine.device}, {threads(engine.ops)} threads"


def describe(stats: Mapping[str, Any], effort: Sequence[tuple[str, str]] = ()) -> str:
    """`Engine.stats()` for people, with `Written.timing()` where it is among them.

    effort: rows that tell how hard the model worked, as `Effort.rows` gives them.
    """
    uses = stats["page_hits"] + stats["page_misses"]
    budget = "none" if stats["memory_budget"] is None else size(stats["memory_budget"])
    rows = []
    if "new_tokens" in stats:
        speed = stats["decode_tokens_per_second"]
        rows += [
            ("prompt", f"{stats['prompt_tokens']} tokens, {stats['prompt_tokens_per_second']:.1f} tokens/s"),
            ("written", f"{stats['new_tokens']} tokens, {f'{speed:.1f} tokens/s' if speed else 'no step timed'}"),
        ]
    rows += effort
    rows += [
        ("bytes streamed", f"{size(stats['bytes_streamed'])}, and {size(stats['bytes_gathered'])} of table rows"),
        ("waited for pages", f"{stats['stall_seconds']:.2f} s of {stats['seconds']:.2f} s"),
        ("pages", f"{stats['page_hits']} of {uses} uses found in memory, {stats['page_misses']} read"),
        (
            "peak memory",
            f"{size(stats['peak_memory_bytes'])} planned of budget {budget}, "
            f"{size(stats['peak_rss_bytes'])} of the whole process",
        ),
    ]
    if stats["sliding_window"]:
        rows.append(
            ("attention", f"sees the last {stats['sliding_window']} tokens; those further back are no longer seen")
        )
    if stats["peak_device_bytes"]:
        rows.append(("on the device", on_device(stats)))
    return table(rows)
