"""The part of the package that has to be compiled; pyproject.toml has all else.

Without a C compiler the package is complete: updates on the CPU then go through PyTorch's kernels.
"""

import sysconfig

from setuptools import Extension, setup

# One build serves all later versions of Python. Those without a global interpreter lock have no
# interface of that kind, and do without.
kernels = "sharded_ema/averaging/kernels"
extension = Extension(
    "sharded_ema.averaging.kernels.fused_cpu",
    [f"{kernels}/fused_cpu.c"],
    depends=[f"{kernels}/fused_cpu_loops.h"],
    extra_compile_args=["-std=gnu11", "-O3", "-g0", "-ffp-contract=off", "-pthread"],
    extra_link_args=["-pthread", "-ldl", "-lm"],
    py_limited_api=True,
    optional=True,
)

if sysconfig.get_config_var("Py_GIL_DISABLED"):
    setup()
else:
    setup(ext_modules=[extension], options={"bdist_wheel": {"py_limited_api": "cp311"}})
