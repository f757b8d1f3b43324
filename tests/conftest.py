"""Shared by the tests: the recorded cases, the backends that this machine has, and small random models."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton_device  # noqa: F401  before anything else imports triton
from safetensors.torch import load_file, save_file

from thl_engine.checkpoint.convert import quantize_checkpoint
from thl_engine.checkpoint.store import Store
from thl_engine.cli import main
from thl_engine.config import THLConfig, parse_config
from thl_engine.kernels.int8 import dequantize
from thl_engine.models import hrm_gemma3n, thl
from thl_engine.ops import native

FIXTURES = Path(__file__).parent / "fixtures"
RECORDED = Path(__file__).parents[2] / "shared" / "parity"  # more cases may lie here than in the repository
BACKENDS = ["reference", *(["native"] if native.available() else [])]
ISAS = native.available_isas() if native.available() else []


def pytest_addoption(parser):
    parser.addoption("--isa", help="the instruction set of native kernels, where a test chooses none itself")


def pytest_configure(config):
    if config.getoption("--isa"):
        native.set_isa(config.getoption("--isa"))


@dataclass(frozen=True)
class Case:
    """One recorded run of a published implementation."""

    name: str
    config: dict
    meta: dict
    weights: dict[str, torch.Tensor]
    io: dict[str, torch.Tensor]


def cases(model: str) -> list[Path]:
    """Folders of the recorded cases of a model: those in the repository, and further ones beside it."""
    here = {folder.name: folder for folder in sorted((FIXTURES / model).iterdir())}
    beside = sorted((RECORDED / model).iterdir()) if (RECORDED / model).is_dir() else []
    return list({**{folder.name: folder for folder in beside}, **here}.values())


def load_case(folder: Path) -> Case:
    meta = json.loads((folder / "config.json").read_text())
    return Case(
        folder.name,
        meta["config"],
        meta,
        load_file(folder / "weights.safetensors"),
        load_file(folder / "io.safetensors"),
    )


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def poison(monkeypatch):
    """Results begin as NaN, or an absurd integer, so that one that is not written shows."""
    empty = torch.empty

    def poisoned(*shape, **options):
        out = empty(*shape, **options)
        return out.fill_(float("nan") if out.dtype.is_floating_point else torch.iinfo(out.dtype).min)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def native_settings():
    """Fresh random numbers and, afterwards, the instruction set and threads as they were."""
    torch.manual_seed(0)
    isa, threads = native.isa(), native.threads()
    yield
    native.set_isa(isa)
    native.set_threads(threads)


@pytest.fixture(params=ISAS)
def isa(request):
    native.set_isa(request.param)
    return request.param


def random_weights(config: THLConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """A whole state dict of random values in which every tensor matters."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for block in thl.blocks(config):
        values = torch.randn(block.shape, generator=generator)
        if block.kind == "vector":
            values = values * 0.1 + (1.0 if block.name == "layer_norm.weight" else 0.0)
        elif block.kind != "table":
            values = values * (2.0 / block.shape[1]) ** 0.5
        weights[block.name] = values
    return weights


SMALL = THLConfig(
    vocab_size=97,
    embedding_dim=24,
    num_tiers=3,
    tier_dims=(40, 28, 33),
    tier_timescales=(1, 3, 4),
    local_window=5,
    memory_slots=11,
    memory_dim=19,
    query_dim=7,
    value_dim=20,
    num_heads=4,
    head_dim=6,
    read_topk=3,
    write_slots=2,
    novelty_theta=0.25,
)


@pytest.fixture
def small() -> tuple[dict, dict[str, torch.Tensor]]:
    """Configuration and weights of a small model with odd sizes."""
    return SMALL.to_dict(), random_weights(SMALL)


