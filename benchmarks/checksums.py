"""What `verify="always"` (`--checksums always`) costs: streamed steps with it and without, taking turns.

Each round makes some steps with an engine that compares every page with its checksum at every read, then as many with
one that compares it the first time alone, the same tokens, and the next round the other way about. Logits have to be
the same bits. Wall time says what is waited for: sums are made on a thread of their own while other pages are read.
Processor time says what they cost where nothing else has to wait.

    python benchmarks/checksums.py --out benchmarks/results/checksums.json
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from record import ROOT, rounded, write_report

from thl_engine import Engine
from thl_engine.checkpoint.checksum import crc32c
from thl_engine.checkpoint.convert import init_checkpoint

SIZES = dict(vocab_size=4096, embedding_dim=2048, num_tiers=2, tier_dims=[3072, 3072], tier_timescales=[1, 1])
SIZES |= dict(memory_slots=64, memory_dim=1024, value_dim=2048, local_window=16)
KINDS = ("first", "always")


def measure(model: Path, budget: str, rounds: int, steps: int) -> dict[str, object]:
    """Medians over rounds, and the ratios of the two halves of a round."""
    engines = {kind: Engine.from_pretrained(model, stream=True, memory_budget=budget, verify=kind) for kind in KINDS}
    states = {kind: engines[kind].new_state() for kind in KINDS}
    wall: dict[str, list[float]] = {kind: [] for kind in KINDS}
    cpu: dict[str, list[float]] = {kind: [] for kind in KINDS}
    logits: dict[str, torch.Tensor] = {}
    for number in range(-1, rounds):  # the first does not count: it verifies in both
        for kind in KINDS if number % 2 else KINDS[::-1]:
            started = time.perf_counter(), time.process_time()
            for token in range(steps):
                logits[kind], states[kind] = engines[kind].step(torch.tensor([token]), states[kind])
            if number >= 0:
                wall[kind].append((time.perf_counter() - started[0]) / steps)
                cpu[kind].append((time.process_time() - started[1]) / steps)
        if not torch.equal(*logits.values()):
            sys.exit("logits differ")
    plan = engines["first"].plan()
    streamed = plan.bytes_streamed_per_token
    for engine in engines.values():
        engine.close()
    more = statistics.median(cpu["always"]) - statistics.median(cpu["first"])
    return {
        "model bytes": model.stat().st_size,
        "budget": budget,
        "bytes streamed a token": round(streamed),
        "milliseconds a step": {kind: rounded(1e3 * statistics.median(wall[kind])) for kind in KINDS},
        "wall time, always / first": _spread(wall),
        "processor time, always / first": _spread(cpu),
        "bytes a second of processor time more": rounded(streamed / more) if more > 0 else None,
    }


def _spread(seconds: dict[str, list[float]]) -> dict[str, float]:
    ratios = sorted(a / f for a, f in zip(seconds["always"], seconds["first"], strict=True))
    return {"median": rounded(statistics.median(ratios)), "least": rounded(ratios[0]), "most": rounded(ratios[-1])}


def sums_a_second() -> float:
    """Bytes of memory that one thread sums a second, the most of several tries."""
    data = torch.zeros(64 << 20, dtype=torch.uint8).numpy()
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        crc32c(data)
        best = max(best, len(data) / (time.perf_counter() - started))
    return best


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, metavar="N", help="pairs of each (default: %(default)s)")
    parser.add_argument("--beside", default="nothing", metavar="WHAT", help="what else ran (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the report")
    given = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(given)
    found: dict[str, object] = {"CRC-32C of memory, bytes a second": rounded(sums_a_second())}
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:  # on a disk, where /tmp may be memory
        large = Path(folder, "large.safetensors")
        init_checkpoint("thl", SIZES, large, quantize="int8")
        found["THL, int8"] = measure(large, "128MiB", arguments.rounds, steps=4)
        found["bundled model"] = measure(ROOT / "examples/shakespeare.safetensors", "2MiB", arguments.rounds, steps=100)
    for name, figures in found.items():
        print(name, figures)
    if arguments.out:
        write_report(arguments.out, given, rounds=arguments.rounds, beside=arguments.beside, **found)


if __name__ == "__main__":
    main()
