"""Adapters that are merged into the weights under them (LoRA and its kin).

A merged layer computes with its base weights alone, to which the adapter was added when it was
merged. What a swap puts into the adapter it does not read, and what is merged inside a swap stays
in the base weights, which no swap restores.
"""

from __future__ import annotations

from torch import nn

from sharded_ema.model.internals.pytorch import own_children, own_parameters
from sharded_ema.model.inventory import Inventory, walk


def merged_layers(inventory: Inventory) -> list[str]:
    """Names of the layers that are merged and of whose adapters something is averaged."""
    averaged = {id(named.owner) for named in inventory.averaged}
    found: dict[int, str] = {}
    for prefix, module in walk(inventory.model):
        if _is_merged(module) and not averaged.isdisjoint(_adapter_of(module)):
            found.setdefault(id(module), prefix.removesuffix(".") or type(module).__name__)
    return list(found.values())


def _is_merged(module: nn.Module) -> bool:
    """Whether a layer says so, as those of PEFT and loralib do."""
    names = (*own_parameters(module), *own_children(module))
    known = hasattr(module, "merged_adapters") or any(
        name == "base_layer" or name.startswith("lora_") for name in names
    )
    return known and getattr(module, "merged", False) is True


def _adapter_of(layer: nn.Module) -> set[int]:
    """Ids of the modules of a layer, but for what the adapter is put around."""
    base = own_children(layer).get("base_layer")
    around = set() if base is None else set(base.modules())
    return {id(module) for module in layer.modules() if module not in around}
