"""The running part of an average: it follows the optimizer and stands in for the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sharded_ema.averaging.health import Health
from sharded_ema.averaging.kernels import choose_impl
from sharded_ema.averaging.schedules import Schedule
from sharded_ema.averaging.shadow import Action, Clock, Shadow, check_shadow_dtype
from sharded_ema.config import Settings, as_patterns, as_profiles
from sharded_ema.errors import (
    AbsentRankError,
    ConfigError,
    EMAError,
    NonFiniteError,
    OptimizerError,
    StateError,
    SwapError,
)
from sharded_ema.model.agreement import Ranks
from sharded_ema.model.layout import Box
from sharded_ema.model.sources import Backup, adapters_of, left_out, make_source
from sharded_ema.model.steps import EngineHooks, OptimizerHooks, StepHooks


class Averager:
    """What :class:`~sharded_ema.ShardedEMA` is without checkpoints and metrics; see there."""

    _hooks: StepHooks | None = None
    _not_copied: tuple[str, ...] = ("_hooks",)

    def __init__(
        self,
        target: nn.Module,
        schedule: float | str | Schedule | Mapping[str, float | str | Schedule] = 0.9999,
        *,
        update_every: int = 1,
        start_step: int = 0,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        buffers: str = "copy",
        frozen: str | None = None,
        shadow_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        shard_replicas: bool = True,
        nonfinite: str = "skip",
        impl: str | None = None,
        total_steps: int | None = None,
        force_dtype: bool = False,
        timeout: float = 600.0,
    ) -> None:
        self._settings = Settings(
            profiles=as_profiles(schedule),
            update_every=update_every,
            start_step=start_step,
            buffers=buffers,
            frozen=frozen or ("skip" if adapters_of(target) else "save"),
            nonfinite=nonfinite,
            total_steps=total_steps,
        )
        check_shadow_dtype(shadow_dtype, force=force_dtype)
        self._source = make_source(
            target,
            include=as_patterns(include),
            exclude=as_patterns(exclude),
            buffers=buffers,
            shard_replicas=shard_replicas,
        )
        self._names = [shard.name.fqn for shard in self._source.shards]
        self._timeout = timeout
        self._ranks = Ranks(self._source.ranks, timeout)
        self._clock = Clock(update_every=update_every, start_step=start_step)
        self._shadow = Shadow(
            self._settings.profiles,
            self._source.live(),
            dtype=shadow_dtype,
            device=torch.device(device) if device is not None else None,
            guard=nonfinite == "skip",
            impl=choose_impl(impl),
        )
        self._health = Health()
        self._agreed = False
        self._swapped: str | None = None
        self._backup_bytes = 0
        self._unusable: str | None = None
        self._seed()
        if start_step == 0:
            self._clock.reseed()
        self._health.check_horizon(self._settings.profiles, total_steps, start_step)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is attached to nothing and has no save under way."""
        return {name: value for name, value in vars(self).items() if name not in self._not_copied}

    # ------------------------------------------------------------------ following the optimizer

    def _attach(self, optimizers: Sequence[Any]) -> StepHooks:
        self._require_usable()
        if self._hooks is not None:
            raise StateError("already attached; call remove() on the first handle before")

        def bind() -> None:
            self._hooks = self._make_hooks(optimizers)

        try:
            self._agree_once(bind)
        except EMAError:
            if self._hooks is not None:
                self._hooks.remove()
            raise
        assert self._hooks is not None
        return self._hooks

    def _make_hooks(self, optimizers: Sequence[Any]) -> StepHooks:
        def before_step() -> None:
            self._refuse_in_swap("an optimizer step")

        if self._source.engine is not None:
            if optimizers:
                raise OptimizerError(
                    "a DeepSpeed engine knows its own optimizer: call attach() without arguments"
                )
            return EngineHooks(
                self._source.engine,
                before_step=before_step,
                applied=self._applied_step,
                removed=self._detached,
            )
        named = (shard.name for shard in self._source.shards)
        return OptimizerHooks(
            optimizers,
            {id(n.tensor): n.fqn for n in named if isinstance(n.tensor, nn.Parameter)},
            before_step=before_step,
            applied=self._applied_step,
            removed=self._detached,
        )

    def _detached(self) -> None:  # a handle calls it once
        self._hooks = None

    def update(self) -> None:
        """One optimizer step was applied: advance the average. Not needed once attached.

        Raises:
            SwapError: inside :meth:`swap`.
            NonFiniteError: with ``nonfinite="raise"``, on the ranks whose shard holds NaN or Inf;
                their shadow is untouched. There is no collective here to tell the others.
        """
        if self._hooks is not None:
            self._health.warn_once(
                "double",
                "update() was called although an optimizer is attached, which updates the average "
                "already; every step counts twice now. Remove the call or the attachment",
            )
        if torch.compiler.is_compiling():  # compiled, it would be rounded in another way
            torch.compiler.disable(self._applied_step)()
        else:
            self._applied_step()

    def _applied_step(self) -> None:
        self._refuse_in_swap("update()")
        self._require_usable()
        self._shadow.follow(self._source.live(), self._names)
        if self._settings.nonfinite == "raise":
            bad = [self._names[i] for i in self._shadow.nonfinite()]
            if bad:
                raise NonFiniteError(
                    f"{len(bad)} parameters hold NaN or Inf on this rank after step "
                    f"{self._clock.applied_steps + 1}, among them {bad[:3]}; the average is as "
                    "it was before this step"
                )
        action = self._clock.tick()
        if action is Action.SEED:
            self._seed()
        elif action is Action.LERP:
            self._shadow.lerp(self._clock)

    def _seed(self) -> None:
        self._shadow.follow(self._source.live(), self._names)
        bad = self._shadow.seed(keep_nonfinite=self._settings.nonfinite == "allow")
        if bad:
            names = [self._names[i] for i in bad]
            self._health.warn_once(
                "nonfinite seed",
                f"{len(names)} parameters hold NaN or Inf as their average starts, among them "
                f"{names[:3]}; initialise or load the weights before making the average",
            )
        self._health.begin(self._clock, self._shadow, self._weights())

    def reseed(self) -> None:
        """Start the average anew from the weights as they are now; never communicates.

        For weights that were replaced after the average was made, such as those of an older run
        that kept none. ``num_updates`` is 0 again; before ``start_step`` nothing changes but the
        shadow.

        Raises:
            SwapError: inside :meth:`swap`.
        """
        self._refuse_in_swap("reseed()")
        self._prepare(usable=False, seed=False)
        if self._clock.seed_step is not None:
            self._clock.reseed()
        self._seed()
        self._unusable = None

    # ------------------------------------------------------------------ using the average

    @contextmanager
    def swap(self, profile: str | None = None) -> Iterator[None]:
        """Let the average stand in for the parameters, and restore them exactly afterwards.

        Do not enter between a forward and its backward. Entering is collective where replicas
        share the work (DDP; meshes that replicate parameters, or leave some plain) and under
        DeepSpeed, and in every layout the first time if :meth:`attach` was never called: every
        rank must come. Leaving is collective under ZeRO 1 to 3 alone, where an exception on one
        rank is raised on all; elsewhere it is safe on one rank alone.

        Args:
            profile: which average; may be left out if there is only one.

        Raises:
            SwapError: a swap is active already; or, under ZeRO 1 to 3, another rank left the block
                with an exception.
            AbsentRankError: a rank did not come to a collective entry or exit.
        """
        name = self._profile_name(profile)
        self._refuse_in_swap("a second swap()")
        backup: Backup = []

        def back_up() -> None:
            self._prepare()
            self._check_moving()
            backup.extend(self._source.back_up())

        self._prepare_to_overwrite(back_up, "ema.swap()")
        self._backup_bytes = sum(copy.numel() * copy.element_size() for _, copy in backup)
        self._swapped = name
        failure: BaseException | None = None
        try:
            self._source.swap_in(self._shadow.views[name])
            self._source.overwritten()
            yield
        except BaseException as error:
            failure = error
            raise
        finally:
            self._leave_swap(backup, failure)

    def _leave_swap(self, backup: Backup, failure: BaseException | None) -> None:
        failures: dict[int, str] = {}
        if self._source.restore_is_collective:
            own = None if failure is None else f"{type(failure).__name__}: {failure}"
            try:
                answers = self._ranks.gather(own, "the end of ema.swap()")
            except AbsentRankError:
                self._swapped = None
                self._unusable = (
                    "a rank was lost in swap(), and the model still holds the average; restart "
                    "from a checkpoint"
                )
                raise
            failures = {rank: text for rank, text in enumerate(answers) if text is not None}
        try:
            self._source.restore(backup)
        finally:
            self._source.overwritten()
            self._swapped = None
            self._backup_bytes = 0
        if failures and failure is None:
            rank = min(failures)
            raise SwapError(
                f"rank {rank} left the swap() block with {failures[rank]}; the parameters are "
                "restored on all ranks",
                failures,
            )

    def copy_to(self, profile: str | None = None) -> None:
        """Overwrite the parameters with the average for good. Collective where swap is."""
        name = self._profile_name(profile)
        self._refuse_in_swap("copy_to()")
        self._prepare_to_overwrite(self._prepare, "ema.copy_to()")
        self._source.keep(self._shadow.views[name])
        self._source.overwritten()
        self._health.accept(self._clock, self._weights())

    # ------------------------------------------------------------------ common ground

    def _prepare(self, *, usable: bool = True, seed: bool = True, settle: bool = True) -> None:
        """Bring model and shadow into step before anything reads them. Never communicates.

        Args:
            settle: bring the model into its sharded form. All ranks must, or none: the next
                forward gathers again what was freed here.
        """
        if usable or self._unusable == "closed":
            self._require_usable()
        if self._hooks is not None and self._swapped is None:
            self._hooks.flush()
        if settle:
            self._source.settle()
            self._source.check_current()
            self._health.check_complete(left_out(self._source, self._settings.buffers))
        self._shadow.follow(self._source.live(), self._names)
        if seed and self._clock.seed_step is None and self._swapped is None:
            self._shadow.seed(keep_nonfinite=True)

    def _prepare_to_overwrite(self, prepare: Callable[[], None], purpose: str) -> None:
        """Prepare to overwrite parameters, which takes all ranks in some layouts."""
        self._agree_once()
        if self._source.swap_is_collective:
            self._ranks.agree(prepare, purpose)
        else:
            prepare()

    def _agree_once(self, bind: Callable[[], None] | None = None) -> None:
        """Refuse, on all ranks, a model that contradicts itself or differs between ranks.

        Args:
            bind: what to do on every rank before; if it fails on one, all raise.
        """
        if self._agreed and bind is None:
            return

        def verdict() -> dict[str, tuple[Box, str]]:
            if bind is not None:
                bind()
            if self._agreed:
                return {}
            self._source.self_check()
            return self._source.agreement_record() if self._ranks.size > 1 else {}

        records = self._ranks.agree(
            verdict, "ema.attach()" if bind else "the first agreement of all ranks"
        )
        if not self._agreed:
            self._source.compare(records)
        self._agreed = True

    def _weights(self) -> list[Tensor]:
        """What only optimizer steps should change: not the buffers that are averaged."""
        pairs = zip(self._source.shards, self._source.live(), strict=True)
        return [t for shard, t in pairs if isinstance(shard.name.tensor, nn.Parameter)]

    def _check_moving(self, *, closing: bool = False) -> None:
        weights, attached = self._weights(), self._hooks is not None
        self._health.check_counted(self._clock, weights, attached=attached, closing=closing)
        self._health.check_moving(self._clock, self._shadow, weights)

    def _check_health(self, *, closing: bool = False) -> None:
        if self._swapped is None:
            self._check_moving(closing=closing)
        self._health.check_finite(self._shadow.collect_skipped())

    def _profile_name(self, profile: str | None) -> str:
        known = list(self._settings.profiles)
        if profile is None and len(known) == 1:
            return known[0]
        if profile not in known:
            raise ConfigError(f"profile {profile!r} is not one of {known}")
        return profile

    def _refuse_in_swap(self, what: str) -> None:
        if self._swapped is not None:
            raise SwapError(
                f"{what} is not allowed while the average {self._swapped!r} stands in for the "
                "parameters; leave the swap() block first"
            )

    def _require_usable(self) -> None:
        if self._unusable is not None:
            raise StateError(f"this average cannot be used: {self._unusable}")

    def close(self) -> None:
        """Detach, give last warnings and release the process group."""
        if self._unusable == "closed":
            return
        self._refuse_in_swap("close()")
        if self._hooks is not None:
            self._hooks.flush()
        if self._unusable is None:
            self._check_health(closing=True)
            self._health.check_forgotten(self._clock, self._shadow)
        if self._hooks is not None:
            self._hooks.remove()
        self._ranks.close()
        self._unusable = "closed"
