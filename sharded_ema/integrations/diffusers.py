"""diffusers' ``EMAModel`` over a sharded average: a training script changes one line of imports.

    from sharded_ema.integrations.diffusers import EMAModel

The average is made at the first :meth:`EMAModel.step`, of the model whose parameters it is given,
wrapped as it is by then. The file imports no diffusers: the class of the model comes from the
program.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_ema.ema import ShardedEMA
from sharded_ema.errors import ConfigError, warn
from sharded_ema.integrations.common import warn_of_untested
from sharded_ema.integrations.facade import Keeper, Law, Parameters, Weights, resolve
from sharded_ema.model.world import world_size

TESTED = ">=0.42,<0.43"
_RENAMED = {"max_value": "decay", "min_value": "min_decay"}
_SETTINGS: dict[str, type | tuple[type, ...]] = {
    "decay": (float, int),
    "min_decay": float,
    "optimization_step": int,
    "update_after_step": int,
    "use_ema_warmup": bool,
    "inv_gamma": (float, int),
    "power": (float, int),
}


class EMAModel:
    """diffusers' ``EMAModel``, each rank keeping its own part of the average.

    With ``s = max(0, optimization_step - update_after_step - 1)`` the decay is 0 if ``s`` is 0,
    else ``(1 + s) / (10 + s)``, or with ``use_ema_warmup`` ``1 - (1 + s / inv_gamma) ** -power``,
    at most ``decay`` and at least ``min_decay`` (``get_decay`` of diffusers 0.42).

    Args:
        parameters: ``model.parameters()`` of a model with the same parameters as the one that
            trains, which may not be wrapped yet. Until the first step they are the average.
        decay: the highest decay, in ``[0, 1]``.
        min_decay: the lowest.
        update_after_step: steps during which the average is the weights.
        use_ema_warmup, inv_gamma, power: see above.
        foreach: accepted; an update is one pass anyway.
        model_cls, model_config: for :meth:`save_pretrained`.
        shard_replicas: let the ranks of DistributedDataParallel share the average too. Then all of
            them must call what reads it, and blocks for the main process alone fail by name.
        **options: for :class:`~sharded_ema.ShardedEMA`; and the old names ``max_value`` and
            ``min_value`` of two decays, and ``device``.

    Raises:
        ConfigError: a setting is out of range, or of the parameters no module is known.
    """

    def __init__(
        self,
        parameters: Parameters,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_ema_warmup: bool = False,
        inv_gamma: float | int = 1.0,
        power: float | int = 2 / 3,
        foreach: bool = False,
        model_cls: Any | None = None,
        model_config: Mapping[str, Any] | None = None,
        *,
        shard_replicas: bool = False,
        **options: Any,
    ) -> None:
        _look_at_version()
        if isinstance(parameters, nn.Module):
            use_ema_warmup = True  # as diffusers has it for the programs of old
        renamed = {_RENAMED[name]: options.pop(name) for name in _RENAMED if name in options}
        if renamed or isinstance(parameters, nn.Module):
            warn(
                "EMAModel is given what diffusers will not take any more: pass model.parameters(), "
                "decay= and min_decay=",
                FutureWarning,
            )
        device = options.pop("device", None)
        self.decay = renamed.get("decay", decay)
        self.min_decay = renamed.get("min_decay", min_decay)
        self.update_after_step = update_after_step
        self.use_ema_warmup = use_ema_warmup
        self.inv_gamma = inv_gamma
        self.power = power
        self.optimization_step = 0
        self.cur_decay_value: float | None = None
        self.foreach = foreach
        self.model_cls = model_cls
        self.model_config = model_config
        self._pinned = False
        self._law = Law(self.get_decay, self._describe)
        module, _ = resolve(parameters)
        self._keeper = Keeper(
            self._law, module, shard_replicas=shard_replicas, frozen="save", **options
        )
        self._weights = Weights(self._keeper, "cpu")
        self._check()
        if device is not None:
            self.to(device)

    # ------------------------------------------------------------------ averaging

    def get_decay(self, optimization_step: int) -> float:
        """The decay of a step; see the class."""
        step = max(0, optimization_step - self.update_after_step - 1)
        if step <= 0:
            return 0.0
        if self.use_ema_warmup:
            value = 1 - (1 + step / self.inv_gamma) ** -self.power
        else:
            value = (1 + step) / (10 + step)
        return max(min(value, self.decay), self.min_decay)

    def step(self, parameters: Parameters) -> None:
        """Take the weights in, after each optimizer step. Every rank comes to the first.

        Args:
            parameters: ``model.parameters()`` of the model that trains, wrapped as it is.

        Raises:
            ConfigError: of the parameters no module is known, or it is another one than before.
            EMAError: as :class:`~sharded_ema.ShardedEMA` and its ``update()``.
        """
        module, _ = resolve(parameters)
        ema = self._keeper.follow(module, self.optimization_step)
        step = self.optimization_step + 1
        self._law.is_at(ema.num_updates + 1, step)
        ema.update()
        self.optimization_step = step
        self.cur_decay_value = self.get_decay(step)

    @property
    def ema(self) -> ShardedEMA:
        """The average behind it, as for ``ema.save()``, ``ema.swap()`` and ``ema.metrics()``.

        Raises:
            ConfigError: there was no step yet.
        """
        if self._keeper.ema is None:
            raise ConfigError(
                "there is no average before the first step(); it is made of what is passed there"
            )
        return self._keeper.ema

    @property
    def shadow_params(self) -> list[Tensor]:
        """Whole tensors, one for each parameter. Collective where the ranks have parts of them."""
        return self._keeper.values()

    @shadow_params.setter
    def shadow_params(self, values: list[Tensor]) -> None:
        self._keeper.take(values, self.optimization_step)

    # ------------------------------------------------------------------ using it

    def store(self, parameters: Parameters) -> None:
        """Keep the weights for :meth:`restore`."""
        self._weights.store(resolve(parameters)[1])

    def copy_to(self, parameters: Parameters) -> None:
        """Overwrite parameters with the average; all ranks come where each has a part of it.

        Raises:
            EMAError: as ``copy_to()`` and ``swap()`` of :class:`~sharded_ema.ShardedEMA`.
        """
        self._weights.copy_to(*resolve(parameters))

    def restore(self, parameters: Parameters) -> None:
        """Give the model the weights back that :meth:`store` has kept, once.

        Raises:
            RuntimeError: there are none.
        """
        self._weights.restore(resolve(parameters)[1])
        self._weights.kept = None

    def to(
        self,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> None:
        """Keep the average on the host (``"cpu"``), or with the parameters; and in a dtype.

        After :meth:`pin_memory` it stays on the host.
        """
        options: dict[str, Any] = {}
        if device is not None and not self._pinned:
            on_host = torch.device(device).type == "cpu"
            options["device"] = torch.device("cpu") if on_host else None
        if dtype is not None:
            options["shadow_dtype"] = dtype
        self._keeper.remake(**options)

    def pin_memory(self) -> None:
        """Keep the average on the host; parameters of a GPU are averaged there in the background,
        so that a later ``to("cuda")`` is not needed and does nothing."""
        self.to("cpu")
        self._pinned = True

    # ------------------------------------------------------------------ storing it

    def state_dict(self) -> dict[str, Any]:
        """Settings, and ``shadow_params`` whole on every rank: collective where these have parts.

        For sharded checkpoints ``ema.save()`` of :attr:`ema` moves less.
        """
        return {**self._settings(), "shadow_params": self.shadow_params}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` has returned, here or in diffusers.

        Raises:
            ConfigError: a setting is none, or the tensors are not as many as the parameters.
        """
        for name in _SETTINGS:
            setattr(self, name, state_dict.get(name, getattr(self, name)))
        self._check()
        values = state_dict.get("shadow_params")
        if values is None:
            return
        if not isinstance(values, list) or not all(isinstance(v, Tensor) for v in values):
            raise ConfigError("shadow_params must be a list of tensors")
        self._keeper.take([v.detach().clone() for v in values], self.optimization_step)

    def save_pretrained(self, path: str | PathLike[str]) -> None:
        """Write a directory that ``model_cls.from_pretrained`` and :meth:`from_pretrained` open.

        Rank 0 writes. Where each rank has a part of the average all must call; where each has all
        of it, as of DistributedDataParallel, rank 0 may be alone.

        Raises:
            ConfigError: ``model_cls`` or ``model_config`` was not given.
            AbsentRankError: rank 0 was alone where all are needed.
        """
        for name in ("model_cls", "model_config"):
            if getattr(self, name) is None:
                raise ConfigError(f"save_pretrained() needs EMAModel({name}=...)")
        values = self._keeper.values(rank0_only=True)
        if world_size() > 1 and dist.get_rank() != 0:
            return
        assert self.model_cls is not None
        model = self.model_cls.from_config(self.model_config)
        model.register_to_config(**self._settings())
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), values, strict=True):
                parameter.copy_(value)
        model.save_pretrained(path)

    @classmethod
    def from_pretrained(
        cls, path: str | PathLike[str], model_cls: Any, foreach: bool = False, **options: Any
    ) -> EMAModel:
        """What :meth:`save_pretrained` has written, here or in diffusers."""
        settings = model_cls.load_config(path)
        model = model_cls.from_pretrained(path)
        found = cls(
            model.parameters(),
            model_cls=model_cls,
            model_config=model.config,
            foreach=foreach,
            **options,
        )
        found.load_state_dict({name: settings[name] for name in _SETTINGS if name in settings})
        return found

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _SETTINGS}

    def _describe(self) -> dict[str, Any]:
        settings = self._settings()
        del settings["optimization_step"]
        return {"type": "diffusers.EMAModel", **settings}

    def _check(self) -> None:
        for name, kind in _SETTINGS.items():
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"{name} cannot be {getattr(self, name)!r}")
        if not 0.0 <= self.decay <= 1.0:
            raise ConfigError(f"decay must lie in [0, 1], got {self.decay}")


def _look_at_version() -> None:
    try:
        installed = version("diffusers")
    except PackageNotFoundError:
        return
    warn_of_untested("diffusers", installed, TESTED)
