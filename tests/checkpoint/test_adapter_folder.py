"""HRM-Gemma's folder: adapters in PEFT's format beside recurrent modules, on a base that lies elsewhere."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import CHARACTERS, FIXTURES, load_case, read_float, reasoning_case
from safetensors.torch import load_file, save_file

from thl_engine import CheckpointError, ConfigError, Engine
from thl_engine.checkpoint.adapter_folder import FOLDERS, write_adapters
from thl_engine.checkpoint.convert import quantize_checkpoint
from thl_engine.checkpoint.spool import tensor_sources
from thl_engine.checkpoint.store import open_store
from thl_engine.config import parse_config

CASE = load_case(FIXTURES / "gemma3n" / "forward48")
CONFIG, WEIGHTS = reasoning_case()
PARSED = parse_config(CONFIG)
TOKENS = torch.randint(110, (1, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The recorded base as a published folder, with a vocabulary."""
    path = tmp_path_factory.mktemp("models") / "base"
    path.mkdir()
    save_file(CASE.weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({**CASE.config, "model_type": "gemma3n_text"}))
    more = [chr(code) for code in range(200, 213)]
    (path / "vocab.json").write_text(json.dumps({char: i for i, char in enumerate([*CHARACTERS, *more])}))
    return path


@pytest.fixture
def folder(base, tmp_path) -> Path:
    write_adapters(tmp_path / "tuned", PARSED, str(base), tensor_sources(WEIGHTS, "weights"))
    return tmp_path / "tuned"


def expected(**options) -> torch.Tensor:
    return Engine.from_state_dict("hrm_gemma3n", CONFIG, WEIGHTS, device="cpu", **options).forward(TOKENS)[0]


def test_base_and_adapters_as_one_model(folder, base, backend):
    assert sorted(load_file(folder / "l_adapter" / "adapter_model.safetensors"))[0] == (
        "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"
    )
    wanted = expected(backend=backend)
    for options in ({}, {"stream": True}, {"stream": False}):
        with Engine.from_pretrained(folder, device="cpu", backend=backend, **options) as engine:
            assert engine.model_type == "hrm_gemma3n" and engine.config == PARSED
            assert torch.equal(engine.forward(TOKENS)[0], wanted)
            assert engine.tokenizer.encode("é") == [1]


