"""Which room may know which: models see no files or devices, the pager no architecture, kernels no configuration."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "thl_engine"

# Room -> what it may import besides itself: whole rooms, or single modules (or names) of one. Rooms are the folders of
# the package. The ground, what lies beside them and `config`, serves all but the kernels; so do the kernels and
# the compiled extensions, which import nothing of the rest. The front is the package's own __init__.
RULES: dict[str, set[str]] = {
    "kernels": set(),
    "ground": set(),
    "device": set(),
    "ops": {"device.cuda"},
    "models": {"ops.reference", "ops.weights", "ops.cached_attention"},
    "text": set(),
    "checkpoint": {"models.contract", "models.architecture", "models.ARCHITECTURES", "text"},
    "paging": {"checkpoint", "device", "ops.weights"},
    "engine": {"checkpoint", "device", "models", "ops", "paging", "text"},
    "train": {"checkpoint", "models", "ops", "text"},
    "report": {"checkpoint", "device", "engine", "models", "ops", "paging", "text"},
    "cli": {"checkpoint", "device", "engine", "models", "ops", "paging", "report", "text", "train"},
    "front": {"engine"},
}
OPEN_TO_ALL = {"ground", "kernels", "_native", "_cuda"}
GROUND_FOLDERS = {"config"}


def files_of(room: str) -> list[Path]:
    if room == "kernels":
        return sorted((ROOT / "kernels").rglob("*.py"))
    if room == "front":
        return [PACKAGE / "__init__.py"]
    if room == "ground":
        inside = [file for folder in GROUND_FOLDERS for file in (PACKAGE / folder).rglob("*.py")]
        return sorted({*PACKAGE.glob("*.py"), *inside} - {PACKAGE / "__init__.py"})
    return sorted((PACKAGE / room).rglob("*.py"))


def imported(file: Path) -> set[str]:
    """Modules of this project that a file imports, as "room.module"; a package is named by its room alone."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.removeprefix("thl_engine.") for name in names if name.split(".")[0] == "thl_engine"}
    return found


def room_of(name: str) -> str:
    first = name.split(".")[0]
    return first if first in RULES or first in OPEN_TO_ALL else "ground"


def allowed(room: str, name: str) -> bool:
    target = room_of(name)
    if target == room or (target in OPEN_TO_ALL and room not in ("kernels", "ground")):
        return True
    return any(name == rule or name.startswith(f"{rule}.") for rule in RULES[room])


def test_every_folder_is_a_room_with_a_rule():
    folders = {file.parent.name for file in PACKAGE.glob("*/__init__.py")} - {"kernels"} - GROUND_FOLDERS
    assert folders == RULES.keys() - {"kernels", "ground", "front"}


@pytest.mark.parametrize("room", RULES)
def test_a_room_imports_only_what_it_may(room):
    assert files_of(room)
    for file in files_of(room):
        for name in imported(file):
            assert allowed(room, name), f"{file.relative_to(ROOT)} imports {name}"


def test_rooms_form_no_circle():
    """The table lists rooms in an order in which each builds on earlier ones alone."""
    order = list(RULES)
    for room, rules in RULES.items():
        assert all(order.index(rule.split(".")[0]) < order.index(room) for rule in rules), room


def test_modules_form_no_circle():
    """Within rooms too, imports inside functions included."""
    edges: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        edges[name] = {target for target in map(module_named, imported(file)) if target not in (None, name)}
    seen: dict[str, int] = {}  # 1 while its imports are followed, 2 when they are done

    def follow(name: str, path: tuple[str, ...]) -> None:
        assert seen.get(name) != 1, " -> ".join((*path, name))
        if name in seen:
            return
        seen[name] = 1
        for target in sorted(edges.get(name, ())):
            follow(target, (*path, name))
        seen[name] = 2

    for name in sorted(edges):
        follow(name, ())


def module_named(name: str) -> str | None:
    """The module that an imported name is, or is of; packages' own __init__ count where they hold the name."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        path = PACKAGE.joinpath(*parts[:length])
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            return ".".join(parts[:length])
    return None


def test_triton_is_optional():
    """Without it the package imports, and the backend says what is missing."""
    program = (
        "import sys; sys.modules['triton'] = None\nimport thl_engine, thl_engine.cli\n"
        "from thl_engine.ops.backends import load_ops\n"
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
