"""The same model as checkpoints of four ranks, sharded in three ways, in the formats compared.

The values are a formula of the tensor's number, so each rank makes its own part and nothing is
sent. Every rank is a process; all writes go through the writers that a training run uses.
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.multiprocessing.spawn import spawn

from sharded_ema import SafetensorsStorageWriter

# What makes checkpoints of ZeRO's flat ranges without DeepSpeed.
from sharded_ema.model.layout import FlatRange
from sharded_ema.model.pieces import FlatShard

RANKS = 4
LAYOUTS = {
    "rows": "FSDP2 over 4 ranks",
    "columns": "2 x 2: tensor parallel columns under FSDP2 rows",
    "ranges": "ZeRO-2 over 4 ranks: flat ranges",
}
Shapes = dict[str, tuple[int, ...]]


def model_shapes(numel: int) -> Shapes:
    """A Llama-like model of about ``numel`` elements, and at least that; uneven in all ways."""
    hidden = 2048 if numel >= 100_000_000 else 512
    wide, vocabulary = hidden * 27 // 10 + 3, 8001
    shapes: Shapes = {"embed.weight": (vocabulary, hidden)}
    layer = 0
    while sum(map(math.prod, shapes.values())) < numel:
        for name in ("q", "k", "v", "o"):
            shapes[f"layers.{layer}.{name}.weight"] = (hidden, hidden)
        shapes[f"layers.{layer}.up.weight"] = (wide, hidden)
        shapes[f"layers.{layer}.gate.weight"] = (wide, hidden)
        shapes[f"layers.{layer}.down.weight"] = (hidden, wide)
        for name in ("norm1", "norm2"):
            shapes[f"layers.{layer}.{name}.weight"] = (hidden,)
        layer += 1
    return shapes


def values(number: int, shape: tuple[int, ...]) -> Tensor:
    """The tensor of this number."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def write(folder: Path, layout: str, numel: int) -> None:
    """Write ``ours``, ``dcp`` and, as it fits the layout, ``hf`` or ``zero`` below ``folder``."""
    spawn(_rank, (str(folder), layout, numel), RANKS)


def _rank(rank: int, folder: str, layout: str, numel: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    shapes = model_shapes(numel)
    if layout == "ranges":
        state = _ranges(rank, shapes, Path(folder, "zero"))
    elif layout == "rows":
        mesh = init_device_mesh("cpu", (RANKS,))
        state = _boxes(shapes, mesh, [Shard(0)], [Shard(0)])
    else:
        mesh = init_device_mesh("cpu", (2, RANKS // 2))
        state = _boxes(shapes, mesh, [Shard(0), Shard(1)], [Shard(0), Replicate()])
    named = {f"model.{name}": value for name, value in state.items()}
    dcp.save(named, storage_writer=SafetensorsStorageWriter(Path(folder, "ours")))
    dcp.save(named, checkpoint_id=Path(folder, "dcp"))
    if layout != "ranges":
        writer = HuggingFaceStorageWriter(str(Path(folder, "hf")), save_distributed=True)
        dcp.save(state, storage_writer=writer)
    dist.barrier()
    dist.destroy_process_group()


def _boxes(
    shapes: Shapes, mesh: DeviceMesh, matrix: list[Placement], vector: list[Placement]
) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for number, (name, shape) in enumerate(shapes.items()):
        placements = matrix if len(shape) > 1 else vector
        sizes, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
        where = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
        whole = values(number, shape)
        state[name] = DTensor.from_local(
            whole[where].clone(), mesh, placements, run_check=False, shape=whole.shape,
            stride=whole.stride(),
        )  # fmt: skip
    return state


def _ranges(rank: int, shapes: Shapes, zero: Path) -> dict[str, Tensor]:
    """A quarter of all elements in one flat tensor; also as DeepSpeed's files, for its own tool."""
    total = sum(map(math.prod, shapes.values()))
    share = -(-total // (2 * RANKS)) * 2  # DeepSpeed pads to a multiple of two elements a rank
    flat = torch.zeros(share)
    state: dict[str, Tensor] = {}
    position = 0
    for number, (name, shape) in enumerate(shapes.items()):
        count = math.prod(shape)
        start = min(max(rank * share - position, 0), count)
        stop = min(max((rank + 1) * share - position, 0), count)
        pieces = []
        if stop > start:
            here = position + start - rank * share
            local = flat[here : here + stop - start]
            local.copy_(values(number, shape).view(-1)[start:stop])
            for at, box in FlatRange(start, stop).boxes(shape):
                pieces.append((box, local[at : at + box.numel].view(box.sizes)))
        state[name] = FlatShard(shape, pieces, dtype=torch.float32, device=torch.device("cpu"))
        position += count
    tag = zero / "global_step1"
    tag.mkdir(parents=True, exist_ok=True)
    optimizer = {
        "zero_stage": 2, "partition_count": RANKS, "single_partition_of_fp32_groups": [flat],
    }  # fmt: skip
    torch.save(
        {"optimizer_state_dict": optimizer, "ds_version": "0"},
        tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
    )
    if rank == 0:
        described = OrderedDict((name, torch.Size(shape)) for name, shape in shapes.items())
        torch.save(
            {"module": {}, "buffer_names": [], "param_shapes": [described], "shared_params": {},
             "ds_version": "0"},
            tag / "mp_rank_00_model_states.pt",
        )  # fmt: skip
        (zero / "latest").write_text("global_step1")
    return state
