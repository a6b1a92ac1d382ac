"""What ``accelerate launch`` put into the environment, compared with the flags.

Nothing here imports accelerate, so that a wrong command line is told at once.
"""

from __future__ import annotations

from collections.abc import Mapping

from sharded_ema.errors import ConfigError

# Ways to train that accelerate's configuration can ask for, and what has them in this program.
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "--parallel zero0 to zero3 or --deepspeed trains with DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "this program does not train with Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "--parallel hsdp or tp arranges the ranks",
}
_DTYPES = {"no": "float32", "bf16": "bfloat16"}


def agreed_dtype(environment: Mapping[str, str], dtype: str | None) -> str | None:
    """The precision of the computation that ``--dtype`` and accelerate's configuration ask for.

    Returns:
        None if neither says it.

    Raises:
        ConfigError: they contradict each other, or the configuration asks for what is not done.
    """
    for name, instead in _REFUSED.items():
        if is_on(environment, name):
            raise ConfigError(f"accelerate's configuration sets {name}: {instead}")
    precision = environment.get("ACCELERATE_MIXED_PRECISION")
    if precision is None:
        return dtype
    if precision not in _DTYPES:
        raise ConfigError(
            f"mixed_precision is {precision!r} in accelerate's configuration; this program "
            f"trains with {' or '.join(map(repr, _DTYPES))}"
        )
    if dtype not in (None, _DTYPES[precision]):
        raise ConfigError(
            f"--dtype {dtype} contradicts mixed_precision {precision!r} of accelerate's "
            "configuration"
        )
    return _DTYPES[precision]


def is_on(environment: Mapping[str, str], name: str) -> bool:
    """Whether a switch in the environment is on, as accelerate reads it."""
    return environment.get(name, "false").lower() == "true"