def test_an_int8_base_keeps_its_pages_and_the_adapters_stay_floats(folder, base, tmp_path, backend):
    quantize_checkpoint(base, tmp_path / "base.int8.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"base_model": "../base.int8.safetensors"}
    (folder / "config.json").write_text(json.dumps(config))
    with open_store(folder) as store:
        kinds = {store.tensors[name].dtype for name in WEIGHTS if name.startswith("hrm.") or "lora_" in name}
        assert kinds == {torch.float32}
        assert store.tensors["model.layers.3.mlp.up_proj.weight"].dtype == torch.int8
        assert [page.index for page in store.pages] == list(range(len(store.pages)))
        for name, values in WEIGHTS.items():
            if store.tensors[name].dtype == torch.float32:
                assert torch.equal(store.read(name), values), name
        widened = {name: read_float(store, name) for name in WEIGHTS}
        widened |= {name: widened[name].T.contiguous() for name in WEIGHTS if store.tensors[name].transposed}
    resident = Engine.from_pretrained(folder, device="cpu", backend=backend).forward(TOKENS)[0]
    with Engine.from_pretrained(folder, device="cpu", backend=backend, stream=True) as engine:
        assert torch.equal(engine.forward(TOKENS)[0], resident)
    wanted = Engine.from_state_dict("hrm_gemma3n", CONFIG, widened, device="cpu", backend=backend).forward(TOKENS)[0]
    assert (resident - wanted).abs().max() < 1e-3 * wanted.abs().max()


def test_quantised_to_one_file(folder, tmp_path, succeeds):
    out = tmp_path / "one.safetensors"
    assert succeeds("quantize", folder, out).strip() == str(out)
    wanted = expected(quantize="int8")
    assert torch.equal(Engine.from_pretrained(out, device="cpu").forward(TOKENS)[0], wanted)
    assert torch.equal(Engine.from_pretrained(folder, device="cpu", quantize="int8").forward(TOKENS)[0], wanted)


def test_commands_on_a_fresh_model(base, tmp_path, succeeds, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reasoning.json").write_text(json.dumps({"hrm": CONFIG["hrm"]}))
    argv = ["init", "--model-type", "hrm_gemma3n", "--base", base, "--config", "reasoning.json"]
    assert succeeds(*argv, "fresh", "--seed", 3) == "fresh\n"
    fresh = Engine.from_pretrained("fresh", device="cpu")
    plain = Engine.from_pretrained(base, device="cpu")
    assert torch.equal(fresh.forward(TOKENS)[0], plain.forward(TOKENS)[0])
    assert fresh.config.hrm == PARSED.hrm
    again = tmp_path / "again"
    succeeds(*argv, again, "--seed", 3)
    assert (again / "hrm.safetensors").read_bytes() == (tmp_path / "fresh" / "hrm.safetensors").read_bytes()
    assert "hrm_gemma3n" in succeeds("inspect", "fresh") and "least budget" in succeeds("plan", "fresh")
    succeeds("inspect", "fresh", "--verify")
    assert len(succeeds("run", "--model", "fresh", "--prompt", "To be", "--max-new-tokens", 4, "--temperature", 0)) > 4
    run = ["run", "--model", "fresh", "--prompt", "To be", "--max-new-tokens", 3, "--seed", 1, "--json"]
    for options, most in (([], 3), (["--max-cycles", 1], 1), (["--mode", "math", "--max-cycles", 2], 2)):
        stats = json.loads(succeeds(*run, *options))["stats"]
        assert stats["cycles_per_token"] == most and 1 <= stats["L_steps_per_cycle"] <= (8 if "math" in options else 4)
        assert stats["q_halt"] == stats["q_continue"] == -5.0 and stats["L_residual"] > 0
    succeeds(*run[:-1], "--stats", "--save-state", "context", "--mode", "agent")
    assert "reasoning         3.00 cycles a token" in succeeds.err
    stats = json.loads(succeeds(*run, "--state", "context", "--max-cycles", 2))["stats"]
    assert stats["cycles_per_token"] == 2
    line = fails("run", "--model", base, "--mode", "math", "--prompt", "a")
    assert "no such option; these have: hrm, hrm_text, hrm_gemma3n" in line
    assert "max_cycles is 0" in fails(*run, "--max-cycles", 0)
    assert "not an empty folder" in fails(*argv, "fresh")
    assert "not thl" in fails("init", "--base", base, "--model-type", "thl", "other")
    assert "a hrm_gemma3n model; it must be a gemma3n checkpoint" in fails("init", "--base", "fresh", "other")


def test_a_relative_base_moves_with_the_folder(tmp_path, base, succeeds, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "base").symlink_to(base)
    succeeds("init", "--base", "old/base", "old/fresh")
    assert json.loads((tmp_path / "old" / "fresh" / "config.json").read_text())["base_model"] == "../base"
    (tmp_path / "old").rename(tmp_path / "new")
    assert open_store(tmp_path / "new" / "fresh").model_type == "hrm_gemma3n"


def edited(file: Path, **changes) -> None:
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


@pytest.mark.parametrize(
    ("file", "changes", "error", "message"),
    [
        ("config.json", {"base_model": ...}, ConfigError, "base_model is None; it must be the path"),
        ("config.json", {"base_model": "nowhere"}, CheckpointError, "base_model: .*nowhere: cannot open"),
        ("config.json", {"base_model": "."}, ConfigError, "holds adapters itself"),
        ("config.json", {"model_type": "gemma3n"}, ConfigError, "model_type is 'gemma3n', but 'hrm_gemma3n'"),
        ("config.json", {"hidden_size": 41}, ConfigError, "hidden_size is 41, but the base has 40; leave it out"),
        ("config.json", {"hidden_sise": 41}, ConfigError, "unknown field 'hidden_sise'"),
        ("config.json", {"hrm": {}}, CheckpointError, "l_adapter/adapter_config.json: r is 2; it must be 32.*L_rank"),
        ("h_adapter/adapter_config.json", {"r": 4}, CheckpointError, r"r is 4; it must be 3, as .* \(H_rank\)"),
        ("h_adapter/adapter_config.json", {"lora_alpha": 4}, CheckpointError, "lora_alpha is 4; it must be 5.0"),
        (
            "l_adapter/adapter_config.json",
            {"peft_type": "IA3"},
            CheckpointError,
            "peft_type is 'IA3'; it must be 'LORA'",
        ),
        (
            "l_adapter/adapter_config.json",
            {"use_rslora": True},
            CheckpointError,
            "use_rslora is True; adapters with it",
        ),
        *(
            (
                "h_adapter/adapter_config.json",
                {"init_lora_weights": kind},
                CheckpointError,
                f"init_lora_weights is '{kind}'",
            )
            for kind in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga")
        ),
        (
            "l_adapter/adapter_config.json",
            {"use_doraa": True},
            CheckpointError,
            "unknown field 'use_doraa'; did you mean 'use_dora'",
        ),
        ("l_adapter/adapter_config.json", {"rank_pattern": {"q_proj": 8}}, CheckpointError, "rank_pattern is"),
        ("l_adapter/adapter_config.json", {"bias": "all"}, CheckpointError, "bias is 'all'; supported is 'none'"),
    ],
)
def test_descriptions_that_do_not_fit(folder, file, changes, error, message):
    edited(folder / file, **changes)
    with pytest.raises(error, match=message):
        open_store(folder)


def test_descriptions_that_other_tools_have_written(folder):
    for start in (True, False, "gaussian", "orthogonal", "eva", None):
        edited(
            folder / "l_adapter" / "adapter_config.json",
            init_lora_weights=start,
            unsloth_fixed=True,
            peft_version="0.18",
        )
        edited(folder / "config.json", unsloth_version="2025.7.1", torchscript=False)
        open_store(folder)


def test_tensors_that_do_not_fit(folder):
    module = "base_model.model.model.layers.1.self_attn.q_proj"
    file = folder / "l_adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    for changed, message in (
        ({f"{module}.lora_A.weight": None}, r"layers.1.self_attn.q_proj.lora_A.weight' \[2, 40\] is missing"),
        ({f"{module}.lora_A.weight": torch.ones(3, 40)}, r"has shape \[3, 40\], the config needs \[2, 40\]"),
        ({f"{module}.lora_A.weight": torch.ones(2, 40).double()}, "is F64; save it as"),
        ({"base_model.model.model.norm.weight": torch.ones(40)}, "is no part of this hrm_gemma3n model"),
        ({"hrm.P_out.weight": torch.ones(40, 23)}, "'hrm.P_out.weight' is in .*adapter_model.safetensors as well"),
    ):
        save_file({name: value for name, value in (tensors | changed).items() if value is not None}, file)
        with pytest.raises(CheckpointError, match=message):
            open_store(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match="adapter_model.safetensors: cannot open"):
        open_store(folder)


def test_a_folder_without_its_configuration(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="config.json: no such file; the folder of an hrm_gemma3n"):
        open_store(folder)


@pytest.mark.skipif(not (find_spec("peft") and find_spec("transformers")), reason="needs peft and transformers")
def test_peft_loads_the_adapters_and_computes_the_same(base, tmp_path):
    """Both adapters on the published implementation of the base; without the recurrence, which PEFT does not know."""
    from peft import PeftModel
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    still = WEIGHTS | {"hrm.P_out.weight": torch.zeros_like(WEIGHTS["hrm.P_out.weight"])}
    write_adapters(tmp_path / "still", PARSED, str(base), tensor_sources(still, "weights"))
    published = Gemma3nForCausalLM(Gemma3nTextConfig(**CASE.config)).eval()
    published.load_state_dict(CASE.weights, strict=False)
    model = PeftModel.from_pretrained(published, tmp_path / "still" / "l_adapter", adapter_name="L")
    model.load_adapter(tmp_path / "still" / "h_adapter", adapter_name="H")
    model.base_model.set_adapter(["L", "H"])
    with torch.no_grad():
        wanted = model(input_ids=TOKENS).logits
    got = Engine.from_pretrained(tmp_path / "still", device="cpu").forward(TOKENS)[0]
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    model.save_pretrained(tmp_path / "saved")  # what PEFT writes is read as well
    for side, name in FOLDERS.items():
        (tmp_path / "still" / name).rename(tmp_path / name)
        (tmp_path / "saved" / side).rename(tmp_path / "still" / name)
    assert torch.equal(Engine.from_pretrained(tmp_path / "still", device="cpu").forward(TOKENS)[0], got)
