"""A Trainer with an average: a run of 6 steps, and one killed after 5 and resumed; what is equal.

torchrun --nproc-per-node 2 -m tests.integrations.trainer_run BACKEND FOLDER [TRAINER]

BACKEND is one of ddp, fsdp1, fsdp2, zero1, zero2, zero3; TRAINER one of hf, seq2seq, sft, dpo. The
first rank writes FOLDER/found.json. The plain loop beside it is a callback that gathers the weights
after each step and knows nothing of the library.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, LlamaForCausalLM, Trainer, TrainerCallback

from sharded_ema.integrations.transformers import with_ema
from tests.integrations.on_cpus import Rows, text_rows, tiny_llama, tokenizer, zero

DECAY, STEPS, EVERY, KILLED, BEST = 0.9, 6, 2, 5, 2


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Full weights by name, in the model however it is sharded."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    parameters = dict(model.named_parameters())
    if any(isinstance(m, FSDP) for m in model.modules()):
        with FSDP.summon_full_params(model, writeback=False):
            yield {
                n.replace("_fsdp_wrapped_module.", ""): p.detach() for n, p in parameters.items()
            }
    elif any(hasattr(p, "ds_id") for p in parameters.values()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            yield {name: p.detach() for name, p in parameters.items()}
    else:
        yield {
            n: getattr(p, "full_tensor", lambda p=p: p)().detach() for n, p in parameters.items()
        }


class PlainLoop(TrainerCallback):
    """The averages by step."""

    def __init__(self) -> None:
        self.averages: dict[int, dict[str, Tensor]] = {}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any
    ) -> None:
        with whole_weights(model) as weights:
            self.averages.setdefault(0, {n: w.clone() for n, w in weights.items()})

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        last = self.averages[state.global_step - 1]
        with whole_weights(model) as weights:
            self.averages[state.global_step] = {
                n: last[n].lerp(w, 1 - DECAY) for n, w in weights.items()
            }

    def is_at(self, step: int, trainer: Trainer) -> bool:
        with trainer.ema.swap(), whole_weights(trainer.model) as weights:
            return same(weights, self.averages[step])


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


class Kill(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == KILLED:
            raise InterruptedError


class Events(TrainerCallback):
    """What on_evaluate and on_log were given."""

    def __init__(self) -> None:
        self.evaluated: list[list[str]] = []
        self.logged: set[str] = set()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        self.evaluated.append(sorted(k for k in metrics if k.endswith("loss")))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        self.logged |= logs.keys()


def make(backend: str, kind: str, folder: Path, *callbacks: TrainerCallback) -> Trainer:
    more: dict[str, Any] = {}
    if backend.startswith("zero"):
        more["deepspeed"] = zero(int(backend[4]))
    elif backend.startswith("fsdp"):
        more["fsdp"] = True
        more["fsdp_config"] = {
            "version": int(backend[4]),
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "state_dict_type": "SHARDED_STATE_DICT",
            "sync_module_states": False,  # which is for GPUs only
            "cpu_ram_efficient_loading": False,
        }
    more |= {
        "max_steps": STEPS,
        "save_steps": EVERY,
        "eval_steps": EVERY,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        # Of losses that fall, so that the best checkpoint is the first.
        "metric_for_best_model": "eval_ema_a_loss",
        "greater_is_better": True,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
    }
    if backend == "fsdp1":
        # accelerate loads sharded state into what a new optimizer has, which is nothing: Trainer's
        # resumed run differs from an uninterrupted one, unless the optimizer has no state.
        more |= {"optim": "sgd", "learning_rate": 0.1}
    classes = {
        "hf": ("TrainingArguments", "Trainer"),
        "seq2seq": ("Seq2SeqTrainingArguments", "Seq2SeqTrainer"),
        "sft": ("SFTConfig", "SFTTrainer"),
        "dpo": ("DPOConfig", "DPOTrainer"),
    }
    package = transformers
    data: dict[str, Any] = {
        "train_dataset": Rows(),
        "eval_dataset": {"a": Rows(16, 2), "b": Rows(16, 3)},
    }
    if kind in ("sft", "dpo"):
        import trl as package

        more["gradient_checkpointing"] = False
        data = {
            "train_dataset": text_rows(kind, 64, 1),
            "eval_dataset": {"a": text_rows(kind, 16, 2), "b": text_rows(kind, 16, 3)},
            "processing_class": tokenizer(),
        }
        if kind == "dpo":
            data["ref_model"] = tiny_llama()
    arguments, trainer = (getattr(package, name) for name in classes[kind])
    args = arguments(output_dir=str(folder), **more)
    early = EarlyStoppingCallback(early_stopping_patience=9)
    return with_ema(
        trainer(model=tiny_llama(), args=args, callbacks=[*callbacks, early], **data), DECAY
    )


def losses(trainer: Trainer) -> list[dict[str, float]]:
    """Whatever was logged of losses after the kill."""
    return [
        {"step": row["step"], **{k: v for k, v in row.items() if k.endswith("loss")}}
        for row in trainer.state.log_history
        if row["step"] > KILLED and "train_loss" not in row
    ]


def main() -> None:
    backend, folder, kind = sys.argv[1], Path(sys.argv[2]), (*sys.argv[3:], "hf")[0]
    found: dict[str, Any] = {}
    loop, events = PlainLoop(), Events()
    first = make(backend, kind, folder / "whole", loop, events)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        first.train()
    found["best"] = first.state.best_global_step
    found["best_is_plain"] = loop.is_at(BEST, first)
    first.save_model(str(folder / "average"), average=True)
    # Under ZeRO-3 the model is opened in parts as well.
    with whole_weights(LlamaForCausalLM.from_pretrained(folder / "average")) as weights:
        found["pretrained_is_plain"] = same(weights, loop.averages[BEST])
    first.ema.load(folder / "whole" / f"checkpoint-{STEPS}" / "ema")
    found["last_is_plain"] = loop.is_at(STEPS, first)

    killed = PlainLoop()
    try:
        make(backend, kind, folder / "killed", killed, Kill()).train()
    except InterruptedError:
        found["killed"] = True
    again = make(backend, kind, folder / "killed", killed)
    with warnings.catch_warnings(record=True) as more:
        warnings.simplefilter("always")
        again.train(resume_from_checkpoint=True)
    found["resumed_best_is_plain"] = killed.is_at(BEST, again)
    again.ema.load(folder / "killed" / f"checkpoint-{STEPS}" / "ema")
    found["resumed_last_is_plain"] = killed.is_at(STEPS, again)
    found["resumed_last_is_uninterrupted"] = loop.is_at(STEPS, again)
    found["losses_equal"] = losses(first) == losses(again)
    found["losses"] = losses(again)
    found["updates"] = again.ema.num_updates
    found["warned"] = sorted(
        {str(w.message)[:160] for w in (*seen, *more) if "EMA" in w.category.__name__}
    )
    place = folder / "killed" / f"checkpoint-{STEPS}"
    found["files"] = sorted(p.name for p in place.iterdir())
    found["averages"] = [str(p.parent.relative_to(place)) for p in place.rglob("manifest.json")]
    found["checkpoints"] = sorted(p.name for p in (folder / "killed").iterdir())
    found["history"] = sorted({key for row in first.state.log_history for key in row})
    found["callbacks"] = sorted(events.logged)
    found["evaluated"] = events.evaluated
    found["wrapped"] = type(first.model_wrapped).__name__
    kept: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(kept, first.ema.memory["shadow"])
    found["shadow"], found["parameters"] = kept, sum(a.numel() for a in loop.averages[0].values())
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found, indent=1))
    for trainer in (first, again):
        trainer.ema.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
