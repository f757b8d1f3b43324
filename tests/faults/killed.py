"""Run by test_kill.py: `killed.py quantize|train FOLDER KILLS SEED`.

A process that has loaded everything forks one writer after another, and kills each at a moment of its own. Between two
of them it looks at what lies there: the last good file, whole, or the next one.
"""

import contextlib
import io
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # which the first optimizer loads

from thl_engine.checkpoint.convert import init_checkpoint, quantize_checkpoint
from thl_engine.checkpoint.tensors import load_tensors
from thl_engine.errors import ConfigError
from thl_engine.train import TrainOptions, train
from thl_engine.train import checkpoint as files_of_runs
from thl_engine.train.resume import parse_record

THL = dict(vocab_size=500, embedding_dim=200, num_tiers=2, tier_dims=[400, 300], tier_timescales=[1, 2], local_window=2)
THL |= dict(memory_slots=4, memory_dim=8, query_dim=4, value_dim=8, num_heads=2, head_dim=4, read_topk=2)
GONE = os.WEXITED | os.WNOHANG | os.WNOWAIT
HRM = dict(hidden_size=8, num_heads=2, L_layers=1, H_layers=1, expansion=1.0, halt_max_steps=2)


def forked(action: Callable[[], object], seconds: float | None = None, file: Path | None = None) -> tuple[float, int]:
    """Carries out an action in a process of its own. How long it took, and its status.

    seconds: it is killed after so long; or, with `file`, so long after that file was replaced or made.
    """
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                action()
            status = 0
        except ConfigError as error:
            status = 3 if "updates already" in str(error) else 1
            print(error, flush=True)
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
        finally:
            os._exit(status)
    if seconds is not None:
        before = number_of(file)
        while file is not None and number_of(file) == before and not os.waitid(os.P_PID, pid, GONE):
            time.sleep(0.0005)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in ((0,) if seconds is None else (0, 3, -signal.SIGKILL)), code
    return time.monotonic() - started, code


def number_of(file: Path | None) -> int | None:
    return file.stat().st_ino if file is not None and file.exists() else None


def left_in(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".partial")]


def quantize(folder: Path, kills: int, draw: random.Random) -> None:
    """Two models in turn are quantised to one file, which is always one of the two."""
    versions = []
    for seed in (0, 1):
        source, target = folder / f"{seed}.safetensors", folder / "out.safetensors"
        forked(lambda source=source, seed=seed: init_checkpoint("thl", THL, source, seed))
        seconds, _ = forked(lambda source=source, target=target: quantize_checkpoint(source, target))
        versions.append(target.read_bytes())
    found, most_left = [], 0
    for number in range(kills):
        source = folder / f"{number % 2}.safetensors"
        forked(lambda source=source: quantize_checkpoint(source, target), draw.uniform(0, 1.1 * seconds))
        found.append(versions.index(target.read_bytes()))
        most_left = max(most_left, len(left_in(folder)))
        assert len(left_in(folder)) <= 1  # what the one before left is gone
    forked(lambda: quantize_checkpoint(folder / "0.safetensors", target))
    assert target.read_bytes() == versions[0] and not left_in(folder)
    print(f"{found.count(0)} and {found.count(1)} of the versions; at most {most_left} left over")


def run(folder: Path, kills: int, draw: random.Random) -> None:
    """A run that is killed again and again ends as one that is not, bit for bit."""
    (folder / "text.txt").write_text("hello world, said the king. " * 20)
    (folder / "config.json").write_text(json.dumps(HRM))
    told = dict(batch_size=2, chunk=6, evaluate_every=2, save_every=1, sample_tokens=0, steps=8 + 3 * kills)

    def trained(out: Path) -> None:
        resume = (out / files_of_runs.RESUME_FILE).exists()
        places = ("hrm", folder / "config.json", folder / "text.txt", out)
        train(TrainOptions(*places, resume=resume) if resume else TrainOptions(*places, **told))

    whole, killed = folder / "whole", folder / "killed"
    seconds, _ = forked(lambda: trained(whole))
    seen: set[int] = set()
    for number in range(kills):
        awaited = killed / files_of_runs.RESUME_FILE if number % 4 else None  # else it may be killed while it starts
        forked(lambda: trained(killed), draw.uniform(0, seconds / (told["steps"] if awaited else 8)), awaited)
        names = os.listdir(killed) if killed.exists() else []
        assert all(re.fullmatch(r"\.[a-z.]+\.[0-9a-f]{8}\.partial", name) for name in names if name.startswith("."))
        if files_of_runs.RESUME_FILE in names:
            _, record = files_of_runs.load(killed / files_of_runs.RESUME_FILE)
            seen.add(parse_record(record, killed).step)
        if "model.safetensors" in names:
            load_tensors(killed / "model.safetensors")
            assert {"config.json", "tokenizer.json"} <= set(names)
        for name in {"config.json", "tokenizer.json"} & set(names):
            json.loads((killed / name).read_text())
    forked(lambda: trained(killed) if max(seen, default=0) < told["steps"] else None)
    for file in sorted(whole.iterdir()):
        (expected, text), (got, other) = load(file), load(killed / file.name)
        assert text == other and expected.keys() == got.keys(), file.name
        assert all(torch.equal(expected[name], got[name]) for name in expected), file.name
    assert not left_in(killed)
    print(f"killed after {sorted(seen)} of {told['steps']} updates")


def load(file: Path) -> tuple[dict[str, torch.Tensor], object]:
    return load_tensors(file) if file.suffix == ".safetensors" else ({}, file.read_text())


if __name__ == "__main__":
    what, folder, kills, seed = sys.argv[1:]
    {"quantize": quantize, "train": run}[what](Path(folder), int(kills), random.Random(int(seed)))
