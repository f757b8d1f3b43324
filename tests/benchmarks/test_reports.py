"""The reports among the benchmarks: stopping rules of INL, errors of int8 weights, and the commands' start."""

import json
from pathlib import Path

import pytest
from inl_small import ODD, random_tensors
from safetensors.torch import save_file

from thl_engine.ops import native

CHARACTERS = {chr(code): i for i, code in enumerate(range(32, 32 + ODD.vocab_size))}
WHERE = {"machine", "date", "commit", "command"}

pytestmark = pytest.mark.skipif(not native.available(), reason="needs the native kernels")


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


def test_stopping(tmp_path, capsys):
    import stopping

    save_file(random_tensors(ODD), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(ODD.to_dict()))
    (tmp_path / "vocab.json").write_text(json.dumps(CHARACTERS))
    (tmp_path / "text.txt").write_text("".join(CHARACTERS) * 9)
    stopping.main(
        [
            str(tmp_path),
            str(tmp_path / "text.txt"),
            "--out",
            str(tmp_path / "out.json"),
            "--windows",
            "3",
            "--length",
            "12",
            "--thresholds",
            "0.3",
            "0",
        ]
    )
    found = json.loads((tmp_path / "out.json").read_text())
    assert found.keys() >= WHERE and found["config"]["d_model"] == ODD.d_model
    early, never = found["trained, threshold 0.3"], found["trained, threshold 0"]
    assert 0 < early["mean difference"] < early["largest difference"] < 0.25 and early["tokens"] == 36
    assert sum(early["steps, step-wise"]) < sum(early["steps, forward"])
    assert 4 <= early["steps, step-wise"][0] <= early["steps, forward"][0] <= 9
    assert never["steps, forward"] == never["steps, step-wise"] == [9.0] * ODD.num_layers
    assert never["largest difference"] < 1e-5 and never["beyond, layer 0"] == 0
    assert found["recorded, full_forward_early"]["steps, forward"] == [4, 7, 8]  # as recorded
    assert "recorded, greedy" in capsys.readouterr().out


def test_int8_error(tmp_path, capsys):
    import int8_error

    int8_error.main(["--out", str(tmp_path / "out.json"), "--models", "inl", "thl"])
    found = json.loads((tmp_path / "out.json").read_text())
    assert found.keys() == WHERE | {"inl", "thl"}
    for row in found["inl"]["full_forward_early"].values():
        assert 0 < row["mean error"] < row["largest error"] < 0.02 and row["positions"] == 48
    for row in found["thl"]["batch3"].values():
        assert 0 < row["before other slots"] < 0.02 and row["positions before other slots"] >= 3
    assert "thl, warm, groups of 128" in capsys.readouterr().out


def test_bench_start(tmp_path, capsys, monkeypatch):
    import bench_start

    usual = bench_start.cases()
    kept = ("python -c pass", "python -c 'import torch'", "thl train --help")
    monkeypatch.setattr(bench_start, "cases", lambda: {name: usual[name] for name in kept})
    monkeypatch.setattr(bench_start, "LIMIT", 30.0)  # the figures of a busy machine are no failure here
    bench_start.main(["--rounds", "1", "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert found.keys() == WHERE | {"rounds", "CPU seconds"} and tuple(found["CPU seconds"]) == kept
    assert found["CPU seconds"]["thl train --help"] < found["CPU seconds"]["python -c 'import torch'"]
    assert "of torch's import" in capsys.readouterr().out
