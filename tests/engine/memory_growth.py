"""By how much a process grows with an engine in it, and by how much it was said to: run in a process of its own.

    python memory_growth.py '{"path": ..., "small": ..., "options": {...}, "budget": factor, "tokens": T, "batch": B}'

small: a model of the same kind, which loads all code beforehand. budget: of the least that runs. Prints a JSON list of
(calls, bytes grown by, bytes planned).
"""

import ctypes
import gc
import json
import sys

import torch

from thl_engine import Engine
from thl_engine.memory import peak_bytes, reset_peak, resident_bytes


def prompts_and_steps(engine, batch, tokens):
    ids = torch.arange(batch * tokens).view(batch, tokens) % engine.config.vocab_size
    steps = 4
    _, state = engine.prefill(ids[:, :-steps], engine.new_state(batch))
    for column in ids[:, -steps:].unbind(1):
        engine.step(column, state)
    del state
    for _ in engine.generate_batch(ids[:, :-steps].tolist(), max_new_tokens=steps, seed=1, top_p=0.9):
        pass


def whole(engine, batch, tokens):
    ids = torch.arange(batch * tokens).view(batch, tokens) % engine.config.vocab_size
    engine.forward(ids, engine.new_state(batch))


def main(path, small, options, budget, tokens, batch):
    options = {**options, "device": "cpu", "batch_size": batch}
    for stream in (True, False):
        with Engine.from_pretrained(
            small, **{**options, "context": 12} if "context" in options else options, stream=stream
        ) as engine:
            prompts_and_steps(engine, batch, 12)
            whole(engine, batch, 12)
    with Engine.from_pretrained(path, **options, stream=True) as engine:
        limit = int(budget * engine.plan().least_budget)
    del engine
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, found = resident_bytes(), []
    reset_peak()
    with Engine.from_pretrained(path, **options, memory_budget=limit) as engine:
        for calls in (prompts_and_steps, whole):
            calls(engine, batch, tokens)
            found.append((calls.__name__, peak_bytes() - before, engine.stats()["peak_memory_bytes"]))
    print(json.dumps(found))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
