"""How commands start and stop: streams that are closed, an interrupt while libraries load, numbers beyond anything."""

import os
import signal
import subprocess
import sys

import pytest

PROGRAM = "import sys; from thl_engine.cli import main; sys.exit(main(sys.argv[1:]))"


def command(*argv: object) -> list[str]:
    return [sys.executable, "-c", PROGRAM, *map(str, argv)]


@pytest.fixture
def run_options(packed) -> list[object]:
    return ["run", "--model", packed, "--prompt", "a", "--max-new-tokens", 3, "--seed", 1, "--stats"]


def test_closed_streams(run_options, tmp_path):
    """What is meant for stderr never reaches stdout, nor a file that is opened; nothing is a traceback."""
    wanted = subprocess.run(command(*run_options), capture_output=True, check=True)
    assert wanted.stderr
    shell = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command(*run_options)]
    assert subprocess.run(shell, stdout=subprocess.PIPE, check=True).stdout == wanted.stdout
    shell = ["sh", "-c", 'exec "$@" >&-', "sh", *command(*run_options)]
    found = subprocess.run(shell, stderr=subprocess.PIPE, check=True)
    assert b"Traceback" not in found.stderr and b"written" in found.stderr
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command(*run_options)]
    assert subprocess.run(shell).returncode == 0


def test_an_interrupt_while_libraries_load_is_quiet(run_options, tmp_path):
    """It comes while a library is imported from within another one's C code."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Finder:\n"
        "    done = False\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        if name == 'numpy.exceptions' and not cls.done:\n"
        "            cls.done = True\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder)\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = subprocess.run(
        command(*run_options),
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (found.returncode, found.stdout, found.stderr) == (130, b"", b"")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--threads", 5000),
        ("--threads", 10**12),
        ("--memory-budget", f"{10**400}GiB"),
        ("--memory-budget", 10**30),
        ("--context", 10**30),
    ],
)
def test_absurd_numbers_are_one_line(packed, fails, option, value):
    line = fails("run", "--model", packed, "--prompt", "a", option, value)
    assert len(line) < 400


def test_absurd_seeds_are_one_line(packed, fails, tmp_path):
    for argv in (
        ("bench", packed, "--tokens", 1, "--warmup", 0),
        ("init", "--model-type", "inl", "--config", "small", tmp_path / "out.safetensors"),
        ("run", "--model", packed, "--prompt", "a"),
    ):
        assert "seed is 99999999999999999999999" in fails(*argv, "--seed", 99999999999999999999999)
