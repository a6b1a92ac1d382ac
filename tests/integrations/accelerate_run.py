"""An accelerator with an average: save, go on, load, go on again.

torchrun --nproc-per-node 2 -m tests.integrations.accelerate_run BACKEND FOLDER

BACKEND is one of ddp, fsdp1, fsdp2, zero1, zero2, zero3. The first rank writes FOLDER/found.json.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor

from sharded_ema import EMAError, ShardedEMA
from sharded_ema.integrations.accelerate import register
from tests.integrations.on_cpus import Rows, tiny_llama, zero
from tests.integrations.trainer_run import same, whole_weights

DECAY = 0.9


def start(backend: str) -> Accelerator:
    if backend.startswith("fsdp"):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=int(backend[4]),
            state_dict_type="SHARDED_STATE_DICT",
            use_orig_params=True,
            auto_wrap_policy="transformer_based_wrap",
            sync_module_states=False,
            cpu_ram_efficient_loading=False,
        )
        return Accelerator(cpu=True, fsdp_plugin=plugin)
    if backend.startswith("zero"):
        sizes = {"train_micro_batch_size_per_gpu": 4, "train_batch_size": 8}
        config = zero(int(backend[4])) | sizes | {"gradient_accumulation_steps": 1}
        del config["gradient_clipping"]
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(cpu=True)  # as Trainer begins; else each rank would be alone
        return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    return Accelerator(cpu=True)


def said(call: Any) -> str:
    try:
        call()
    except EMAError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main() -> None:
    backend, folder = sys.argv[1], Path(sys.argv[2])
    accelerator = start(backend)
    net = tiny_llama()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    early = ShardedEMA(net, DECAY, timeout=10)
    loader = torch.utils.data.DataLoader(Rows(), batch_size=4)
    model, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    found: dict[str, Any] = {"early": said(lambda: register(accelerator, early))}
    if backend != "ddp":
        found["early attached"] = said(lambda: early.attach(optimizer))
    early.close()
    ema = ShardedEMA(model, DECAY, timeout=30)
    # Of an engine the own hook is left on: register() has to switch it off.
    ema.attach(*([] if backend.startswith("zero") else [optimizer]))
    handle = register(accelerator, ema)
    found["twice"] = said(lambda: register(accelerator, ema))
    batches = list(loader)
    average: dict[str, Tensor] = {}

    def train(first: int, last: int) -> None:
        for batch in batches[first:last]:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
            with whole_weights(model) as weights:
                for name, weight in weights.items():
                    average[name].lerp_(weight, 1 - DECAY)

    def is_plain() -> bool:
        with ema.swap(), whole_weights(model) as weights:
            return same(weights, average)

    place = folder / "step_3"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with whole_weights(model) as weights:
            average |= {n: w.clone() for n, w in weights.items()}
        train(0, 3)
        at_3 = {n: a.clone() for n, a in average.items()}
        accelerator.save_state(str(place))
        train(3, 6)
        at_6 = {n: a.clone() for n, a in average.items()}
        found["saved_is_plain"] = is_plain()
        accelerator.load_state(str(place))
        found["updates"] = ema.num_updates
        average.update(at_3)
        train(3, 6)
        found["loaded_is_plain"] = is_plain()
        found["again_is_same"] = same(average, at_6)
    found["warned"] = sorted({str(w.message) for w in seen if "EMA" in w.category.__name__})
    found["averages"] = sorted(
        str(p.parent.relative_to(place)) for p in place.rglob("manifest.json")
    )
    accelerator.register_for_checkpointing(ema)
    found["registered"] = said(lambda: accelerator.save_state(str(folder / "other")))
    handle.remove()
    kept: list[Any] = [None] * accelerator.num_processes
    dist.all_gather_object(kept, (ema.memory["shadow"], found["registered"][:20]))
    found["shadow"], found["parameters"] = kept, sum(a.numel() for a in average.values())
    if accelerator.is_main_process:
        (folder / "found.json").write_text(json.dumps(found, indent=1))
        torch.save(at_3, folder / "plain.pt")
    ema.close()
    accelerator.end_training()


if __name__ == "__main__":
    main()
