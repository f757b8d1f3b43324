"""What the commands load: a start is as slow as its imports, so these are held, not times."""

import subprocess
import sys
from pathlib import Path

import pytest

from thl_engine.cli.options import COMMANDS

ROOT = Path(__file__).parents[2]
COMMAND = "from thl_engine.cli import {main}\ntry: {main}({argv!r})\nexcept SystemExit: pass"
# Of what torch does not load by itself: compilers, templates, tokenizers, test libraries.
HEAVY = {"triton", "jinja2", "tokenizers", "safetensors", "transformers", "hypothesis", "sympy", "torch._dynamo"}


def loaded(code: str) -> set[str]:
    """Names of the modules that a process has loaded after it ran `code`."""
    program = f"import sys\n{code}\nprint(' '.join(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    return set(found.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        ("main", ["--help"]),
        ("main", ["--version"]),
        *(("main", [command, "--help"]) for command in COMMANDS),
        ("run_main", ["--help"]),
        ("main", ["bench", "--tokens", "x"]),
        ("main", ["train", "--chunk", "x"]),
        ("run_main", []),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "nothing",
)
def test_help_and_wrong_usage_do_not_wait_for_torch(main, argv):
    assert not {"torch", "numpy"} & loaded(COMMAND.format(main=main, argv=argv))


@pytest.mark.parametrize("code", ["import thl_engine", "from thl_engine.train import TrainOptions"])
def test_plain_data_is_imported_without_torch(code):
    assert not {"torch", "numpy"} & loaded(code)


def test_what_training_exports_is_there():
    from thl_engine import train

    assert all(getattr(train, name) for name in train.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = train.nothing


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_reports_load_what_they_need(command, packed):
    given = ["--disk-bandwidth", "2", "--memory-bandwidth", "20"] if command == "plan" else []
    found = loaded(COMMAND.format(main="main", argv=[command, str(packed), *given]))
    assert "torch" in found and not HEAVY & found
    assert "thl_engine.engine.engine" not in found
    if command == "inspect":
        assert not any(name.startswith(("thl_engine.engine.", "thl_engine.ops.triton")) for name in found)


@pytest.mark.parametrize("first", ["", "import torch; "])
def test_the_garbage_collector_rests_only_while_a_command_loads(first, packed):
    """Of a program that has torch already, nothing is frozen."""
    argv = ["inspect", str(packed)]
    code = f"{first}import gc\n{COMMAND.format(main='main', argv=argv)}\nassert gc.isenabled()\n"
    loaded(code + f"assert bool(gc.get_freeze_count()) is {not first}")
