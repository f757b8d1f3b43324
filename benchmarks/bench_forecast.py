"""Predicted against measured tokens per second, of every architecture, and how long `thl plan` takes to tell.

    python benchmarks/bench_forecast.py --json benchmarks/results/forecast.json [CHECKPOINT[:BUDGET] ...]

Small models of every architecture are made here; further checkpoints are given, each resident or within a budget.
Rounds take turns: a prediction, then the same steps for real. Of both, the median of steps that read the same counts,
so that what else the machine does does not; figures are medians of the rounds. `thl plan` runs as a process of its own,
whose CPU seconds are held to the bounds: the clock's also depend on what else runs.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from record import ROOT, rounded, write_report

from thl_engine import Engine
from thl_engine.checkpoint.convert import init_checkpoint
from thl_engine.checkpoint.store import open_store
from thl_engine.engine.options import EngineOptions
from thl_engine.engine.resources import divide_memory, nominal
from thl_engine.models.state import tensors_of
from thl_engine.ops.backends import load_ops
from thl_engine.paging.page_schedule import PageSchedule
from thl_engine.report.bandwidth import disk_bandwidth
from thl_engine.report.forecast import seen_plan
from thl_engine.report.rehearsal import rehearse

GEMMA = {
    "vocab_size": 1000,
    "vocab_size_per_layer_input": 1000,
    "hidden_size": 256,
    "intermediate_size": [512] * 6,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "hidden_size_per_layer_input": 32,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.95] * 2 + [0.0] * 4,
    "laurel_rank": 16,
    "sliding_window": 64,
}
SMALL: dict[str, dict[str, Any]] = {
    "thl": {"vocab_size": 1000, "embedding_dim": 128, "hidden_dim": 128, "tier_dims": [128] * 3, "value_dim": 128,
            "memory_dim": 128, "memory_slots": 128},
    "inl": {"vocab_size": 1000, "d_model": 128, "num_layers": 3, "num_heads": 4, "num_iterations_per_layer": 4,
            "feedforward_dim": 512, "max_seq_len": 512},
    "him": {"vocab_size": 1000, "embed_dim": 64, "num_heads": 4, "num_encoder_layers": 4, "dim_feedforward": 128,
            "max_answer_len": 32, "max_seq_len": 256},
    "hrm": {"vocab_size": 100, "hidden_size": 64, "num_heads": 4, "L_layers": 1, "H_layers": 1, "halt_max_steps": 2},
    "gemma3n": GEMMA,
    "hrm_gemma3n": {**GEMMA, "hrm": {"L_size": 64, "H_size": 128, "cycles": 2, "L_steps": 3, "L_rank": 4, "H_rank": 8}},
}  # fmt: skip
GIVEN = ("--disk-bandwidth", "2", "--memory-bandwidth", "20")
CLI = "import sys; from thl_engine.cli import main; sys.exit(main())"  # what the installed `thl` does
BOUND = 0.25
WARM = 3  # steps before those that count
PLAN_SECONDS = {"without measuring": 2.0, "measuring": 10.0}
LONGEST = 8.0  # seconds of real steps in a round; a period is made in any case


def decoded(engine: Engine, schedule: PageSchedule, steps: range) -> float:
    """Seconds a step: of the given ones, by kind of what they read, the median of each kind."""
    state, generator = engine.new_state(), torch.Generator().manual_seed(1)
    for tensor in tensors_of(state):
        tensor.zero_()
    state.seek(max(steps.start - WARM, 0))
    spent: dict[tuple[str, ...], list[float]] = {}
    begun = time.perf_counter()
    for t in range(max(steps.start - WARM, 0), steps.stop):
        ids = torch.randint(engine.config.vocab_size, (1,), generator=generator)
        started = time.perf_counter()
        engine.step(ids, state)
        if t in steps:
            spent.setdefault(schedule.reads(t), []).append(time.perf_counter() - started)
        if time.perf_counter() - begun > LONGEST and t - steps.start >= schedule.period:
            break
    count = sum(map(len, spent.values()))
    return sum(len(own) * statistics.median(own) for own in spent.values()) / count


def compared(path: Path, budget: str | None, rounds: int, context: int | None, threads: int | None) -> dict[str, Any]:
    """Predicted and measured steps of one checkpoint."""
    store = open_store(path)
    options = EngineOptions.of(memory_budget=budget, device="cpu", context=context, threads=threads)
    ops = load_ops("auto", "cpu")
    schedule, plan = divide_memory(store, ops, torch.device("cpu"), options)
    period = schedule.period
    count = -(-min(64, (context or 512) // 4) // period) * period if period <= 64 else 64
    first = max(2 * period, min((context or 512) // 2, 256))
    steps = range(first, first + count)
    states = options.for_states(store.architecture)
    predicted, measured, disks = [], [], []
    with Engine(open_store(path), options) as engine:
        decoded(engine, schedule, range(first, first + period))  # the first reads compare checksums
        for _ in range(rounds):
            rates = nominal(torch.device("cpu"))
            if plan.streamed_pages:
                rates = replace(rates, disk=disk_bandwidth(store))
                disks.append(rates.disk)
            seen = rehearse(store, plan, options, steps)
            found = seen_plan(plan, rates, store, schedule, seen, options, states, steps)
            predicted.append(found.seconds_per_token)
            measured.append(decoded(engine, schedule, steps))
    ratios = [a / b for a, b in zip(measured, predicted, strict=True)]
    return {
        "model_type": store.model_type,
        "memory_budget": budget,
        "streamed_bytes_per_token": found.bytes_streamed_per_token,
        "predicted tokens/s": rounded(1.0 / statistics.median(predicted)),
        "measured tokens/s": rounded(1.0 / statistics.median(measured)),
        "predicted / measured": rounded(statistics.median(ratios)),
        "of each round": [rounded(ratio) for ratio in ratios],
    }


def planned(path: Path, budget: str | None, *arguments: str) -> dict[str, float]:
    """Seconds of one `thl plan`: by the clock, and of all processors."""
    command = [sys.executable, "-c", CLI, "plan", str(path), "--json", *arguments]
    if budget is not None:
        command += ["--memory-budget", budget]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": rounded(seconds), "CPU seconds": rounded(cpu)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT[:BUDGET]")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of each model (default: %(default)s)")
    parser.add_argument("--context", type=int, default=512, metavar="N", help="of models that have one")
    parser.add_argument("--threads", type=int, metavar="N", help="fewer than there are, where others are at work")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the report")
    given = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(given)
    found: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        cases: list[tuple[str, Path, str | None]] = []
        for model, config in SMALL.items():
            path = Path(folder) / f"{model}.safetensors"
            init_checkpoint(model, config, path, quantize="int8")
            cases.append((f"small {model}", path, None))
        for checkpoint in arguments.checkpoints:
            name, _, budget = checkpoint.partition(":")
            cases.append(
                (f"{Path(name).stem}{f' within {budget}' if budget else ''}", Path(name).resolve(), budget or None)
            )
        for name, path, budget in cases:
            with open_store(path) as store:
                context = arguments.context if "context" in store.architecture.state_options else None
            own = found[name] = compared(path, budget, arguments.rounds, context, arguments.threads)
            options = [] if context is None else ["--context", str(context)]
            own["plan without measuring"] = planned(path, budget, *options, *GIVEN)
            own["plan measuring"] = planned(path, budget, *options)
            print(f"{name:<28} {json.dumps(own)}", flush=True)
            if arguments.json:
                shown = [text.rpartition("/")[2] if text in arguments.checkpoints else text for text in given]
                write_report(arguments.json, shown, models=found)
    far = [name for name, own in found.items() if not 1 / (1 + BOUND) <= own["predicted / measured"] <= 1 + BOUND]
    slow = [
        name
        for name, own in found.items()
        if any(own[f"plan {how}"]["CPU seconds"] > most for how, most in PLAN_SECONDS.items())
    ]
    if far or slow:
        sys.exit(
            f"further than {BOUND:.0%} from what was measured: {', '.join(far) or 'none'}; "
            f"slow: {', '.join(slow) or 'none'}"
        )


if __name__ == "__main__":
    main()
