"""torch_ema's ``ExponentialMovingAverage`` over a sharded average.

    from sharded_ema.integrations.torch_ema import ExponentialMovingAverage

Make it where torch_ema's is made, of the parameters of the model as it trains: after
DistributedDataParallel, ``fully_shard`` or ``deepspeed.initialize``. The file imports no torch_ema.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sharded_ema.ema import ShardedEMA
from sharded_ema.errors import ConfigError
from sharded_ema.integrations.facade import Keeper, Law, Parameters, Weights, is_plain, resolve


class ExponentialMovingAverage:
    """torch_ema's ``ExponentialMovingAverage``, each rank keeping its own part of the average.

    The decay of the ``n``-th update is ``min(decay, (1 + n) / (10 + n))``, or ``decay`` without
    ``use_num_updates`` (``update`` of torch_ema 0.3).

    Args:
        parameters: ``model.parameters()``.
        decay: in ``[0, 1]``.
        use_num_updates: see above.
        shard_replicas: let the ranks of DistributedDataParallel share the average too; all of them
            must then call what reads it.
        **options: for :class:`~sharded_ema.ShardedEMA`.

    Attributes:
        decay: may be changed at any time.
        num_updates: ``None`` without ``use_num_updates``.

    Raises:
        ConfigError: the decay is out of range, or of the parameters no module is known.
        EMAError: as :class:`~sharded_ema.ShardedEMA`.
    """

    def __init__(
        self,
        parameters: Parameters,
        decay: float,
        use_num_updates: bool = True,
        *,
        shard_replicas: bool = False,
        **options: Any,
    ) -> None:
        self.decay = _checked(decay)
        self.num_updates: int | None = 0 if use_num_updates else None
        module, _ = resolve(parameters)
        self._law = Law(self._decay_of, self._describe)
        self._keeper = Keeper(
            self._law, module, shard_replicas=shard_replicas, frozen="save", **options
        )
        self._weights = Weights(self._keeper)
        self._keeper.make()

    @property
    def ema(self) -> ShardedEMA:
        """The average behind it, as for ``ema.save()``, ``ema.load()`` and ``ema.metrics()``."""
        assert self._keeper.ema is not None
        return self._keeper.ema

    @property
    def shadow_params(self) -> list[Tensor]:
        """Whole tensors, one for each parameter. Collective where the ranks have parts of them."""
        return self._keeper.values()

    @property
    def collected_params(self) -> list[Tensor] | None:
        """What :meth:`store` has copied."""
        return self._weights.kept

    # ------------------------------------------------------------------ averaging

    def update(self, parameters: Parameters | None = None) -> None:
        """Take the weights in, after each optimizer step.

        Args:
            parameters: of the model that is averaged; or others of the same shapes, if all are
                plain tensors.

        Raises:
            ConfigError: others, which are not.
            EMAError: as ``update()`` of :class:`~sharded_ema.ShardedEMA`.
        """
        n = self.ema.num_updates + 1
        self._law.is_at(n, n if self.num_updates is None else self.num_updates + 1)
        module, others = self._of(parameters)
        if self._keeper.owns(module):
            self.ema.update()
        else:
            self._update_from(others)
        if self.num_updates is not None:
            self.num_updates += 1

    @torch.no_grad()
    def _update_from(self, others: Sequence[Tensor]) -> None:
        own = list(self._keeper.module.parameters())
        if not all(map(is_plain, own)) or not all(map(is_plain, others)):
            raise ConfigError(
                "update() was given parameters of another model than the one that is averaged, "
                "and one of the two is sharded; pass those of the model that trains"
            )
        kept = [p.detach().clone() for p in own]
        try:
            for mine, other in zip(own, others, strict=True):
                mine.copy_(other)
            self.ema.update()
        finally:
            for mine, before in zip(own, kept, strict=True):
                mine.copy_(before)

    def _decay_of(self, n: int) -> float:
        if self.num_updates is None:
            return self.decay
        return min(self.decay, (1 + n) / (10 + n))

    def _describe(self) -> dict[str, Any]:
        return {
            "type": "torch_ema.ExponentialMovingAverage",
            "decay": self.decay,
            "use_num_updates": self.num_updates is not None,
        }

    # ------------------------------------------------------------------ using it

    def copy_to(self, parameters: Parameters | None = None) -> None:
        """Overwrite parameters with the average; all ranks come where each has a part of it.

        Raises:
            EMAError: as ``copy_to()`` of :class:`~sharded_ema.ShardedEMA`.
        """
        self._weights.copy_to(*self._of(parameters))

    def store(self, parameters: Parameters | None = None) -> None:
        """Keep the weights for :meth:`restore`."""
        self._weights.store(self._of(parameters)[1])

    def restore(self, parameters: Parameters | None = None) -> None:
        """Give parameters the weights back that :meth:`store` has kept.

        Raises:
            RuntimeError: there are none.
        """
        self._weights.restore(self._of(parameters)[1])

    @contextmanager
    def average_parameters(self, parameters: Parameters | None = None) -> Iterator[None]:
        """Let the average stand in for parameters, as ``swap()`` does for those that train.

        Raises:
            SwapError: one stands in for them already.
        """
        module, others = self._of(parameters)
        if self._keeper.owns(module):
            with self.ema.swap():
                yield
            return
        self._weights.store(others)
        self._weights.copy_to(module, others)
        try:
            yield
        finally:
            self._weights.restore(others)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Keep the average on the host (``"cpu"``), or with the parameters; and in a dtype."""
        options: dict[str, Any] = {}
        if device is not None:
            on_host = torch.device(device).type == "cpu"
            options["device"] = torch.device("cpu") if on_host else None
        if dtype is not None:
            options["shadow_dtype"] = dtype
        self._keeper.remake(**options)

    # ------------------------------------------------------------------ storing it

    def state_dict(self) -> dict[str, Any]:
        """``decay``, ``num_updates``, ``shadow_params`` and ``collected_params`` as in torch_ema.

        The tensors are whole on every rank: collective where the ranks have parts of them. For
        sharded checkpoints ``ema.save()`` of :attr:`ema` moves less.
        """
        return {
            "decay": self.decay,
            "num_updates": self.num_updates,
            "shadow_params": self.shadow_params,
            "collected_params": self.collected_params,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` has returned, here or in torch_ema.

        Raises:
            ConfigError: a setting is none, or the tensors are not as many as the parameters.
        """
        count, values = state_dict["num_updates"], state_dict["shadow_params"]
        if count is not None and not isinstance(count, int):
            raise ConfigError(f"num_updates cannot be {count!r}")
        if not isinstance(values, list) or not all(isinstance(v, Tensor) for v in values):
            raise ConfigError("shadow_params must be a list of tensors")
        decay = _checked(state_dict["decay"])
        self._law.is_at(0, 0)
        self.decay, self.num_updates = decay, count
        self._keeper.take(values, count or 0)
        kept = state_dict["collected_params"]
        self._weights.kept = None if kept is None else [w.detach().clone() for w in kept]

    def _of(self, parameters: Parameters | None) -> tuple[nn.Module, list[Tensor]]:
        if parameters is None:
            module = self._keeper.module
            return module, list(module.parameters())
        module, found = resolve(parameters)
        if len(found) != len(list(self._keeper.module.parameters())):
            raise ConfigError(
                f"{len(found)} parameters were given for an average of {len(self._keeper.names)}"
            )
        return module, found


def _checked(decay: float) -> float:
    if not 0.0 <= decay <= 1.0:
        raise ConfigError(f"decay must lie in [0, 1], got {decay}")
    return decay
