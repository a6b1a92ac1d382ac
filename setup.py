"""The part of the package that has to be compiled; pyproject.toml has all else.

Without a C compiler the package is complete: updates on the CPU then go through PyTorch's kernels.
"""

import sysconfig

from setuptools import Extension, setup

# One build serves all later versions of Python, but for those without a global interpreter lock.
limited = not sysconfig.get_config_var("Py_GIL_DISABLED")
kernels = "sharded_ema/averaging/kernels"

setup(
    ext_modules=[
        Extension(
            "sharded_ema.averaging.kernels.fused_cpu",
            [f"{kernels}/fused_cpu.c"],
            depends=[f"{kernels}/fused_cpu_loops.h"],
            extra_compile_args=["-std=gnu11", "-O3", "-g0", "-ffp-contract=off", "-pthread"],
            extra_link_args=["-pthread", "-ldl", "-lm"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")] if limited else [],
            py_limited_api=limited,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if limited else {},
)
