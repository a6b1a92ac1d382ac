"""transformers' Trainer with an average of the weights: one line more.

    torchrun --nproc-per-node 2 examples/transformers_trainer.py

Start it again and it goes on from the last checkpoint. The line is the same under DeepSpeed, FSDP.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from sharded_ema.integrations.transformers import with_ema


def rows(n: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Sequences that count in threes, with mistakes."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 32, (n, 1), generator=draw) + 3 * torch.arange(16)
    ids = (ids + (torch.rand(n, 16, generator=draw) < 0.1)) % 32
    return [{"input_ids": row, "labels": row} for row in ids]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", default="runs/transformers")
    parser.add_argument("--deepspeed")
    options = parser.parse_args()
    args = TrainingArguments(
        options.out, max_steps=options.steps, save_steps=4, eval_steps=4, eval_strategy="steps",
        learning_rate=1e-2, per_device_train_batch_size=8, save_total_limit=2, logging_steps=4,
        metric_for_best_model="eval_ema_loss", load_best_model_at_end=True, report_to=[],
        disable_tqdm=True, deepspeed=options.deepspeed, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=2, **sizes))

    trainer = Trainer(model, args, train_dataset=rows(1024, 1), eval_dataset=rows(64, 2))
    trainer = with_ema(trainer, "half_life:20")  # the line

    last = get_last_checkpoint(options.out)
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(f"{options.out}/average", average=True)  # from_pretrained() opens it
    losses = {k: round(v, 4) for k, v in trainer.evaluate().items() if k.endswith("loss")}
    if trainer.is_world_process_zero():
        print(f"goes on from {last}" if last else "from the beginning")
        print(f"{trainer.ema.num_updates} updates of the average; {losses}")
    trainer.ema.close()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
