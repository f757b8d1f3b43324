"""Where, when and how a report was measured, written beside its figures."""

import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def write_report(path: Path, arguments: list[str], **figures: Any) -> None:
    """Writes the figures as JSON, with machine, date, commit and the command with its arguments."""
    import torch  # here, since the rest also serves where the package is yet to be built

    from thl_engine.files import replacing
    from thl_engine.ops import native

    processor = f"{_processor()}, {native.isa()}, {native.threads()} threads, torch {torch.__version__}"
    head = {
        "machine": processor,
        "date": date.today().isoformat(),
        "commit": commit(),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments]),
    }
    data = (json.dumps({**head, **figures}, indent=1) + "\n").encode()
    with replacing(path, len(data)) as descriptor:
        os.write(descriptor, data)


def rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def commit() -> str | None:
    """Of the working tree; None outside of a repository."""
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
