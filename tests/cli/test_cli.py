"""The commands as people meet them: what they print and where, and how they end."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL, random_weights
from inl_small import ODD as INL
from inl_small import random_tensors as inl_tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from thl_engine import Engine
from thl_engine.cli import main, options, progress, run_main
from thl_engine.engine.engine import Piece
from thl_engine.ops import native
from thl_engine.report import bandwidth, forecast, rehearsal

BYTES = replace(SMALL, vocab_size=300)  # enough for the byte tokenizer


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory) -> Path:
    """A model without a tokenizer whose vocabulary has room for bytes; what it writes is mostly no UTF-8."""
    path = tmp_path_factory.mktemp("bytes")
    save_file(random_weights(BYTES), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(BYTES.to_dict()))
    return path


def process(*argv: object, **options: object) -> subprocess.Popen:
    """`thl` as a process of its own."""
    code = "import sys; from thl_engine.cli import main; sys.exit(main())"
    given = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], cwd=Path(__file__).parents[2], **given)


@pytest.mark.parametrize("command", [*options.COMMANDS, None])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*([command] if command else []), "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith("usage: thl")
    assert command or all(f"    {name} " in text for name in options.COMMANDS)


@pytest.mark.parametrize("command", options.COMMANDS)
def test_every_option_is_explained(command, monkeypatch):
    made = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, argv: made.append(self))
    options.parse([command])
    commands = next(action for action in made[0]._actions if isinstance(action.choices, dict))
    for action in commands.choices[command]._actions:
        assert action.help, action.option_strings
        if action.default not in (None, False, [], argparse.SUPPRESS):
            assert "%(default)s" in action.help, action.option_strings


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["walk"],
        ["run"],
        ["run", "--model", "x", "--max-new-tokens", "many"],
        ["run", "--model", "x", "--promt", "y"],
        ["quantize", "in"],
        ["quantize", "in", "out", "--bits", "4"],
        ["plan", "x", "--disk-bandwidth", "-1"],
        ["plan", "x", "--disk-bandwidth", "fast"],
        ["bench"],
        ["init", "out"],
        ["init", "--base", "x", "--quantize", "int8", "out"],
        ["train", "--data", "x"],
    ],
)
def test_wrong_usage(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    found = capsys.readouterr()
    assert stop.value.code == 2 and found.out == "" and found.err.startswith("usage: thl")


def test_run_writes_what_the_engine_generates(packed, succeeds, capsys):
    with Engine.from_pretrained(packed) as engine:
        expected = list(
            engine.generate(
                "To be,", max_new_tokens=30, temperature=0.8, top_k=20, top_p=0.9, seed=5, repetition_penalty=1.1
            )
        )
    argv = [
        "--model",
        packed,
        "--prompt",
        "To be,",
        "--max-new-tokens",
        30,
        "--temperature",
        0.8,
        "--top-k",
        20,
        "--top-p",
        0.9,
        "--seed",
        5,
        "--repetition-penalty",
        1.1,
    ]
    text = "".join(piece.text for piece in expected)
    assert succeeds("run", *argv) == text + "\n" and succeeds.err == ""
    found = json.loads(succeeds("run", *argv, "--json"))
    assert found["text"] == text and found["ids"] == [piece.id for piece in expected]
    assert found["logprobs"] == pytest.approx([piece.logprob for piece in expected])
    assert found["stats"]["prompt_tokens"] == 6 and found["stats"]["new_tokens"] == 30
    assert run_main([str(argument) for argument in argv]) == 0 and capsys.readouterr().out == text + "\n"


def test_run_with_several_prompts(packed, succeeds, fails):
    argv = ["run", "--model", packed, "--max-new-tokens", 9, "--seed", 3, "--stream"]
    prompts = ["To be,", "x", 'what "is"']
    alone = [succeeds(*argv, "--prompt", prompt) for prompt in prompts]
    several = [argument for prompt in prompts for argument in ("--prompt", prompt)]
    assert succeeds(*argv, *several) == "".join(
        f"[{i}] {json.dumps(prompt)}\n{text}" for i, (prompt, text) in enumerate(zip(prompts, alone, strict=True), 1)
    )
    found = json.loads(succeeds(*argv, *several, "--json"))
    assert [one["text"] + "\n" for one in found] == alone and found[0]["stats"]["new_tokens"] == 27
    assert "one prompt" in fails(*argv, *several, "--save-state", "x")


@pytest.fixture(scope="module")
def with_cache(tmp_path_factory) -> Path:
    """An INL model, without a tokenizer."""
    path, config = tmp_path_factory.mktemp("inl"), replace(INL, vocab_size=300)
    save_file(inl_tensors(config), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    return path


def test_options_of_the_cache(with_cache, packed, succeeds, fails, monkeypatch):
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", 64 << 20)
    monkeypatch.setattr(bandwidth, "PRODUCT_SECONDS", 0.02)
    plan = ["plan", with_cache, "--disk-bandwidth", 2, "--memory-bandwidth", 20, "--json"]
    whole, short, int8, window, four = (
        json.loads(succeeds(*plan, *options))
        for options in ((), ("--context", 100), ("--kv-cache", "int8"), ("--sliding-window", 20), ("--batch-size", 4))
    )
    assert short["state_bytes"] < whole["state_bytes"] / 5 and window["state_bytes"] < short["state_bytes"]
    assert int8["state_bytes"] < 0.6 * whole["state_bytes"] and four["state_bytes"] > 3.9 * whole["state_bytes"]
    assert window["state_bytes_per_step"] < short["state_bytes_per_step"] < whole["state_bytes_per_step"]
    assert four["tokens_per_second"] > whole["tokens_per_second"]
    assert "525 tokens" in succeeds("inspect", with_cache) and "any length" in succeeds("inspect", packed)
    found = json.loads(
        succeeds(
            "bench",
            with_cache,
            "--tokens",
            4,
            "--warmup",
            1,
            "--batch-size",
            2,
            "--kv-cache",
            "int8",
            "--context",
            8,
            "--json",
        )
    )
    assert found["batch_size"] == 2 and found["tokens_per_second"] == pytest.approx(8 / found["seconds"])
    run = ["run", "--model", with_cache, "--prompt-ids", "1,2", "--max-new-tokens", 5, "--seed", 1, "--json"]
    text = succeeds(*run, "--sliding-window", 3, "--stats")
    assert "sees the last 3 tokens" in succeeds.err
    again = succeeds(*run, "--sliding-window", 3, "--context", 6)
    assert json.loads(text)["ids"] == json.loads(again)["ids"]
    assert "would be 6 tokens long; the context ends at 5" in fails("bench", with_cache, "--context", 5)
    assert "context is 526; the model's max_seq_len is 525" in fails(*plan, "--context", 526)
    assert "thl models have no such option" in fails("run", "--model", packed, "--prompt", "x", "--kv-cache", "int8")


def test_run_streams_the_same_text(packed, succeeds):
    argv = ["run", "--model", packed, "--prompt", "x", "--max-new-tokens", 12, "--seed", 1]
    whole = succeeds(*argv)
    with Engine.from_pretrained(packed, stream=True) as engine:
        least = engine.plan().least_budget
    found = json.loads(succeeds(*argv, "--stream", "--memory-budget", least, "--json"))
    assert found["text"] + "\n" == whole and found["stats"]["bytes_streamed"] > 0
    assert succeeds(*argv, "--no-stream") == whole


def test_streaming_without_a_budget_takes_what_is_promised(packed, succeeds, monkeypatch):
    """4 GiB, or what is free if that is less: a small model is read once, not anew for every token."""
    argv = ["run", "--model", packed, "--prompt", "x", "--max-new-tokens", 12, "--stream", "--json"]
    stats = json.loads(succeeds(*argv))["stats"]
    assert 0 < stats["memory_budget"] <= 4 << 30 and stats["bytes_streamed"] == 0
    with Engine.from_pretrained(packed, stream=True) as engine:
        least = engine.plan().least_budget
    monkeypatch.setattr("thl_engine.memory.free_memory", lambda: int(1.1 * least / 0.8))
    stats = json.loads(succeeds(*argv))["stats"]
    assert stats["memory_budget"] <= 1.1 * least and stats["bytes_streamed"] > 0


def test_run_quantizes_on_the_way(plain, packed, succeeds):
    argv = ["--prompt", "x", "--max-new-tokens", 8, "--temperature", 0]
    assert succeeds("run", "--model", plain, "--quantize", "int8", *argv) == succeeds("run", "--model", packed, *argv)


def test_stats_go_to_stderr(packed, succeeds):
    plain = succeeds("run", "--model", packed, "--prompt", "x", "--max-new-tokens", 4, "--seed", 1)
    assert succeeds("run", "--model", packed, "--prompt", "x", "--max-new-tokens", 4, "--seed", 1, "--stats") == plain
    for word in ("backend", "tokens/s", "bytes streamed", "waited for pages", "peak memory"):
        assert succeeds.err.count(word) >= 1, word
    assert succeeds.err.count("backend") == 1 and (not native.available() or native.isa() in succeeds.err)
    succeeds("run", "--model", packed, "--prompt", "x", "--max-new-tokens", 0, "--stats")
    assert "no step timed" in succeeds.err


def test_a_missing_extension_is_told_once(packed, succeeds, monkeypatch):
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "_reason", "the C++ extension is not built (no compiler)")
    assert succeeds("run", "--model", packed, "--prompt", "x", "--max-new-tokens", 2, "--seed", 1)
    assert succeeds.err.count("\n") == 1 and "not built (no compiler)" in succeeds.err
    succeeds("run", "--model", packed, "--prompt", "x", "--max-new-tokens", 2, "--backend", "reference")
    assert succeeds.err == ""


def test_stop_ends_the_text(packed, succeeds):
    argv = ["run", "--model", packed, "--prompt", "x", "--max-new-tokens", 40, "--seed", 3]
    text = succeeds(*argv)
    assert succeeds(*argv, "--stop", "@@@", "--stop", text[5:7]) == text[: text.index(text[5:7])] + "\n"


@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_prompt_from_stdin(kind, packed, succeeds, fails, monkeypatch, tmp_path):
    def stdin(data: bytes):
        file = tmp_path / "prompt"
        if kind == "file":
            file.write_bytes(data)
            opened = file.open()
        else:
            reading, writing = os.pipe()
            os.write(writing, data)
            os.close(writing)
            opened = open(reading)
        monkeypatch.setattr(sys, "stdin", opened)
        return opened

    argv = ["run", "--model", packed, "--max-new-tokens", 6, "--temperature", 0]
    expected = succeeds(*argv, "--prompt", "é\n")
    for asked in ([], ["--prompt", "-"]):
        with stdin("é\n".encode()):
            assert succeeds(*argv, *asked) == expected
        with stdin(b"ab\xff"):
            assert "not UTF-8 text (byte 2)" in fails(*argv, *asked)
    with stdin(b""):
        assert succeeds(*argv) == succeeds(*argv, "--prompt", "\n")
    with stdin(b""):
        assert "empty" in fails(*argv, "--prompt", "-")


def test_without_a_prompt_a_new_line_is_continued(packed, succeeds, monkeypatch):
    argv = ["run", "--model", packed, "--max-new-tokens", 6, "--temperature", 0]
    expected = succeeds(*argv, "--prompt", "\n")
    with open(os.devnull) as nothing:
        for stdin in (nothing, None):
            monkeypatch.setattr(sys, "stdin", stdin)
            assert succeeds(*argv) == expected


def test_a_kept_context_goes_on(packed, succeeds, tmp_path):
    file = tmp_path / "context.safetensors"
    with Engine.from_pretrained(packed) as engine:
        state = engine.new_state()
        first = list(engine.generate("abc", max_new_tokens=5, temperature=0, state=state))
        engine.step(torch.tensor([first[-1].id]), state)
        second = list(engine.generate("de", max_new_tokens=5, temperature=0, state=state))
    argv = ["run", "--model", packed, "--max-new-tokens", 5, "--temperature", 0]
    assert succeeds(*argv, "--prompt", "abc", "--save-state", file) == "".join(piece.text for piece in first) + "\n"
    assert succeeds(*argv, "--prompt", "de", "--state", file) == "".join(piece.text for piece in second) + "\n"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_output_is_utf8_whatever_the_locale(of_bytes):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    child = process("run", "--model", of_bytes, "--prompt", "é", "--max-new-tokens", 60, "--seed", 0, env=environment)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0 and "\ufffd" in out.decode("utf-8") and out.endswith(b"\n")
    assert err.count(b"\n") == 1 and b"taken as bytes" in err


def test_a_closed_pipe_is_no_error(packed):
    child = process("run", "--model", packed, "--prompt", "x", "--max-new-tokens", 100_000)
    assert child.stdout.read(3)
    child.stdout.close()
    assert child.stderr.read() == b"" and child.wait(timeout=60) == 0


def test_an_interrupt_is_quiet(packed):
    child = process("run", "--model", packed, "--prompt", "x", "--max-new-tokens", 1_000_000)
    assert child.stdout.read(3)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130 and err == b"" and out.endswith(b"\n")


def test_an_interrupt_is_not_lost_where_exceptions_are(packed, monkeypatch, capfd):
    class Interrupts:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def generate(engine, *arguments, **options):
        for _ in range(3):
            Interrupts()  # and what is raised in its destructor is dropped
            yield Piece(5, "e", 0.0)

    monkeypatch.setattr(Engine, "generate", generate)
    assert main(["run", "--model", str(packed), "--prompt", "x"]) == 130
    assert capfd.readouterr() == ("", "")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_output_that_cannot_be_written(packed):
    with open("/dev/full", "wb") as full:
        child = process("inspect", packed, stdout=full)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 1 and err.startswith(b"thl: error: ") and err.count(b"\n") == 1
    assert b"No space left" in err


def test_quantize_writes_ordinary_safetensors(plain, succeeds, tmp_path):
    for group in (0, 128):
        out = tmp_path / f"{group}.safetensors"
        assert succeeds("quantize", plain, out, "--group-size", group) == f"{out}\n" and succeeds.err == ""
        with safe_open(out, framework="pt") as file:
            names = [name for name in file.keys() if not name.startswith("__padding__")]
            assert file.get_tensor("output_head.weight").dtype == torch.int8
            assert file.get_tensor("output_head.weight.scale").dim() == (2 if group else 1)
        assert set(load_file(plain / "model.safetensors")) <= set(names)
        succeeds("inspect", out, "--verify")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors", "128.safetensors"]


def test_convert(plain, succeeds, tmp_path):
    published, argv = tmp_path / "published", ["--prompt", "x", "--max-new-tokens", 8, "--temperature", 0]
    published.mkdir()
    torch.save(random_weights(SMALL), published / "pytorch_model.bin")
    for name in ("config.json", "vocab.json"):
        shutil.copy(plain / name, published)
    expected = succeeds("run", "--model", plain, *argv)
    for target in (tmp_path / "one.safetensors", tmp_path / "several"):
        succeeds("convert", published, target)
        assert succeeds("run", "--model", target, *argv) == expected


def test_init(succeeds, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(BYTES.to_dict()))
    argv = ["init", "--model-type", "thl", "--config", config]
    succeeds(*argv, tmp_path / "a.safetensors", "--seed", 4)
    succeeds(*argv, tmp_path / "b.safetensors", "--seed", 4)
    succeeds(*argv, tmp_path / "q.safetensors", "--seed", 4, "--quantize", "int8")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    kinds = json.loads(succeeds("inspect", tmp_path / "q.safetensors", "--json"))["kinds"]
    assert {"int8"} == {entry["dtype"] for entry in kinds if entry["kind"] in ("matrix", "table")}
    assert succeeds("run", "--model", tmp_path / "q.safetensors", "--prompt", "x", "--max-new-tokens", 3)


def test_plan(packed, succeeds, fails, monkeypatch):
    def unwanted(*_: object) -> float:
        raise AssertionError("measured what was given")

    with monkeypatch.context() as patch:
        for module, name in ((forecast, "disk_bandwidth"), (forecast, "product_bandwidth"), (rehearsal, "rehearse")):
            patch.setattr(module, name, unwanted)
        given = ["plan", packed, "--disk-bandwidth", 2, "--memory-bandwidth", 20]
        found = json.loads(succeeds(*given, "--memory-budget", "1GiB", "--json"))
        assert found["disk_bandwidth"] == 2e9 and found["streamed_pages"] == 0 and found["limited_by"] == "memory"
        least = found["least_budget"]
        streamed = json.loads(succeeds(*given, "--memory-budget", least, "--json"))
        assert streamed["bytes_streamed_per_token"] > 0 and streamed["peak_memory_bytes"] <= least
        assert streamed["tokens_per_second"] < found["tokens_per_second"]
        table = succeeds(*given, "--memory-budget", least)
        for word in ("memory budget", "pinned", "streamed", "bytes per token", "predicted tokens/s", "limited by"):
            assert word in table
        assert str(least) in fails(*given, "--memory-budget", least - 1)
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", 16 << 20)
    monkeypatch.setattr(bandwidth, "PRODUCT_SECONDS", 0.02)
    monkeypatch.setattr(bandwidth, "DISK_SECONDS", 0.05)
    measured = json.loads(succeeds("plan", packed, "--memory-budget", least, "--json"))
    assert measured["disk_bandwidth"] > 0 and measured["memory_bandwidth"] > 0


def test_plan_agrees_with_the_engine(packed, succeeds):
    with Engine.from_pretrained(packed, stream=True) as engine:
        least = engine.plan().least_budget
    for budget in (least, least + 20_000, "1GiB"):
        with Engine.from_pretrained(packed, memory_budget=budget) as engine:
            expected = engine.plan().to_dict()
        found = json.loads(
            succeeds(
                "plan",
                packed,
                "--memory-budget",
                budget,
                "--json",
                "--disk-bandwidth",
                expected["disk_bandwidth"] / 1e9,
                "--memory-bandwidth",
                expected["memory_bandwidth"] / 1e9,
            )
        )
        assert found == {**expected, "backend": engine.ops.name, "device": "cpu"}


def test_inspect(plain, packed, succeeds):
    found = json.loads(succeeds("inspect", packed, "--json", "--verify"))
    weights = random_weights(SMALL)
    assert found["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert found["unused_parameters"] == weights["writer.W_r.weight"].numel()
    assert found["tokenizer"] and found["config"] == SMALL.to_dict()
    pages = found["pages"]
    assert pages["checksums"] == pages["count"] and pages["aligned"] == pages["matrix_pages"]
    schedule = found["schedule"]
    assert schedule["period"] == 12 and {read["clock"] for read in schedule["reads"]} == {1, 3, 4}
    with Engine.from_pretrained(packed) as engine:
        assert schedule["bytes_per_token"] == pytest.approx(engine.plan().bytes_per_token)
    table = succeeds("inspect", packed, "--verify")
    assert "output_head.weight" in table and "checksums match" in table
    assert "no checksums" in succeeds("inspect", plain, "--verify")


def test_train(succeeds, tmp_path):
    text, config = tmp_path / "text.txt", tmp_path / "config.json"
    text.write_text("It was the best of times, it was the worst of times. " * 30)
    config.write_text(json.dumps({key: value for key, value in SMALL.to_dict().items() if key != "vocab_size"}))
    argv = [
        "train",
        "--model-type",
        "thl",
        "--config",
        config,
        "--data",
        text,
        "--out",
        tmp_path / "out",
        "--tokenizer-type",
        "char",
        "--batch-size",
        2,
        "--chunk",
        8,
        "--sample-tokens",
        4,
    ]
    assert "bits per character" in succeeds(*argv, "--steps", 2) and "perplexity" in succeeds.err
    assert "bits per character" in succeeds(*argv, "--steps", 3, "--resume")
    assert succeeds("run", "--model", tmp_path / "out", "--prompt", "It", "--max-new-tokens", 3)


def test_train_explains_every_option_it_has():
    from thl_engine.cli.training import HELP
    from thl_engine.train import TrainOptions

    assert list(HELP) == [field.name for field in fields(TrainOptions)]


def test_progress_bar(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LIVE_SECONDS", 0.0)
    with progress.progress_bar("copying") as show:
        show(5, 10)
    assert capsys.readouterr().err == ""  # not a terminal, and soon over
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.progress_bar("copying") as show:
        show(5, 10)
        assert " 50%" in capsys.readouterr().err
    assert capsys.readouterr().err == "\r\x1b[K"
