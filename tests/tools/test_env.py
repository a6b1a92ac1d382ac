"""What ``sharded-ema env`` says, where parts are missing too."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from sharded_ema import env
from sharded_ema.averaging.kernels import fused, launches
from sharded_ema.cli import main
from sharded_ema.version import __version__


def test_versions_and_the_kernel_of_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["facts"]
    assert facts["python"] == platform.python_version() and facts["sharded_ema"] == __version__
    assert facts["torch"] == torch.__version__
    told = facts["updates"]["cpu"]
    assert told.startswith("fused: one pass in C (" if fused.extension() else "foreach: ")
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert told in text and ("PyTorch sees no GPU" in text) != torch.cuda.is_available()


def test_an_extension_that_was_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "EXTENSION", f"{fused.EXTENSION}_of_another_build")
    told = env().facts["updates"]["cpu"]
    assert told.startswith("foreach: ") and "the C extension was not built" in told


def test_an_extension_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str, path: object, target: object = None) -> None:
        if name == fused.EXTENSION:
            raise ImportError("undefined symbol: PyExample")

    monkeypatch.delitem(sys.modules, fused.EXTENSION, raising=False)
    monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(find_spec=find_spec), *sys.meta_path])
    told = env().facts["updates"]["cpu"]
    assert "the C extension does not load: undefined symbol: PyExample" in told


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch says that it sees one, which is the CPU in truth."""
    monkeypatch.setattr("sharded_ema.tools.env._gpus", lambda torch: ["cpu"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Example 100")
    monkeypatch.setattr(launches, "MODULE", "types")  # a module that loads everywhere


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize(
    ("problem", "told"),
    [
        (None, "fused: one launch of a Triton kernel"),
        ("no such driver", "since Triton's does not work here: no such driver"),
    ],
)
def test_a_kernel_is_tried_out(
    monkeypatch: pytest.MonkeyPatch, problem: str | None, told: str
) -> None:
    monkeypatch.setattr(launches.LaunchTable, "try_out", lambda self, *, guard: problem)
    assert env().facts["updates"]["cpu (Example 100)"].endswith(told)


@pytest.mark.usefixtures("a_gpu")
def test_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "MODULE", "sharded_ema_without_triton")
    told = env().facts["updates"]["cpu (Example 100)"]
    assert told.startswith("foreach: ") and "since Triton does not load: No module named" in told


WITHOUT_TORCH = """
import sys
from importlib import metadata

class Without:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'")

def version(name, found=metadata.version):
    if name == "torch":
        raise metadata.PackageNotFoundError(name)
    return found(name)

metadata.version = version
sys.meta_path.insert(0, Without())
from sharded_ema.cli import main
sys.exit(main(["env"]))
"""


def test_it_runs_without_torch() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=True
    )
    assert "torch:       not installed" in ended.stdout and "updates" not in ended.stdout
    assert "averages need PyTorch, the other commands do not" in ended.stdout
