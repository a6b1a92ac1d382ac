"""What an installation compiles and brings, and that it does without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from sharded_ema.cli import COMMANDS
from tests.helpers.checkpoints import make, meta, rows

ROOT = Path(__file__).parents[2]
pytest.importorskip("setuptools", reason="this environment was made without setuptools")


def build(into: Path, compiler: str | None) -> tuple[list[str], str]:
    """The extensions that are built, and what was said."""
    env = {name: value for name, value in os.environ.items() if name not in ("CC", "LDSHARED")}
    if compiler is not None:
        env["CC"] = compiler
    command = [sys.executable, "setup.py", "build_ext", "--force"]
    command += ["--build-lib", str(into), "--build-temp", str(into / "temporary")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [path.name for path in into.rglob("*.so")], done.stdout + done.stderr


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_an_installation_is_complete(compiler: str, tmp_path: Path) -> None:
    built, said = build(tmp_path, compiler)
    assert built == []
    assert 'building extension "sharded_ema.averaging.kernels.fused_cpu" failed' in said


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler here")
@pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    reason="this Python has no global lock, and no interface that one build could be for",
)
@pytest.mark.skipif(
    not Path(sysconfig.get_paths()["include"], "Python.h").exists(),
    reason="this Python came without its headers",
)
def test_one_build_serves_all_versions_of_python(tmp_path: Path) -> None:
    built, said = build(tmp_path, None)
    assert built == ["fused_cpu.abi3.so"], said
    assert "warning" not in said.split("fused_cpu.c", 1)[1].lower()


# ---------------------------------------------------------------------- without PyTorch

#: What is typed, in a directory with a run of two checkpoints in it.
TOOLS = """
inspect run --json
inspect run/step_2 --tensors
verify run/step_1
diff run/step_1 run/step_1
consolidate run/step_1 out
average run/step_1 run/step_2 --out mean
watch run --out served --once
synthesize run --sigma-rel 0.1 --out sweep --max-residual 9
advise --steps 1000
env
"""
# Leaves the standard library, this library, and what sharded-ema-core requires.
WITHOUT_THE_REST = """
import sys

class Only:
    def find_spec(self, name, path, target=None):
        top = name.partition(".")[0]
        allowed = sys.stdlib_module_names | {"sharded_ema", "numpy", "fsspec", "xxhash"}
        if top not in allowed and not top.startswith("_"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Only())
from sharded_ema.cli import main
for line in sys.stdin:
    if line.strip() and (status := main(line.split())):
        sys.exit(f"{line} ended with {status}")
import sharded_ema
try:
    sharded_ema.ShardedEMA
except ImportError as error:
    print(error)
if "torch" in sys.modules or main(["consolidate", "run/step_1", "x", "--format", "torch"]) != 2:
    sys.exit(3)
"""


@pytest.fixture
def two_checkpoints(tmp_path: Path) -> Path:
    schedule = {"type": "Power", "gamma": 6.94, "sigma_rel": None}
    profiles = {"ema": {"schedule": schedule, "decay": 0.9, "seed_weight": 0.0}}
    for step in (1, 2):
        said = meta(profiles=profiles, step=step, num_updates=step, last_lerp_step=step)
        tensors = {"ema.w": np.full((6, 5), step, "f4")}
        make(tmp_path / f"run/step_{step}", tensors, rows(2), metas={"": said}, uuid=f"{step:032x}")
    return tmp_path


def test_the_tools_do_without_pytorch(two_checkpoints: Path) -> None:
    assert {line.split()[0] for line in TOOLS.strip().splitlines()} == set(COMMANDS)
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_REST],
        input=TOOLS,
        cwd=two_checkpoints,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert "sharded_ema.ShardedEMA needs PyTorch" in ended.stdout
    assert "pip install sharded-ema" in ended.stdout
    assert "needs PyTorch" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.long
def test_an_installation_of_the_core(two_checkpoints: Path, tmp_path: Path) -> None:
    """As a login node has it; the index is asked for what it requires."""

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            command, cwd=two_checkpoints, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    environment = {name: v for name, v in os.environ.items() if name != "PYTHONPATH"}
    place = tmp_path / "venv"
    run(sys.executable, "-m", "venv", place)
    constraints = ROOT / "constraints.txt"
    run(place / "bin" / "pip", "install", "--quiet", "-c", constraints, str(ROOT))
    listed = run(place / "bin" / "pip", "list")
    assert "sharded-ema-core" in listed and "torch" not in listed
    for line in TOOLS.strip().splitlines():
        run(place / "bin" / "sharded-ema", *line.split())


# ---------------------------------------------------------------------- on other systems


# What macOS lacks, or may, is taken away.
WITHOUT_LINUX = """
import os, pathlib, sys
for name in ("preadv", "pwritev", "fdatasync", "posix_fadvise", "posix_fallocate", "sendfile",
             "copy_file_range", "sched_getaffinity", "memfd_create", "splice", "pipe2"):
    if hasattr(os, name):
        delattr(os, name)
del os.O_DIRECT, os.O_TMPFILE, os.O_PATH

def without_proc(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith("/proc"):
        raise FileNotFoundError(2, "No such file or directory", arguments[0])

import ctypes
class Library:
    def __init__(self, *arguments, **settings):
        raise OSError("no such library")
ctypes.CDLL = Library
stat, is_dir = os.stat, pathlib.Path.is_dir
os.stat = lambda path, **how: stat("/nowhere" if str(path).startswith("/proc") else path, **how)
pathlib.Path.is_dir = lambda self: not str(self).startswith("/proc") and is_dir(self)
sys.addaudithook(without_proc)
from sharded_ema.cli import main
for line in sys.stdin:
    if line.strip() and (status := main(line.split())):
        sys.exit(f"{line} ended with {status}")
"""


def test_the_tools_ask_for_nothing_that_only_linux_has(two_checkpoints: Path) -> None:
    lines = TOOLS.replace("\nenv", "")  # which asks PyTorch
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_LINUX],
        input=lines,
        cwd=two_checkpoints,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
