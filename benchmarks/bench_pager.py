"""Streaming a whole model each token: how the page size changes the rate, against the plan and the bare reader.

The page size in `thl_engine/checkpoint/pack.py` was chosen with this.
"""

import statistics
import time

import pytest
import torch

from thl_engine import Engine
from thl_engine.checkpoint import pack
from thl_engine.checkpoint.convert import init_checkpoint
from thl_engine.checkpoint.store import open_store
from thl_engine.config import THLConfig
from thl_engine.paging.prediction import Bandwidths
from thl_engine.report.bandwidth import disk_bandwidth, largest_matrix, product_bandwidth

MIB = 1 << 20
CONFIG = THLConfig(
    vocab_size=4096,
    embedding_dim=4096,
    num_tiers=2,
    tier_dims=(4096, 4096),
    tier_timescales=(1, 1),
    memory_slots=64,
    memory_dim=1024,
    value_dim=4096,
    local_window=16,
)


@pytest.mark.parametrize("page_mib", [1, 2, 4, 8, 16, 32])
def test_stream_by_page_size(benchmark, tmp_path, monkeypatch, page_mib):
    monkeypatch.setattr(pack, "PAGE_BYTES", page_mib * MIB)
    path = tmp_path / "model.safetensors"
    init_checkpoint("thl", CONFIG.to_dict(), path, seed=0, quantize="int8")
    with Engine.from_pretrained(path, stream=True, memory_budget="192MiB") as engine:
        state, token = engine.new_state(), torch.tensor([1])
        engine.step(token, state)
        seconds = []

        def step() -> None:
            started = time.perf_counter()
            engine.step(token, state)
            seconds.append(time.perf_counter() - started)

        benchmark.pedantic(step, rounds=8, warmup_rounds=2)
        with open_store(path) as store:
            rates = Bandwidths(
                disk=disk_bandwidth(store), memory=product_bandwidth(engine.ops, engine.device, largest_matrix(store))
            )
        plan = engine.plan(rates)
        measured = 1 / statistics.median(seconds)
        benchmark.extra_info.update(
            tokens_per_second=measured,
            predicted_tokens_per_second=plan.tokens_per_second,
            streamed_bytes_per_second=plan.bytes_streamed_per_token * measured,
            disk_bandwidth=rates.disk,
            share_of_disk=plan.bytes_streamed_per_token * measured / rates.disk,
            ring_bytes=plan.slots * plan.slot_bytes,
        )
