"""`make gpu-check` where there is no GPU: what it says, how it keeps results, and its stages at tiny sizes."""

import json
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import RECORDED

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import gpu_check  # noqa: E402
import gpu_kernels  # noqa: E402
from gpu_models import MODELS, THL_DEFAULT, TINY  # noqa: E402
from gpu_report import Results, Row, Rows, check, failure, read_rows, row  # noqa: E402

from thl_engine.config import parse_config  # noqa: E402

CIRCUMSTANCES = {"date": "2026-01-02", "commit": "abc", "sources": "0", "on": "a card"}


def run(*argv: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu_check.py", *map(str, argv)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    found = run("--out", tmp_path / "results")
    assert found.returncode == 1 and found.stdout == "" and not (tmp_path / "results").exists()
    assert "finds no CUDA device" in found.stderr and len(found.stderr.splitlines()) == 1


def test_stages_rehearsed(tmp_path):
    found = run("--rehearse", "sanitizer", "pager", "--out", tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr
    stages = json.loads((tmp_path / "gpu-rehearsal.json").read_text())["stages"]
    assert [*stages] == ["sanitizer", "pager"]
    rows = [Row(**one) for stage in stages.values() for one in stage["rows"]]
    assert any(one.what == "pager, streaming only" and one.ratio > 0 and one.target == "≥ 0.95" for one in rows)
    assert all(one.note.startswith("rehearsal") and one.met is not False for one in rows)
    assert "## pager" in (tmp_path / "gpu-rehearsal.md").read_text()


def test_kernels_rehearsed(tmp_path):
    rows = tmp_path / "rows"
    assert gpu_kernels.main(["--rehearse", "--rows", str(rows), "--only", "gemm", "small_ops"]) == 0
    found = read_rows(rows)
    assert len(found) == 9 and all(one.unit != "failed" and "rehearsal" in one.note for one in found)


def test_a_failed_case_is_a_row_and_the_others_go_on(tmp_path, capsys):
    rows = Rows(tmp_path / "rows")
    with rows.case("a kernel"):
        raise RuntimeError("CUDA error: out of memory\nand more")
    rows.add(row("another", 6.0, "GB/s", ceiling=10.0, of="GB/s, copy", target="slots"))
    (tmp_path / "rows").open("a").write('{"what": "cut o')
    first, second = read_rows(tmp_path / "rows")
    assert rows.failed and first.met is False and first.note == "RuntimeError: CUDA error: out of memory"
    assert second.met is True and second.ratio == 0.6 and second.target == "≥ 0.6"


def test_targets_bound_from_both_sides():
    assert row("w", 5.0, "", ceiling=10.0, target="slots").met is False
    assert row("w", 9.0, "", ceiling=10.0, target="memory").met is True
    assert row("w", 11.0, "", ceiling=10.0, target="memory").met is False
    assert row("w", 2e-4, "", target="agreement").met is False and row("w", 1.0, "").met is None
    assert check("w", True).met is True and failure("w", "why").met is False


def test_results_of_stages_merge(tmp_path):
    first = Results(tmp_path, "NVIDIA  H200/x", ["kernels", "pager"])
    first.put("pager", "done", 3.0, [check("holds", True)], CIRCUMSTANCES)
    second = Results(tmp_path, "NVIDIA  H200/x", ["kernels", "pager"])
    second.put("kernels", "out of time after 9 s", 9.0, [row("a|b", 1.0, "GB/s")], CIRCUMSTANCES)
    second.put("pager", "done", 4.0, [check("holds", False)], CIRCUMSTANCES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-nvidia-h200-x.json", "gpu-nvidia-h200-x.md"]
    third = Results(tmp_path, "NVIDIA  H200/x", ["kernels", "pager"])
    assert third.stages["pager"]["seconds"] == 4.0 and not third.good("pager") and not third.good("kernels")
    text = third.table()
    assert text.index("## kernels") < text.index("## pager") and "a\\|b" in text and "out of time after 9 s" in text


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "BUILD", tmp_path / "build")
    return gpu_check.Check(Namespace(rehearse=True, out=tmp_path, seconds=100.0), tmp_path)


@pytest.mark.parametrize(
    "program, state",
    [
        ("import time; print('begun', flush=True); time.sleep(60)", "out of time after 2 s"),
        ("print('broken'); raise SystemExit(3)", "failed with exit code 3"),
    ],
)
def test_a_stage_that_fails_or_runs_out_of_time_is_a_row(call, monkeypatch, program, state):
    monkeypatch.setattr(call, "_command", lambda stage, rows, report: [sys.executable, "-c", program])
    started = time.monotonic()
    found, rows = call.run("kernels", 2)
    assert found == state and time.monotonic() - started < 20
    assert rows[-1].met is False and state in rows[-1].note


def test_stages_that_do_not_fit_are_left(call, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(call, "run", lambda name, seconds: ("done", [check(name, True)]))
    monkeypatch.setattr(call, "left", iter([300.0, 100.0]).__next__)
    results = Results(tmp_path, "card", [*gpu_check.STAGES])
    assert gpu_check.run_stages(call, results, ["kernels", "engine-thl", "pager"], CIRCUMSTANCES) == [
        "engine-thl",
        "pager",
    ]
    assert results.good("kernels") and "pager" not in results.stages


def test_pytest_reports_become_rows(tmp_path):
    report = tmp_path / "tests.xml"
    assert gpu_check.test_rows(report)[0].met is False
    report.write_text(
        '<testsuites><testsuite><testcase classname="a" name="b"/><testcase classname="a" name="c">'
        '<failure message="assert 1 == 2&#10;more"/></testcase><testcase classname="a" name="d">'
        "<skipped/></testcase></testsuite></testsuites>"
    )
    summary, failed = gpu_check.test_rows(report)
    assert summary.what == "1 tests" and summary.met is False and summary.note == "1 skipped, 1 failed"
    assert failed.what == "a::c" and failed.note == "assert 1 == 2"


@pytest.mark.parametrize(
    "name, file", [("thl-7b", "thl-7b"), ("inl-5b", "inl-5b"), ("gemma-e4b", "gemma-3n-e4b"), (None, "thl-default")]
)
def test_models_are_the_published_ones(name, file):
    model_type, config = ("thl", THL_DEFAULT) if name is None else MODELS[name][:2]
    if name is not None:
        parse_config(TINY[name].config, TINY[name].model_type)
    published = RECORDED.parent / "configs" / f"{file}.json"
    if not published.exists():
        pytest.skip("the published configurations are not beside the repository")
    assert parse_config(config, model_type) == parse_config(json.loads(published.read_text()), model_type)
