"""What a model has by now that an average made earlier knows nothing of."""

from __future__ import annotations

from collections.abc import Iterator

from torch.distributed.fsdp._common_utils import _is_fsdp_flattened

from sharded_ema.model.inventory import ShardSource, walk


def left_out(source: ShardSource, buffers: str) -> Iterator[tuple[str, str]]:
    """What is neither averaged nor, if it is new, stored: topics and messages of warnings.

    Args:
        buffers: what is done with persistent buffers; with ``"ignore"`` none is missed.
    """
    found = source.inventory
    known = {id(n.tensor) for n in (*found.averaged, *found.frozen, *found.excluded)}
    places = {(id(n.owner), n.attribute) for n in (*found.averaged, *found.buffers)}
    new = []
    for prefix, module in walk(found.model):
        for attribute, tensor in module._parameters.items():
            if tensor is not None and id(tensor) not in known and not _is_fsdp_flattened(tensor):
                new.append(prefix + attribute)
        for attribute, buffer in module._buffers.items() if buffers != "ignore" else ():
            stored = buffer is not None and attribute not in module._non_persistent_buffers_set
            if stored and (id(module), attribute) not in places:
                new.append(prefix + attribute)
    if new:
        yield (
            "new tensors",
            f"{len(new)} parameters or buffers were added to the model after its average was made, "
            f"among them {new[:3]}; they are neither averaged nor stored, so that exports lack "
            f"them. {_REMEDY}",
        )
    # Of an engine's parameters only those are trained that it was made with.
    thawed = [n.fqn for n in found.frozen if n.tensor.requires_grad and source.engine is None]
    if thawed:
        yield (
            "thawed parameters",
            f"{len(thawed)} parameters that were frozen when the average was made have "
            f"requires_grad=True by now, among them {thawed[:3]}; they are stored as they are and "
            f"not averaged. {_REMEDY}",
        )


_REMEDY = (
    "Make a new ShardedEMA after such a change and load the last save with strict=False, which "
    "keeps what is averaged already"
)
