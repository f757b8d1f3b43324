"""Speed of training: updates of a model with the demo's sizes, forwards and backwards, in tokens a second.

pytest benchmarks/bench_train.py --benchmark-only
python benchmarks/bench_train.py
"""

import json
import time
from pathlib import Path

import pytest
import torch

from thl_engine.config import parse_config
from thl_engine.train.modules import TrainableModel, chunk_loss

CONFIG = Path(__file__).parent.parent / "examples" / "shakespeare.json"
BATCH, CHUNK = 128, 48


def make_update(precision: str):
    """A function that makes one update on random tokens."""
    config = parse_config(json.loads(CONFIG.read_text()))
    model = TrainableModel(config, dropout=0.1, weight_dropout=0.1, precision=precision).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(config.vocab_size, (BATCH, CHUNK + 1))

    def update() -> None:
        logits, _ = model(tokens[:, :-1], model.init_state(BATCH))
        optimizer.zero_grad()
        chunk_loss(logits, tokens[:, 1:]).backward()
        optimizer.step()

    return update


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_update(benchmark, precision: str) -> None:
    benchmark.pedantic(make_update(precision), rounds=3, warmup_rounds=1)
    benchmark.extra_info["tokens_per_second"] = BATCH * CHUNK / benchmark.stats.stats.median


if __name__ == "__main__":
    for kind in ("float32", "bfloat16"):
        run = make_update(kind)
        run()
        start = time.perf_counter()
        for _ in range(3):
            run()
        print(
            f"{kind}: {3 * BATCH * CHUNK / (time.perf_counter() - start):,.0f} tokens/s, "
            f"{torch.get_num_threads()} threads"
        )
