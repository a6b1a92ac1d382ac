"""The one-way road between the parts, and what an import may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "sharded_ema"

# A module may import from its own room and from rooms of a lower level. Rooms of one level are
# siblings and never import each other. The longest matching prefix decides.
LEVEL = {
    "sharded_ema.version": 0,
    "sharded_ema.errors": 0,
    "sharded_ema.model.layout": 1,
    "sharded_ema.averaging.schedules": 1,
    "sharded_ema.averaging.posthoc": 2,
    "sharded_ema.config": 2,
    "sharded_ema.averaging.kernels": 2,
    "sharded_ema.model": 3,
    "sharded_ema.averaging": 4,
    "sharded_ema.checkpoint": 5,
    "sharded_ema.checkpoint.names": 5,
    "sharded_ema.checkpoint.checked_json": 5,
    "sharded_ema.checkpoint.dtypes": 5,
    "sharded_ema.checkpoint.files": 6,
    "sharded_ema.checkpoint.durable": 6,
    "sharded_ema.checkpoint.engine": 6,
    "sharded_ema.checkpoint.safetensors": 7,
    "sharded_ema.checkpoint.reading": 8,
    "sharded_ema.checkpoint.run": 9,
    "sharded_ema.checkpoint.removal": 10,
    "sharded_ema.checkpoint.storage_reader": 10,
    "sharded_ema.checkpoint.writing": 11,
    "sharded_ema.checkpoint.transfer": 12,
    "sharded_ema.averaging.average": 13,
    "sharded_ema.checkpoint.snapshot": 13,
    "sharded_ema.checkpoint.store": 14,
    "sharded_ema.tools": 14,
    "sharded_ema.ema": 15,
    "sharded_ema.cli": 15,
    "sharded_ema.__main__": 16,
    "sharded_ema": 17,
}
# Consolidation runs where PyTorch is not installed.
TORCH_FREE = (
    "errors",
    "model/__init__",
    "model/layout",
    "averaging/__init__",
    "averaging/schedules",
    "averaging/posthoc",
    "config",
    "version",
    "cli",
    "__main__",
    "tools",
    "checkpoint/__init__",
    "checkpoint/names",
    "checkpoint/checked_json",
    "checkpoint/files",
    "checkpoint/durable",
    "checkpoint/safetensors",
    "checkpoint/reading",
    "checkpoint/run",
    "checkpoint/removal",
    "checkpoint/writing/__init__",
    "checkpoint/writing/target",
    "__init__",
)


def room(module: str) -> str:
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        if prefix in LEVEL and (prefix != "sharded_ema" or module == "sharded_ema"):
            return prefix
    raise AssertionError(f"{module} has no place in the order of layers; add it to LEVEL")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "sharded_ema" or node.module.startswith("sharded_ema."):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found += [n if is_module(n) else node.module for n in names]
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] == "sharded_ema"]
    return found


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def violations(name: str, source: str) -> list[str]:
    home = room(name)
    wrong = []
    for target in imports(source):
        there = room(target)
        if there != home and LEVEL[there] >= LEVEL[home]:
            wrong.append(f"{name} imports {target}")
    return wrong


def test_imports_go_one_way() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        wrong += violations(module_name(path), path.read_text())
    assert not wrong


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        module_name(path): {t for t in imports(path.read_text()) if t != module_name(path)}
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "__init__.py"  # which loads names on first use
    }
    assert not circle(graph)
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}), "the check can fail"


def circle(graph: dict[str, set[str]]) -> set[str]:
    """The modules of which each leads to another one of them."""
    left = dict(graph)
    while ends := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in ends}
    return set(left)


def test_the_check_can_fail() -> None:
    assert violations(
        "sharded_ema.averaging.kernels.foreach", "from sharded_ema.ema import ShardedEMA"
    )
    assert violations("sharded_ema.model.sources.ddp", "import sharded_ema.averaging.shadow")
    assert violations("sharded_ema.averaging.shadow", "from sharded_ema import ema")
    assert not violations(
        "sharded_ema.averaging.shadow", "from sharded_ema.averaging.kernels import LerpPlan"
    )


def test_torch_free_modules_name_no_torch() -> None:
    for path in PACKAGE.rglob("*.py"):
        short = path.relative_to(PACKAGE).with_suffix("").as_posix()
        if short.startswith(TORCH_FREE):
            names = {n.split(".")[0] for n in all_imports(path.read_text())}
            assert "torch" not in names, path


def test_nothing_can_unpickle() -> None:
    for path in PACKAGE.rglob("*.py"):
        names = {n.split(".")[0] for n in all_imports(path.read_text())}
        assert not names & {"pickle", "_pickle", "cPickle", "dill", "marshal", "shelve"}, path


def all_imports(source: str) -> list[str]:
    tree = ast.parse(source)
    # Imports under TYPE_CHECKING do not run.
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


def loaded_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import sharded_ema",
        "import sharded_ema as s; s.consolidate; s.diff; s.inspect; s.verify; s.watch; s.HalfLife",
        "import sharded_ema as s; s.synthesize; s.average",
        "import sharded_ema.cli",
    ],
)
def test_tools_start_without_torch(code: str) -> None:
    assert "torch" not in loaded_by(code)


def test_averaging_loads_no_optional_package() -> None:
    loaded = loaded_by("from sharded_ema import ShardedEMA")
    assert "torch" in loaded, "the check can see what is loaded"
    loaded -= loaded_by("import torch.distributed.checkpoint")  # which may load Triton
    assert not loaded & {"deepspeed", "triton", "transformers", "matplotlib", "safetensors"}
