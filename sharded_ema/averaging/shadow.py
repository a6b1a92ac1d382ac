"""The shadow of this rank's shards: one set of averages for each profile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharded_ema.averaging.kernels import LerpPlan, launches
from sharded_ema.averaging.kernels.launches import ALIGNMENT, StepWeights
from sharded_ema.config import OFFLOAD_BUFFER
from sharded_ema.errors import ConfigError, StateError
from sharded_ema.model.devices import is_accelerator
from sharded_ema.model.memory import allocate, has_memory, one_of_each_storage
from sharded_ema.model.precision import average_dtype


class Shadow:
    """Averages of a fixed list of local tensors, one set per profile.

    Each profile has one flat buffer per device and dtype, with a view per parameter that has the
    parameter's shape and, where that is gapless, its memory order. On a GPU each view starts at a
    multiple of 16 bytes; what is left free in between counts as allocated and is in no checkpoint.

    Args:
        profiles: names of the averages.
        live: this rank's part of every averaged tensor, in a fixed order.
        names: of these tensors, for messages.
        dtype: dtype of the shadow; ``None`` for at least fp32 and the precision of each parameter.
        device: where the shadow lies; ``None`` for each parameter's own device.
        guard: skip and count non-finite elements.
        impl: kernel implementation; ``None`` for the best.
        offload_buffer: bytes of a GPU that its parameters pass through to a shadow on the host.
        by_step: weights on the device that :meth:`lerp_by_step` takes.

    Attributes:
        skipped_elements: those that the guard has skipped, as of the last look.
        failure: what the last update has failed with behind the call, as of the last look.
    """

    # What a copy does not share: it reads the tensors of a copied model, which track() tells.
    not_copied = ("_plan", "_kept")

    def __init__(
        self,
        profiles: Iterable[str],
        live: Sequence[Tensor],
        names: Sequence[str],
        *,
        dtype: torch.dtype | None,
        device: torch.device | None,
        guard: bool,
        impl: str | None,
        offload_buffer: int = OFFLOAD_BUFFER,
        by_step: StepWeights | None = None,
    ) -> None:
        self.skipped_elements = 0
        self.failure: BaseException | None = None
        self._names = names
        self._guard = guard
        self._impl = impl
        self._offload_buffer = offload_buffer
        self._by_step = by_step
        # Plans that a graph has recorded, with the memory of parameters that it knows by address.
        self._kept: list[tuple[LerpPlan, list[Tensor]]] = []
        self._seeded = False
        # Positions of shadows that may hold NaN or Inf, of which the average is to be rid.
        self._unhealthy: set[int] = set()
        self._memory: dict[str, list[Tensor]] = {}
        self._views = {name: self._allocate(name, live, dtype, device) for name in profiles}
        self._plan: LerpPlan | None = self._make_plan(live)

    def __getstate__(self) -> dict[str, Any]:
        self.collect_skipped()
        return {name: value for name, value in vars(self).items() if name not in self.not_copied}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _plan=None, _kept=[])

    @property
    def views(self) -> dict[str, list[Tensor]]:
        """For each profile one tensor per parameter, as the last update has left them."""
        self.settle()
        return self._views

    def settle(self) -> None:
        """Wait for an update that goes on behind the call; :attr:`failure` says how it ended."""
        if self._plan is not None and self._plan.under_way:
            self.failure = self._plan.settle() or self.failure

    def release(self) -> None:
        """From now on parameters may change, whatever an update has still to read of them."""
        if self._plan is not None:
            self._plan.release()

    # An evaluation may have turned inference mode on; its tensors could never be updated.
    @torch.inference_mode(False)
    def _allocate(
        self,
        profile: str,
        live: Sequence[Tensor],
        dtype: torch.dtype | None,
        device: torch.device | None,
    ) -> list[Tensor]:
        kinds = [(device or t.device, average_dtype(t.dtype, dtype)) for t in live]
        # Copies between a device and what is pinned go on while the host does something else.
        pinned = any(is_accelerator(t.device) for t in live)
        sizes: dict[tuple[torch.device, torch.dtype], int] = {}
        for tensor, kind in zip(live, kinds, strict=True):
            sizes[kind] = sizes.get(kind, 0) + tensor.numel() + _gap(tensor.numel(), *kind)
        free = {
            (where, of): allocate(n, of, where, pinned=pinned and where.type == "cpu")
            for (where, of), n in sizes.items()
        }
        self._memory[profile] = list(free.values())
        views = []
        for tensor, kind in zip(live, kinds, strict=True):
            taken = tensor.numel() + _gap(tensor.numel(), *kind)
            flat, free[kind] = free[kind][: tensor.numel()], free[kind][taken:]
            # empty_like settles the memory order: the parameter's if gapless, else C order.
            strides = torch.empty_like(tensor, device="meta").stride()
            views.append(
                flat.as_strided(tensor.shape, strides)
                if tensor.numel()
                else flat.view(tensor.shape)
            )
        return views

    @torch.no_grad()
    def move(self, profile: str, homes: Sequence[Tensor], live: Sequence[Tensor]) -> None:
        """Let an average live in other memory from now on, which has its values already.

        Args:
            homes: one tensor per parameter, of the same shapes and dtypes.
            live: the parameters.
        """
        self.collect_skipped()
        self._views[profile] = list(homes)
        self._memory[profile] = one_of_each_storage(homes)
        self._plan = self._make_plan(live)

    @torch.inference_mode(False)
    def _make_plan(self, live: Sequence[Tensor]) -> LerpPlan:
        plan = LerpPlan(
            list(self._views.values()),
            list(live),
            guard=self._guard,
            impl=self._impl,
            buffer_bytes=self._offload_buffer,
            by_step=self._by_step,
        )
        if self._by_step is not None and plan.not_launched:
            left = [self._names[i] for i in plan.not_launched]
            raise ConfigError(
                f"capturable=True takes what the Triton kernel updates, and {len(left)} "
                f"parameters are not of that kind, among them {left[:3]}: it takes tensors "
                "without gaps, an fp32 or fp64 shadow on their GPU and at most 8 profiles, where "
                "there is Triton. Leave capturable or these parameters out"
            )
        return plan

    def reads(self, live: Sequence[Tensor]) -> bool:
        """Whether an update would read these tensors, and write the shadow, where they are now."""
        return self._plan is not None and self._plan.reads(live)

    def follow(self, live: Sequence[Tensor]) -> None:
        """Take up parameters whose memory has changed before an update reads them.

        Raises:
            StateError: see :meth:`track`.
        """
        if not self.reads(live):
            self.track(live)

    def track(self, live: Sequence[Tensor]) -> None:
        """Take up parameters whose memory has changed: moved, converted, with other strides.

        Raises:
            StateError: a parameter changed its shape since the shadow was made, or lies nowhere.
        """
        self._refuse_changed(live)
        if not self.reads(live):
            self.collect_skipped()
            self._plan = self._make_plan(live)

    def _refuse_changed(self, live: Sequence[Tensor]) -> None:
        views = next(iter(self._views.values()))
        for tensor, view, name in zip(live, views, self._names, strict=True):
            if tensor.shape != view.shape:
                raise StateError(
                    f"parameter {name} had local shape {tuple(view.shape)} when the average was "
                    f"made and has {tuple(tensor.shape)} now; make a new ShardedEMA after "
                    "resizing a model"
                )
            if tensor.layout is torch.strided and not has_memory(tensor):
                raise StateError(
                    f"parameter {name} has given back its memory, of which {tensor.numel()} "
                    "elements are to be averaged; call this where the parameters are there, as "
                    "after optimizer.step()"
                )
            if tensor.is_complex() != view.is_complex() or tensor.is_conj():
                raise StateError(
                    f"parameter {name} is averaged as {view.dtype} and has become {tensor.dtype}"
                    f"{', conjugated lazily' if tensor.is_conj() else ''}; make a new ShardedEMA "
                    "after such a change, of tensors on which resolve_conj() was called"
                )

    @property
    def _tracked(self) -> LerpPlan:
        assert self._plan is not None, "a copy is tracked before it is used"
        return self._plan

    @torch.no_grad()
    def copy_live(
        self, *, keep_nonfinite: bool, profiles: Iterable[str] | None = None
    ) -> list[str]:
        """Shadows become the parameters; this may wait for the device.

        Args:
            keep_nonfinite: copy NaN and Inf too, and let them be. Otherwise such elements keep what
                the shadow held. If it never held anything they are copied, and become the
                parameter's at the first update that finds it finite.
            profiles: of which; ``None`` for all.

        Returns:
            Names of parameters in which NaN or Inf were found, if that was looked for.
        """
        self.settle()
        live = self._tracked.live
        bad = [] if keep_nonfinite else self._tracked.nonfinite()
        chosen = set(self._views if profiles is None else profiles)
        for name, views in zip(self._views, self._tracked.shadows, strict=True):
            if name not in chosen:
                continue
            for i, (view, parameter) in enumerate(zip(views, live, strict=True)):
                if i in bad and self._seeded:
                    value = parameter.to(view.device, view.dtype)
                    view.copy_(torch.where(torch.isfinite(value), value, view))
                else:
                    view.copy_(parameter)
        self._seeded = True
        self._unhealthy |= set(bad)
        return [self._names[i] for i in bad]

    def examine(self) -> list[str]:
        """Look for NaN and Inf in the shadow, which later updates are to heal.

        Returns:
            Names of the parameters whose average holds some. Waits for the device.
        """
        self._unhealthy = self._sick(range(len(self._names)))
        return [self._names[i] for i in sorted(self._unhealthy)]

    def _sick(self, positions: Iterable[int]) -> set[int]:
        views = self.views.values()
        return {i for i in positions if not all(bool(torch.isfinite(v[i]).all()) for v in views)}

    @torch.no_grad()
    def equals(self, live: Sequence[Tensor], positions: Sequence[int]) -> bool:
        """Whether some tensors are what a shadow holds; NaN and Inf count as equal to anything."""
        views = next(iter(self.views.values()))
        return all(_is_cast(views[i], live[i]) for i in positions)

    def lerp(self, decays: Mapping[str, float], *, overlap: bool = False) -> None:
        """Move every shadow: ``shadow <- decay * shadow + (1 - decay) * parameter``.

        Args:
            decays: by profile.
            overlap: read parameters of a GPU beside what its current stream does, until
                :meth:`release`.
        """
        self.settle()
        plan = self._tracked
        try:
            if self._unhealthy:
                plan.heal(self._unhealthy)
            plan.run([1.0 - decays[name] for name in self._views], overlap=overlap)
        except RuntimeError:
            self._refuse_changed(plan.given)
            raise

    @property
    def is_recorded(self) -> bool:
        """Whether a graph has recorded updates of this memory."""
        return bool(self._kept)

    def lerp_by_step(self, *, keep: bool) -> None:
        """As :meth:`lerp`, by weights of the device. Elements that are NaN or Inf heal in it.

        Args:
            keep: a graph records this, and reads the memory of the plan at each replay.
        """
        plan = self._tracked
        if keep and not any(plan is kept for kept, _ in self._kept):
            # Aliases, since a parameter itself may be given other memory.
            self._kept.append((plan, [tensor.detach() for tensor in plan.given]))
        plan.run_by_step()

    def nonfinite(self) -> list[str]:
        """Names of parameters that hold NaN or Inf. Waits for the device."""
        return [self._names[i] for i in self._tracked.nonfinite()]

    def collect_skipped(self) -> int:
        """Elements that the guard has skipped so far. Waits for the device."""
        self.settle()
        if self._plan is not None:
            plans = {id(plan): plan for plan in (self._plan, *(plan for plan, _ in self._kept))}
            self.skipped_elements += sum(plan.take_skipped() for plan in plans.values())
            self._unhealthy = self._sick(self._unhealthy)
        return self.skipped_elements

    @property
    def allocated(self) -> dict[torch.device, int]:
        """Bytes allocated for the shadow, by device."""
        total: dict[torch.device, int] = {}
        for memory in self._memory.values():
            for t in memory:
                total[t.device] = total.get(t.device, 0) + t.untyped_storage().nbytes()
        return total

    @property
    def num_bytes(self) -> int:
        """Bytes that its elements take."""
        return sum(v.numel() * v.element_size() for views in self._views.values() for v in views)

    @property
    def transfer_bytes(self) -> int:
        """Bytes that parameters pass through to a shadow on the host, there and on their device."""
        return 0 if self._plan is None else self._plan.transfer_bytes


def _gap(numel: int, device: torch.device, dtype: torch.dtype) -> int:
    """Elements left free behind a tensor, so that the next one starts where kernels want it."""
    return -numel % (ALIGNMENT // dtype.itemsize) if device.type in launches.DEVICES else 0


# Elements compared at a time.
_BLOCK = 1 << 22


def _is_cast(view: Tensor, live: Tensor) -> bool:
    if live.dtype == view.dtype and live.device == view.device and torch.equal(view, live):
        return True
    if not view.is_contiguous() or not live.is_contiguous():
        pairs = [(view, live)]
    else:
        pairs = list(
            zip(view.view(-1).split(_BLOCK), live.detach().view(-1).split(_BLOCK), strict=True)
        )
    for ours, theirs in pairs:
        value = theirs.to(ours.device, ours.dtype)
        if not bool(((ours == value) | ~torch.isfinite(value)).all()):
            return False
    return True
