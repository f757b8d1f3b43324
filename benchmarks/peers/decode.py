"""One engine decodes greedily within a memory budget, in a process of its own; prints one JSON object.

usage: decode.py thl_engine|accelerate FOLDER BUDGET_BYTES NEW_TOKENS THREADS warm|cold

cold: before each token the checkpoint is taken out of the system's page cache, as it is where models are larger than
the machine's memory. What a token brings in from the disk then shows whole in the process's count of bytes read.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

PROMPT = [2, 17, 301, 44, 9, 128, 77, 5]


def bytes_read() -> int:
    """What this process has had read from the disk: direct reads, and pages that were not in the page cache."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["read_bytes"])


def peak_rss() -> int:
    """The process's own peak; getrusage's would begin at that of the process which started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def drop_cached(folder: str) -> None:
    """Takes the checkpoint's pages out of the page cache."""
    for path in Path(folder).glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def thl_engine(folder: str, budget: int) -> Callable[[], Iterator[int]]:
    """The engine's own token loop."""
    from thl_engine import Engine

    engine = Engine.from_pretrained(folder, memory_budget=budget, stream=True)

    def tokens() -> Iterator[int]:
        state = engine.new_state()
        logits, state = engine.prefill(torch.tensor([PROMPT]), state)
        while True:
            chosen = logits.argmax(dim=-1)
            yield int(chosen)
            logits, state = engine.step(chosen, state)

    return tokens


def accelerate(folder: str, budget: int) -> Callable[[], Iterator[int]]:
    """transformers' model with the layers over the budget left on disk by accelerate."""
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        device_map="auto",
        max_memory={"cpu": budget},
        attn_implementation="eager",
        offload_folder=str(Path(folder) / "offload"),
    )
    if "disk" not in model.hf_device_map.values():
        raise SystemExit("accelerate left nothing on disk within this budget")

    def tokens() -> Iterator[int]:
        cache, given = DynamicCache(config=model.config), torch.tensor([PROMPT])
        while True:
            with torch.no_grad():
                logits = model(given, past_key_values=cache, use_cache=True).logits
            given = logits[:, -1].argmax(dim=-1, keepdim=True)
            yield int(given)

    return tokens


def main(engine: str, folder: str, budget: str, count: str, threads: str, cache: str) -> None:
    torch.set_num_threads(int(threads))
    start = peak_rss()
    stream = {"thl_engine": thl_engine, "accelerate": accelerate}[engine](folder, int(budget))()
    ids = [next(stream), next(stream)]  # the prompt, and a step that brings everything into its rhythm
    seconds, read = [], bytes_read()
    for _ in range(int(count)):
        if cache == "cold":
            drop_cached(folder)
        started = time.perf_counter()
        ids.append(next(stream))
        seconds.append(time.perf_counter() - started)
    print(
        json.dumps(
            {
                "ids": ids,
                "seconds_per_token": statistics.median(seconds),
                "disk_bytes_per_token": (bytes_read() - read) / int(count),
                "peak_rss_bytes": peak_rss(),
                "rss_bytes_before_loading": start,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
