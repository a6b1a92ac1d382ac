"""timm's ``ModelEmaV3`` over a sharded average.

    from sharded_ema.integrations.timm import ModelEmaV3

There is no second module: where the average is asked for a forward, it stands in for the weights.
The file imports no timm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sharded_ema.config import DEFAULT_PROFILE
from sharded_ema.ema import ShardedEMA
from sharded_ema.errors import CheckpointMismatchError, ConfigError
from sharded_ema.integrations.facade import Keeper, Law
from sharded_ema.model.pieces import pieces_of


class Unfitting(NamedTuple):
    """Names that a loaded state lacks, and those that the model does not have."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class ModelEmaV3(nn.Module):
    """timm's ``ModelEmaV3``, each rank keeping its own part of the average.

    ``update(model, step)`` has, with ``s = max(0, step - update_after_step - 1)``, a decay of 0 if
    ``s`` is 0, else ``decay``, or with ``use_warmup`` ``1 - (1 + s / warmup_gamma) **
    -warmup_power``, at most ``decay`` and at least ``min_decay``. Without ``step`` it is ``decay``
    (``get_decay`` of timm 1.0).

    Args:
        model: as it trains. Made before DistributedDataParallel, as timm's script does, or with
            the wrapper, each rank keeps all of the average, and rank 0 alone may save it. Make it
            after ``fully_shard``, FullyShardedDataParallel or ``deepspeed.initialize``.
        decay, min_decay, update_after_step, use_warmup, warmup_gamma, warmup_power: see above.
        device: ``"cpu"`` keeps the average on the host.
        dtype: of the average; ``None`` for at least float32, also of 16-bit weights.
        stochastic_rounding, stochastic_rounding_seed, foreach: accepted; an average in float32
            has nothing to round so, and an update is one pass anyway.
        exclude_buffers: copy buffers instead of averaging those that are floating.
        shard_replicas: let the ranks of DistributedDataParallel share the average too; all of them
            must then call what reads it.
        **options: for :class:`~sharded_ema.ShardedEMA`.

    Raises:
        EMAError: as :class:`~sharded_ema.ShardedEMA`.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_warmup: bool = False,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,
        stochastic_rounding_seed: int = 0,
        foreach: bool = True,
        exclude_buffers: bool = False,
        *,
        shard_replicas: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ConfigError(f"decay must lie in [0, 1], got {decay}")
        self.decay = decay
        self.min_decay = min_decay
        self.update_after_step = update_after_step
        self.use_warmup = use_warmup
        self.warmup_gamma = warmup_gamma
        self.warmup_power = warmup_power
        self.foreach = foreach
        self.device = device
        self.dtype = dtype
        self.stochastic_rounding = stochastic_rounding
        self.stochastic_rounding_seed = stochastic_rounding_seed
        self.exclude_buffers = exclude_buffers
        self._step: int | None = None
        self._law = Law(self._decay_of, self._describe)
        on_host = device is not None and torch.device(device).type == "cpu"
        self._keeper = Keeper(
            self._law,
            model,
            device=torch.device("cpu") if on_host else None,
            shadow_dtype=dtype,
            buffers="copy" if exclude_buffers else "average",
            shard_replicas=shard_replicas,
            frozen="save",
            **options,
        )
        self._keeper.make()
        # Past nn.Module, of which it would be a child, and its tensors this module's.
        self.__dict__["module"] = _Averaged(self._keeper)

    module: _Averaged

    @property
    def ema(self) -> ShardedEMA:
        """The average behind it, as for ``ema.save()``, ``ema.swap()`` and ``ema.metrics()``."""
        assert self._keeper.ema is not None
        return self._keeper.ema

    # ------------------------------------------------------------------ averaging

    def get_decay(self, step: int | None = None) -> float:
        """The decay of a step; see the class."""
        if step is None:
            return self.decay
        step = max(0, step - self.update_after_step - 1)
        if step <= 0:
            return 0.0
        if not self.use_warmup:
            return self.decay
        value = 1 - (1 + step / self.warmup_gamma) ** -self.warmup_power
        return max(min(value, self.decay), self.min_decay)

    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Take the weights in, after each optimizer step.

        Args:
            model: the one that it was made of, or what has wrapped it since.
            step: of the optimizer, from 1 on.

        Raises:
            ConfigError: it is another model.
            EMAError: as ``update()`` of :class:`~sharded_ema.ShardedEMA`.
        """
        ema = self._keeper.follow(model, 0)
        self._step = step
        self._law.is_at(ema.num_updates + 1, step or 0)
        ema.update()

    def set(self, model: nn.Module) -> None:
        """Start the average anew from the weights as they are.

        Raises:
            ConfigError: it is another model.
        """
        self._keeper.follow(model, 0).reseed()

    def _decay_of(self, step: int) -> float:
        return self.get_decay(None if self._step is None else step)

    def _describe(self) -> dict[str, Any]:
        return {
            "type": "timm.ModelEmaV3",
            "decay": self.decay,
            "min_decay": self.min_decay,
            "update_after_step": self.update_after_step,
            "use_warmup": self.use_warmup,
            "warmup_gamma": self.warmup_gamma,
            "warmup_power": self.warmup_power,
        }

    # ------------------------------------------------------------------ using it

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model computes with the average, in evaluation mode and without gradients.

        All ranks come where each has a part of the average or of the model.
        """
        return self.module(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """That of the model with the average, below ``module.``, as in timm."""
        found = self.module.state_dict()
        start = f"{kwargs.get('prefix', '')}module."
        return {start + name: value for name, value in found.items()}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Unfitting:
        """Take over what :meth:`state_dict` has returned, here or in timm."""
        start = "module."
        state = {n.removeprefix(start): v for n, v in state_dict.items() if n.startswith(start)}
        return self.module.load_state_dict(state, strict)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of :attr:`module`."""
        return self.module.named_parameters(f"{prefix}module.")

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Those of :attr:`module`."""
        return self.module.named_buffers(f"{prefix}module.")


class _Averaged(nn.Module):
    """What timm finds under ``.module``: the model, with the average for its weights.

    Args:
        keeper: of the average.
    """

    def __init__(self, keeper: Keeper) -> None:
        super().__init__()
        self._keeper = keeper
        self.training = False

    @property
    def _ema(self) -> ShardedEMA:
        assert self._keeper.ema is not None
        return self._keeper.ema

    @contextmanager
    def _stands_in(self) -> Iterator[nn.Module]:
        model = self._keeper.module
        trained = [module for module in model.modules() if module.training]
        with torch.no_grad(), self._ema.swap():
            for module in trained:
                module.training = False
            try:
                yield model
            finally:
                for module in trained:
                    module.training = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._stands_in() as model:
            return model(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Of the bare model; where ranks have parts of the average, all come and have it whole."""
        if not self._keeper.is_whole:
            return self._keeper.gathered(rank0_only=False)
        with self._stands_in() as model:
            bare = getattr(model, "module", model)
            state = bare.state_dict()
            return {
                name: v.detach().clone() if isinstance(v, Tensor) else v
                for name, v in state.items()
            }

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Unfitting:
        """Take over the state of a bare model as the average."""
        missing, unexpected = self._keeper.unknown(state_dict)
        if strict and (missing or unexpected):
            raise CheckpointMismatchError(
                f"the state does not fit the model: it lacks {missing[:3]} and has unknown "
                f"{unexpected[:3]}; nothing was loaded"
            )
        self._keeper.take_named(state_dict, max(1, self._ema.num_updates), 0.0)
        return Unfitting(missing, unexpected)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The average; its memory, where this rank has all of it."""
        for name, value in zip(self._keeper.names, self._keeper.values(), strict=True):
            yield prefix + name, nn.Parameter(value, requires_grad=False)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Averaged buffers, as memory of the average, and those of the model that are copied."""
        averaged = self._ema.state_dict()
        model = self._keeper.module
        for name, buffer in getattr(model, "module", model).named_buffers():
            value = averaged.get(f"{DEFAULT_PROFILE}.{name}")
            yield prefix + name, buffer if value is None else pieces_of(value)[0][1]
