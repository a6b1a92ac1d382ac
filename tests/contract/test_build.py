"""What an installation compiles, and that it does without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

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
    not Path(sysconfig.get_paths()["include"], "Python.h").exists(),
    reason="this Python came without its headers",
)
def test_one_build_serves_all_versions_of_python(tmp_path: Path) -> None:
    built, said = build(tmp_path, None)
    assert len(built) == 1
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        assert built == ["fused_cpu.abi3.so"], said
    assert "warning" not in said.split("fused_cpu.c", 1)[1].lower()
