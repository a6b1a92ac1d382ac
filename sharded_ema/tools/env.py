"""``env``: what is installed here, and which implementation moves an average on which device."""

from __future__ import annotations

import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sharded_ema.tools.report import Report
from sharded_ema.version import __version__

_PACKAGES = ("torch", "triton", "deepspeed", "numpy", "safetensors")
_KERNELS = "sharded_ema.averaging.kernels"
_IN_BATCHES = "updates go through PyTorch's kernels, in batches"


def env() -> Report:
    """Say which versions are installed, and what updates an average on the CPU and on each GPU.

    Returns:
        A report; it checks nothing, so it is always ``ok``.
    """
    report = Report("env", platform.node() or "this machine")
    report.facts |= {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "sharded_ema": __version__,
        **{name: _version(name) for name in _PACKAGES},
    }
    try:
        torch: Any = import_module("torch")
    except ImportError as error:
        report.notes.append(f"averages need PyTorch, the other commands do not: {error}")
        return report
    report.facts["updates"] = {"cpu": _on_the_cpu(torch)}
    gpus = _gpus(torch)
    if not gpus:
        report.notes.append("PyTorch sees no GPU of CUDA or ROCm, for which there is a kernel too")
    for device in gpus:
        name = torch.cuda.get_device_name(device)
        report.facts["updates"][f"{device} ({name})"] = _on_a_gpu(torch, device)
    return report


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _on_the_cpu(torch: Any) -> str:
    try:
        import_module(import_module(f"{_KERNELS}.fused").EXTENSION)
    except ModuleNotFoundError:
        return (
            f"foreach: {_IN_BATCHES}, since the C extension was not built; install sharded-ema "
            "from source where there is a C compiler"
        )
    except ImportError as error:
        return f"foreach: {_IN_BATCHES}, since the C extension does not load: {error}"
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"fused: one pass in C ({instructions}, {torch.get_num_threads()} threads)"


def _gpus(torch: Any) -> list[str]:
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]


def _on_a_gpu(torch: Any, device: str) -> str:
    launches = import_module(f"{_KERNELS}.launches")
    try:
        import_module(launches.MODULE)
    except ImportError as error:
        return f"foreach: {_IN_BATCHES}, since Triton does not load: {error}"
    shadow, live = (torch.zeros(1, device=device) for _ in range(2))
    problem = launches.LaunchTable([[shadow]], [live]).try_out(guard=True)
    if problem is not None:
        return f"foreach: {_IN_BATCHES}, since Triton's does not work here: {problem}"
    return "fused: one launch of a Triton kernel"
