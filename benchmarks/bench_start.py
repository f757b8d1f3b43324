"""What the commands cost before they do anything: CPU seconds of a process each, beside `import torch` alone.

    python benchmarks/bench_start.py --json benchmarks/results/start.json

User and system time, all threads, median of the rounds. Each round runs every command once, so that whatever else the
machine does in the meantime touches all of them alike.
"""

import argparse
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from record import ROOT, rounded, write_report

from thl_engine.cli.options import COMMANDS

MODEL = "examples/shakespeare.safetensors"
GIVEN = ("--disk-bandwidth", "2", "--memory-bandwidth", "20")
LIMIT = 0.3  # seconds, of what answers without torch
CLI = "import sys; from thl_engine.cli import main; sys.exit(main())"  # what the installed `thl` does


def cases() -> dict[str, list[str]]:
    """Arguments of the Python that runs each case, by what a person types."""
    commands = [
        ["--version"],
        ["--help"],
        *([name, "--help"] for name in COMMANDS),
        ["inspect", MODEL],
        ["plan", MODEL, *GIVEN],
        ["plan", MODEL],
    ]
    return {
        "python -c pass": ["-c", "pass"],
        "python -c 'import torch'": ["-c", "import torch"],
        "python -c 'import thl_engine'": ["-c", "import thl_engine"],
        **{" ".join(["thl", *command]): ["-c", CLI, *command] for command in commands},
    }


def cpu_seconds(arguments: list[str]) -> float:
    """User and system time of a Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="processes of each (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the report")
    given = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(given)
    seconds: dict[str, list[float]] = {name: [] for name in cases()}
    for _ in range(arguments.rounds):
        for name, command in cases().items():
            seconds[name].append(cpu_seconds(command))
    found = {name: rounded(statistics.median(values)) for name, values in seconds.items()}
    torch = found["python -c 'import torch'"]
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value:.3f} s  {value / torch:5.2f} of torch's import")
    if arguments.json:
        write_report(arguments.json, given, rounds=arguments.rounds, **{"CPU seconds": found})
    slow = [name for name, value in found.items() if value > LIMIT and "torch" not in name and MODEL not in name]
    if slow:
        sys.exit(f"over {LIMIT} s: {', '.join(slow)}")


if __name__ == "__main__":
    main()
