"""Which room may know which: models see no files or devices, the pager no architecture, kernels no configuration."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "thl_engine"

# module -> modules of this project that it may import; the table lists the rooms that others build on
ALLOWED = {
    "errors": set(),
    "schedule": set(),
    "published_config": {"errors"},
    "config": {"errors", "published_config"},
    "quant": {"errors"},
    "weights": {"schedule"},
    "native": {"_native"},
    "caching_allocator": set(),
    "device_memory": {"cuda", "errors", "transfer"},
    "cuda": {"_cuda", "_native", "kernels"},
    "sampler": {"errors"},
    "adapter_folder": {"config", "errors", "index", "models", "pack", "published_config"},
    "token_stream": {"errors"},
    "char_vocabulary": {"errors", "token_stream"},
    "tokenizer": {"char_vocabulary", "chat_template", "errors", "token_stream"},
    "product": {"native", "weights"},
    "cached_attention": {"kernels"},
    "compositions": {"weights"},
    "triton_products": {"cuda", "kernels", "ops", "weights"},
    "ops": {
        "cached_attention",
        "compositions",
        "errors",
        "kernels",
        "native",
        "product",
        "state_ops",
        "triton_ops",
        "weights",
    },
    "state_ops": {"kernels", "weights"},
    "triton_state": {"kernels", "ops", "weights"},
    "triton_ops": {
        "cached_attention",
        "kernels",
        "ops",
        "triton_attention",
        "triton_products",
        "triton_state",
        "weights",
    },
    "triton_attention": {"cached_attention", "kernels"},
    "graphs": {"weights"},
    "trace": set(),
    "transfer": {"_native", "cuda", "errors", "reader"},
    "pager": {"checksum", "errors", "reader", "store", "transfer", "weights"},
    "plan": {"errors", "pager", "schedule", "store"},
    "models.thl": {"config", "errors", "models", "schedule"},
    "models.hrm": {"config", "errors", "models", "schedule"},
    "models.inl": {"cached_attention", "config", "errors", "kernels", "models", "schedule"},
    "models.inl_modules": {"schedule"},
    "models.hrm_gemma3n": {"config", "errors", "models", "schedule", "weights"},
    "models.low_rank": {"config", "models", "schedule", "weights"},
    "models.gemma3n": {"cached_attention", "config", "errors", "kernels", "models", "schedule", "weights"},
    "models.kv_cache": {"errors", "models"},
    "models.state_fields": {"errors"},
    "generation": {"sampler", "tokenizer"},
    "chat_template": {"errors"},
    "hrm_chat": {"engine", "sampler", "tokenizer"},
    "hrm_tokenizer": {"char_vocabulary", "errors", "index", "tokenizer"},
    "growth": {"config", "errors", "hrm_tokenizer", "models", "pack", "schedule", "spool", "store"},
    "train.objectives": {"errors", "hrm_tokenizer", "models", "train"},
}


def imports(file: Path) -> set[str]:
    """First-level modules of thl_engine that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("thl_engine.")}
    return found


@pytest.mark.parametrize("module", ALLOWED)
def test_a_module_imports_only_what_it_may(module):
    file = PACKAGE / f"{module.replace('.', '/')}.py"
    assert imports(file) <= ALLOWED[module]


def test_kernels_know_tensors_only():
    for file in (ROOT / "kernels").rglob("*.py"):
        assert imports(file) <= {"kernels"}, file.name


def test_triton_is_optional():
    """Without it the package imports, and the backend says what is missing."""
    program = (
        "import sys; sys.modules['triton'] = None\nimport thl_engine, thl_engine.cli\n"
        "from thl_engine.ops.reference import load_ops\n"
        "try: load_ops('triton', 'cuda')\n"
        "except thl_engine.ConfigError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.startswith("backend 'triton' is not available"), found.stdout + found.stderr


def test_nothing_unpickles():
    for file in [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}, file.name
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert options.get("weights_only") == "True", file.name
