"""Engines that every test of the average and of swaps runs on."""

from __future__ import annotations

from typing import Any

ROUND_ROBIN = {"zero": {"round_robin_gradients": True}}
OFFLOAD = {
    "zero": {"offload_optimizer": {"device": "cpu"}},
    "zero_force_ds_cpu_optimizer": False,
}
# World size, stage, precision, and what else the engine is made with.
PLAIN = [(2, stage, precision, {}) for stage in range(4) for precision in ("fp32", "bf16")]
CASES: list[tuple[int, int, str, dict[str, Any]]] = [
    *PLAIN,
    (2, 1, "bf16", ROUND_ROBIN),
    (2, 2, "bf16", ROUND_ROBIN),
    (4, 1, "fp32", ROUND_ROBIN),
    (4, 1, "bf16", ROUND_ROBIN),
    (4, 3, "fp32", {}),
    (4, 3, "bf16", {}),
    (4, 0, "bf16", {}),
    (2, 1, "bf16", {"data_types": {"grad_accum_dtype": "fp32"}}),  # BF16_Optimizer
    (2, 1, "bf16", OFFLOAD),
    (2, 2, "bf16", OFFLOAD),
    (2, 3, "bf16", OFFLOAD),
    (2, 3, "bf16", {"zero": {"sub_group_size": 40}}),
    (2, 3, "bf16", {"zero": {"stage3_param_persistence_threshold": 0}}),
    (2, 3, "bf16", {"zero": {"offload_param": {"device": "cpu"}}}),
    (2, 3, "bf16", {"zero_init": True}),
    (4, 3, "bf16", {"zero": {"zero_hpz_partition_size": 2}}),
    (2, 0, "fp16", {}),
    (2, 1, "fp16", {}),
    (2, 3, "fp16", {}),
]
