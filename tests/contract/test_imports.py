"""The one-way road between the parts, and what an import may load."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "sharded_ema"

# The order of the wings is that of the picture in docs/design.md: a module imports from its own
# wing and from those of lower rows. Wings of one row never import each other.
_spec = importlib.util.spec_from_file_location("diagram", PACKAGE.parent / "docs" / "diagram.py")
assert _spec is not None and _spec.loader is not None
diagram = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(diagram)
LEVEL = {wing.name: number for number, row in enumerate(reversed(diagram.ROWS)) for wing in row} | {
    "__main__": len(diagram.ROWS),
    "": len(diagram.ROWS) + 1,
}
# And within a wing, from the ground up. What is not named here is between the first and the last.
ORDER = {
    "model": ("layout", "internals", "inventory", "pieces", "agreement", "sources", "followed"),
    "averaging": ("schedules", "forgetting", "kernels", "shadow", "average", "health"),
    "checkpoint": (
        "names", "files", "safetensors", "reading", "run", "removal", "writing", "transfer",
        "store",
    ),
}  # fmt: skip
# Consolidation runs where PyTorch is not installed.
TORCH_FREE = (
    "errors",
    "model/__init__",
    "model/layout",
    "averaging/__init__",
    "averaging/forgetting",
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


def wing(module: str) -> str:
    name = module.removeprefix("sharded_ema").removeprefix(".").partition(".")[0]
    assert name in LEVEL, f"{module} has no place in the order of wings; add it to docs/diagram.py"
    return name


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
    home = wing(name)
    wrong = []
    for target in imports(source):
        there = wing(target)
        if there != home and LEVEL[there] >= LEVEL[home]:
            wrong.append(f"{name} imports {target}")
        elif there == home and _place(target) > _place(name) >= 0:
            wrong.append(f"{name} imports {target}, which comes later in its wing")
    return wrong


def _place(module: str) -> int:
    """The position of a module in the order of its wing; -1 if it has none."""
    _, _, rest = module.removeprefix("sharded_ema.").partition(".")
    order = ORDER.get(wing(module), ())
    first = rest.partition(".")[0]
    return order.index(first) if first in order else -1


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
    for name, source in (
        ("averaging.kernels.batches", "from sharded_ema.ema import ShardedEMA"),
        ("model.sources.ddp", "import sharded_ema.averaging.shadow"),
        ("averaging.shadow", "from sharded_ema import ema"),
        ("tools.plan", "from sharded_ema import ema"),
        ("checkpoint.reading.opened", "from sharded_ema.checkpoint.writing import target"),
    ):
        assert violations(f"sharded_ema.{name}", source), name
    fine = "from sharded_ema.averaging.kernels import LerpPlan"
    assert not violations("sharded_ema.averaging.shadow", fine)


def test_the_picture_of_the_wings_is_up_to_date() -> None:
    assert diagram.PICTURE.read_text() == diagram.draw(), "run python docs/diagram.py"


def test_private_members_of_frameworks_stay_in_one_place() -> None:
    """Names with an underscore that a module has not made itself belong to model/internals."""
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        if "internals" not in path.parts:
            wrong += [f"{path.relative_to(PACKAGE)}: {name}" for name in private(path.read_text())]
    assert not wrong
    assert private("import torch\ntorch._foreach_lerp_(a)") == ["_foreach_lerp_"]
    assert private("from torch.distributed._composable import replicate") == ["_composable"]
    assert not private("class A:\n  def __init__(self):\n    self._x = 1\n\nb._x")


def private(source: str) -> list[str]:
    """Private names that a module takes from elsewhere."""
    tree = ast.parse(source)
    own = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in ("self", "cls"):
                own.add(node.attr)
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            own |= {t.id for t in targets if isinstance(t, ast.Name)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in own:
            found.append(node.attr)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [alias.name for alias in node.names]
            module = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            parts = [part for name in module + names for part in name.split(".")]
            found += [part for part in parts if _is_private(part)]
    return found


def _is_private(name: str) -> bool:
    if name == "_exit":  # of os, which its documentation has
        return False
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


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
