"""A long run: memory, descriptors and threads of the process while tokens, engines and generations come and go.

    python benchmarks/soak.py [--out FILE] [--share PERCENT] [NAME ...]

A million tokens, 5,000 openings and 2,000 generations by the bundled model, each part in a process of its own with one
thread. After a tenth of a part as warm-up memory may grow by 1 % and the rest not at all; results are compared at the
end with those of the beginning, or with another way to them. Ten minutes of one core; --share 1 does a hundredth.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from record import ROOT, commit, rounded, write_report

MODEL = ROOT / "examples" / "shakespeare.safetensors"
BUDGET = "2MiB"  # of which half is pinned, so that every token reads pages
ALLOWED = 0.01  # growth of memory after the warm-up
SAMPLES = 50
PROMPTS = ("ROMEO:", "First Citizen:\nBefore we proceed", "É", "KING RICHARD III:\n" * 5)
Work = Callable[[int], None]


def engine(**options: Any) -> Any:
    from thl_engine import Engine

    return Engine.from_pretrained(options.pop("path", MODEL), device="cpu", threads=1, **options)


def tokens(sequences: int = 1, **options: Any) -> Iterator[Any]:
    """Steps, in contexts that are begun anew every 10,000 tokens. The last context is read once more, by a resident
    engine: the same bits."""
    import torch

    model, length = engine(**options), 10_000
    fed = torch.zeros(length, sequences, dtype=torch.int64)
    state, logits, count = None, None, 0

    def work(turn: int) -> None:
        nonlocal state, logits, count
        count = turn % length
        if not count:
            state, logits = model.new_state(sequences), torch.zeros(sequences, model.config.vocab_size)
        fed[count] = (logits.argmax(-1) + turn) % model.config.vocab_size
        logits, state = model.step(fed[count], state)

    yield work
    with engine() as other:
        again = other.new_state(sequences)
        for column in fed[: count + 1]:
            found, again = other.step(column, again)
        yield torch.equal(found, logits)


def openings(**options: Any) -> Iterator[Any]:
    """Engines that compute a step and are closed or, every other one, dropped."""
    import torch

    expected = None

    def logits(leave: bool) -> Any:
        opened = engine(**options)
        found, _ = opened.step(torch.tensor([7]), opened.new_state())
        if not leave:
            opened.close()
        return found

    def work(turn: int) -> None:
        nonlocal expected
        found = logits(bool(turn % 2))
        expected = found if expected is None else expected
        assert torch.equal(found, expected), "engines of one model differ"

    yield work
    yield expected is not None


def quantized(**options: Any) -> Iterator[Any]:
    """Openings of a float checkpoint that is quantised each time."""
    import tempfile

    from thl_engine.checkpoint.convert import init_checkpoint
    from thl_engine.checkpoint.store import open_store

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float.safetensors"
        config = open_store(MODEL).config.to_dict()
        init_checkpoint("thl", {**config, "vocab_size": 256, "tier_dims": [128, 64, 32]}, path)
        yield from openings(path=path, quantize="int8", **options)


def generations(**options: Any) -> Iterator[Any]:
    """Texts of 8 to 40 tokens, sampled or not; some are left in the middle, some go on with a stored context."""
    import tempfile

    model = engine(**options)

    def text(turn: int) -> str:
        sampling = {"temperature": turn % 3 / 2, "top_k": 20 if turn % 2 else None, "seed": turn}
        pieces = model.generate(PROMPTS[turn % len(PROMPTS)], max_new_tokens=8 + turn % 33, stop=["\n\n"], **sampling)
        return "".join(piece.text for piece in pieces)

    first = [text(turn) for turn in range(12)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "context.safetensors"

        def work(turn: int) -> None:
            text(turn)
            if turn % 10 == 0:
                left = model.generate("JULIET:", max_new_tokens=50, seed=turn)
                next(left), next(left)
            if turn % 10 == 5:
                state = model.new_state()
                list(model.generate("NURSE:", max_new_tokens=8, seed=turn, state=state))
                model.save_state(state, path)
                list(model.generate("x", max_new_tokens=8, seed=turn, state=model.load_state(path)))
            if turn % 10 == 9:
                list(model.generate_batch(PROMPTS[:2], max_new_tokens=8, seed=turn))

        yield work
    yield [text(turn) for turn in range(12)] == first


# What runs: turns, tokens of a turn, and how.
PARTS: dict[str, tuple[int, int, Callable[..., Iterator[Any]], dict[str, Any]]] = {
    "tokens, resident": (350_000, 1, tokens, {}),
    "tokens, resident, sixteen sequences": (38_000, 16, tokens, {"sequences": 16}),
    "tokens, streamed": (42_000, 1, tokens, {"memory_budget": BUDGET}),
    "openings, resident": (2_000, 0, openings, {}),
    "openings, streamed": (2_000, 0, openings, {"memory_budget": BUDGET}),
    "openings, quantised in memory": (500, 0, quantized, {}),
    "openings, quantised and streamed": (500, 0, quantized, {"stream": True}),
    "generations, resident": (1_500, 0, generations, {}),
    "generations, streamed": (500, 0, generations, {"memory_budget": BUDGET, "batch_size": 2}),
}


def measure(name: str, share: float) -> dict[str, Any]:
    """Runs a part in this process."""
    from thl_engine.memory import resident_bytes

    turns, each, part, options = PARTS[name]
    turns = max(int(turns * share), 20)
    running = part(**options)
    work, samples, started = next(running), [], time.process_time()
    every = max(turns // SAMPLES, 1)
    for turn in range(turns):
        work(turn)
        if turn + 1 >= turns // 10 and (turn + 1) % every == 0:
            gc.collect()
            samples.append((resident_bytes(), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
    seconds = time.process_time() - started
    right = next(running)
    memory, descriptors, threads = zip(*samples, strict=True)
    growth = max(memory) / memory[0] - 1
    flat = len(set(descriptors)) == len(set(threads)) == 1
    return {
        "commit": commit(),
        "turns": turns,
        "tokens": turns * each,
        "cpu_seconds": rounded(seconds),
        "resident_bytes": [memory[0], memory[len(memory) // 2], memory[-1]],
        "growth": rounded(growth),
        "descriptors": sorted(set(descriptors)),
        "threads": sorted(set(threads)),
        "results_right": right,
        "held": right and flat and growth <= ALLOWED,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"parts, by default all: {'; '.join(PARTS)}")
    parser.add_argument("--out", type=Path, help="parts that it has and that are not measured now stay")
    parser.add_argument("--share", type=float, default=100.0, help="percent of each part, by default all")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if unknown := [name for name in chosen.names if name not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}")
    if chosen.here:
        print(json.dumps(measure(chosen.names[0], chosen.share / 100)))
        return 0
    found = json.loads(chosen.out.read_text())["parts"] if chosen.out and chosen.out.exists() else {}
    for name in chosen.names or PARTS:
        command = [sys.executable, __file__, name, "--share", str(chosen.share), "--here"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout)
        print(f"{name}: {found[name]}", flush=True)
        if chosen.out:
            write_report(chosen.out, sys.argv[1:], allowed_growth=ALLOWED, parts=found)
    return 0 if all(part["held"] for part in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
