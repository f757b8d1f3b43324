"""Measured bandwidths and the benchmark over them, on amounts too small to mean anything."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import SMALL, random_weights
from safetensors.torch import save_file

from thl_engine import ConfigError, Engine, memory
from thl_engine.checkpoint.store import open_store
from thl_engine.cli import main
from thl_engine.engine.options import EngineOptions
from thl_engine.ops.backends import load_ops
from thl_engine.report import bandwidth, bench

PROMISED = {
    "tokens_per_second",
    "bytes_per_token",
    "achieved_bandwidth",
    "measured_bandwidth",
    "bandwidth_ratio",
    "peak_rss_bytes",
    "peak_device_bytes",
    "memory_budget",
    "backend",
    "device",
}


@pytest.fixture(autouse=True)
def small_amounts(monkeypatch):
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", 32 << 20)
    monkeypatch.setattr(bandwidth, "DISK_BYTES", 4 << 20)
    monkeypatch.setattr(bandwidth, "PRODUCT_SECONDS", 0.02)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_file(random_weights(SMALL), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SMALL.to_dict()))
    assert main(["quantize", str(folder), str(folder / "int8.safetensors")]) == 0
    assert main(["quantize", str(folder), str(folder / "groups.safetensors"), "--group-size", "128"]) == 0
    return folder


@pytest.mark.parametrize("name", ["", "int8.safetensors", "groups.safetensors"])
def test_bandwidths(checkpoint, name, backend):
    device = torch.device("cpu")
    with open_store(checkpoint / name if name else checkpoint) as store:
        like = bandwidth.largest_matrix(store)
        assert like.name == "output_head.weight"
        for rate in (
            bandwidth.read_bandwidth(device),
            bandwidth.disk_bandwidth(store),
            bandwidth.product_bandwidth(load_ops(backend, "cpu"), device, like),
        ):
            assert 1e6 < rate < 1e13
    assert bench.link_bandwidth(device) is None


def test_benchmark_resident(checkpoint, backend):
    found = bench.benchmark(checkpoint / "int8.safetensors", EngineOptions(backend=backend), tokens=24, warmup=3)
    assert found.keys() >= PROMISED and found["backend"] == backend and found["device"] == "cpu"
    with Engine.from_pretrained(checkpoint / "int8.safetensors") as engine:
        assert found["bytes_per_token"] == pytest.approx(engine.plan().bytes_per_token)  # 24 is two periods
    assert found["achieved_bandwidth"] == pytest.approx(found["bytes_per_token"] * found["tokens_per_second"])
    assert found["bandwidth_ratio"] == pytest.approx(found["achieved_bandwidth"] / found["measured_bandwidth"])
    assert found["bytes_streamed_per_token"] == 0 and found["page_misses"] == 0 and found["memory_budget"] is None
    assert found["latency_median"] <= found["latency_p95"] and found["peak_rss_bytes"] >= found["rss_quarter_bytes"]


def test_benchmark_streamed(checkpoint):
    with Engine.from_pretrained(checkpoint / "int8.safetensors", stream=True) as engine:
        least = engine.plan().least_budget
    found = bench.benchmark(checkpoint / "int8.safetensors", EngineOptions(memory_budget=least), tokens=12, warmup=12)
    assert found["memory_budget"] == least and found["planned_peak_bytes"] <= least
    assert found["bytes_streamed_per_token"] > 0 and 0 <= found["stall_share"] <= 1 and found["disk_bandwidth"] > 0
    assert found["predicted_tokens_per_second"] > 0


def test_command(checkpoint, capsys):
    assert main(["bench", str(checkpoint), "--tokens", "3", "--warmup", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() >= PROMISED
    assert main(["bench", str(checkpoint), "--tokens", "3", "--warmup", "0", "--stream"]) == 0
    found = capsys.readouterr()
    assert "ratio" in found.out and "tokens/s" in found.out and found.err == ""


@pytest.mark.parametrize(
    "options", [{"tokens": 0}, {"warmup": -1}, {"engine_options": EngineOptions(backend="fortran")}]
)
def test_bad_options(checkpoint, options):
    with pytest.raises(ConfigError):
        bench.benchmark(checkpoint, **options)


def test_the_peak_can_be_forgotten():
    memory.reset_peak()
    before = memory.peak_bytes()
    block = torch.ones(16 << 20)
    assert memory.peak_bytes() - before > 32 << 20
    del block
    assert memory.resident_bytes() > 0


def test_the_peak_of_a_large_parent_is_not_counted():
    ballast = torch.ones(128 << 20)
    child = "from thl_engine import memory; print(memory.peak_bytes())"
    found = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True)
    assert 0 < int(found.stdout) < ballast.nbytes