def reasoning_case() -> tuple[dict, dict[str, torch.Tensor]]:
    """Configuration and weights of HRM-Gemma on a recorded base: odd sizes, every tensor matters, stops come early."""
    case = load_case(FIXTURES / "gemma3n" / "forward48")
    fields = {
        **case.config,
        "hrm": {
            "L_size": 17,
            "H_size": 23,
            "cycles": 3,
            "L_steps": 4,
            "L_threshold": 0.9,
            "L_rank": 2,
            "L_alpha": 3,
            "H_rank": 3,
            "H_alpha": 5,
        },
    }
    config, generator = parse_config(fields, "hrm_gemma3n"), torch.Generator().manual_seed(7)
    weights = dict(case.weights)
    for block in hrm_gemma3n.blocks(config):
        if block.name not in weights:
            values = torch.randn(block.shape, generator=generator)
            scale = 0.3 if len(block.shape) == 1 or "lora_" in block.name else block.shape[1] ** -0.5
            weights[block.name] = scale * values + (1.0 if block.name.endswith("norm.weight") else 0.0)
    return config.to_dict(), weights


CHARACTERS = ["\n", "é", *(chr(code) for code in range(32, 127))]  # as many as SMALL has ids


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> Path:
    """A checkpoint as published, with a character vocabulary."""
    path = tmp_path_factory.mktemp("models") / "plain"
    path.mkdir()
    save_file(random_weights(SMALL), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(SMALL.to_dict()))
    (path / "vocab.json").write_text(json.dumps({char: i for i, char in enumerate(CHARACTERS)}))
    return path


@pytest.fixture(scope="session")
def packed(plain) -> Path:
    """The same in int8, packed."""
    path = plain.parent / "packed.safetensors"
    quantize_checkpoint(plain, path)
    return path


@pytest.fixture
def succeeds(capsys) -> Callable[..., str]:
    """Runs a command that must succeed; returns what it printed."""

    def run(*argv: object) -> str:
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        found = capsys.readouterr()
        run.err = found.err
        assert code == 0, found.err
        return found.out

    return run


@pytest.fixture
def fails(capsys) -> Callable[..., str]:
    """Runs a command that must fail with one line; returns that line."""

    def run(*argv: object) -> str:
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        found = capsys.readouterr()
        lines = found.err.splitlines()
        assert code == 1 and found.out == "", found
        assert len(lines) == 1 and lines[0].startswith("thl: error: ") and "Traceback" not in lines[0], found.err
        return lines[0]

    return run


TIE_ORDER = {"slots256": {"router_indices", "router_alpha"}}


def prefix(case: Case) -> str:
    """Keys of the lowest-index tie rule; a case without ties records only one run."""
    return "lowest_index." if any(key.startswith("lowest_index.") for key in case.io) else ""


MODELS = {
    "thl": "batch3",
    "inl": "full_forward_early",
    "him": "encode3",
    "hrm": "forward_n2t2",
    "hrm_text": "causal",
    "gemma3n": "forward48",
    "gemma4": "forward40",
    "hrm_gemma3n": None,
}  # has no recording


def configured(model: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Configuration and weights: of a recorded case, where there is one."""
    if MODELS[model] is None:
        return reasoning_case()
    case = load_case(next(folder for folder in cases(model) if folder.name == MODELS[model]))
    return case.config, case.weights


CONFIGS = {
    "inl": {
        "d_model": 24,
        "num_layers": 2,
        "num_heads": 2,
        "num_iterations_per_layer": 6,
        "feedforward_dim": 40,
        "max_seq_len": 40,
        "hierarchical_group_size": 7,
    },
    "him": {
        "embed_dim": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "num_encoder_layers": 3,
        "dim_feedforward": 40,
        "max_answer_len": 5,
        "mem_slots": 3,
        "mem_rank": 8,
        "reasoning_tokens": 6,
        "max_seq_len": 20,
    },
    "hrm": {"hidden_size": 24, "num_heads": 2, "L_layers": 1, "H_layers": 1, "halt_max_steps": 3},
}


def entries(text: str) -> dict[str, int]:
    """The published numbering: four special tokens, then characters by first appearance."""
    out = {"<PAD>": 0, "<UNK>": 1, "<BOS>": 2, "<EOS>": 3}
    for char in text:
        out.setdefault(char, len(out))
    return out


def read_float(store: Store, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Rows [start, stop) of a stored tensor as float32, int8 ones multiplied by their scales."""
    tensor = store.tensors[name]
    scales = None if tensor.scales is None else store.read(tensor.scales, start, stop)
    return dequantize(store.read(name, start, stop), scales, tensor.group)
