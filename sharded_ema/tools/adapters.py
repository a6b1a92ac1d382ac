"""Adapters in the layout of PEFT: which tensors of an average are an adapter's, and their names.

In training a parameter's name has the adapter's in it, as in
``base_model.model.q_proj.lora_A.default.weight``. PEFT's files leave it out, because whoever loads
one chooses a name.
"""

from __future__ import annotations

from sharded_ema.checkpoint.reading.opened import StoredTensor
from sharded_ema.errors import CheckpointMismatchError
from sharded_ema.tools.contents import Average

_PREFIX = "base_model.model."
_WRAPPED = ".modules_to_save."


def adapter_tensors(average: Average, adapter: str | None) -> dict[str, StoredTensor]:
    """The tensors of one adapter by the names that PEFT gives them in a file.

    Args:
        adapter: its name in training; ``None`` if there was only one.

    Raises:
        CheckpointMismatchError: the average has no such adapter, or several and none was chosen.
    """
    known = average.meta.get("adapters", [])
    if adapter is None and len(known) == 1:
        adapter = known[0]
    if adapter not in known:
        raise CheckpointMismatchError(
            f"the average was made of a model with the adapters {known}, and "
            f"{'none was chosen' if adapter is None else f'{adapter!r} is not one of them'}; pass "
            "adapter (--adapter)"
        )
    found = {}
    for name, tensor in average.tensors.items():
        path = name.split(".")
        if adapter not in path:
            continue
        path.remove(adapter)
        bare = ".".join(path).replace(_WRAPPED, ".")
        # Models that hold adapters without a PeftModel around them have no such prefix.
        found[bare if bare.startswith(_PREFIX) else _PREFIX + bare] = tensor
    return found
