"""The groups into which ``--parallel hsdp`` and ``tp`` divide the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sharded_ema.errors import ConfigError


def group_sizes(flags: Mapping[str, Any], ranks: int, machine: int) -> dict[str, int]:
    """``shard_size`` and ``tp_size`` with their defaults; 1 where the way has no such groups.

    Args:
        flags: the parsed command line.
        ranks: processes of the run.
        machine: those of them on one machine.

    Raises:
        ConfigError: a size that does not divide the ranks, or that the way does not have.
    """
    parallel, shard, tensor = flags["parallel"], flags["shard_size"], flags["tp_size"]
    if shard is not None and parallel != "hsdp":
        raise ConfigError("--shard-size needs --parallel hsdp")
    if tensor is not None and parallel != "tp":
        raise ConfigError("--tp-size needs --parallel tp")
    if parallel == "hsdp":
        if ranks < 4:
            raise ConfigError(
                f"--parallel hsdp needs two groups of two ranks or more, but {ranks} were started; "
                "fsdp2 runs on any number"
            )
        # Within a machine communication is fast; on a single one, two replicas show the way.
        shard = shard or (machine if 1 < machine < ranks else ranks // 2)
        if not 1 < shard < ranks or ranks % shard:
            raise ConfigError(
                f"--shard-size {shard} does not divide {ranks} ranks into two or more groups of "
                "two or more"
            )
    if parallel == "tp":
        tensor = tensor or 2
        if tensor < 2 or ranks % tensor:
            raise ConfigError(
                f"--tp-size {tensor} does not divide {ranks} ranks into groups of two or more"
            )
    return {"shard_size": shard or 1, "tp_size": tensor or 1}
