"""``ShardedEMA``: the averages of a sharded model, from the first step to the last checkpoint.

The face of the library, in the order of a training program: make it, let it follow the optimizer,
look at the average, store it, close it. It holds four parts and does what takes several of them:
the model that is followed (:mod:`sharded_ema.model`), its average (:mod:`sharded_ema.averaging`),
the store of its checkpoints (:mod:`sharded_ema.checkpoint`), and what is noticed of its health.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_ema.averaging.average import Average, check_dtype
from sharded_ema.averaging.distance import Part, partial_distances, relative_distance
from sharded_ema.averaging.health import Health
from sharded_ema.averaging.schedules import Schedule, as_profiles
from sharded_ema.checkpoint.engine import EngineCheckpoints, Traveller
from sharded_ema.checkpoint.store import Store
from sharded_ema.checkpoint.writing.background import SaveHandle
from sharded_ema.config import OFFLOAD_BUFFER, Settings, buffer_rules
from sharded_ema.errors import (
    CheckpointNotFoundError,
    CheckpointWriteError,
    ConfigError,
    StateError,
    SwapError,
    caller_among,
    is_called_from,
    warn,
)
from sharded_ema.model.devices import check_device
from sharded_ema.model.followed import FollowedModel
from sharded_ema.model.inventory import Selection, adapters_of, as_model, as_patterns
from sharded_ema.model.precision import as_dtype
from sharded_ema.model.recipients import part_of_the_way, write_into
from sharded_ema.model.sources import make_source
from sharded_ema.model.standing import Swap
from sharded_ema.model.steps import OptimizerSteps, StepHooks, StepListener, StepWatch
from sharded_ema.model.twins import Twin


class ShardedEMA:
    """Exponential moving averages of a model's weights, each rank keeping its own shard.

    Every profile keeps ``shadow = decay * shadow + (1 - decay) * parameter`` in fp32 for this
    rank's part of each trainable parameter, updated in place after every applied optimizer step
    without communication, host synchronisation or full-size temporaries. Exponential averaging of
    iterates: Polyak and Juditsky (1992); Tarvainen and Valpola (2017), equation 1.

    Args:
        target: a plain module, a DistributedDataParallel or FullyShardedDataParallel module, one
            whose parameters are DTensors (``fully_shard``, HSDP, tensor and expert parallelism),
            or a DeepSpeed engine; wrap and materialise it first. A list of modules is one model, as
            the stages of a pipeline that lie on one rank.
        schedule: a decay per optimizer step in ``[0, 1]``, a schedule, its text
            (``"half_life:2000"``), or a dict of several by profile name. The default is
            ``min(0.9999, (1 + n) / (10 + n))``, the law of TensorFlow's
            ``ExponentialMovingAverage(num_updates=n)``: it spans a ninth of the run so far until
            step 90,000, then 10,000 steps, and less than 1 % of it is its seed from step 4 on.
        update_every: applied optimizer steps between updates; the decays of the steps between are
            multiplied, so that the average does not depend on it but for what it did not see.
        decay_per: ``"step"``, as above; or ``"update"``: an update has the decay of its step once,
            however many lie between. So references are moved that follow every so many steps by a
            given rate: TR-DPO (Gorbatovski et al. 2024, 2404.09656), target networks.
        start_step: applied optimizer step at which the shadow becomes the parameters and averaging
            starts. Before it, the average is the parameters.
        include, exclude: shell-style patterns over names of parameters; buffers go by ``buffers``.
        buffers: ``"copy"`` stores buffers as they are, ``"average"`` averages floating and complex
            ones, ``"ignore"`` leaves them out; a dict has one of these for each pattern of names,
            the first that matches counts: ``{"*.running_*": "average", "*": "copy"}``. What none
            matches is copied. Integer buffers are never averaged.
        frozen: ``"save"`` stores parameters without gradient in checkpoints, ``"skip"`` does not;
            default ``"save"``, but ``"skip"`` for a model with PEFT adapters.
        shadow_dtype: dtype of the shadow; default fp32, and fp64 for parameters in fp64. One below
            fp32 is refused with decays at which it would not move.
        device: where the shadow lies; default each parameter's own device. ``"cpu"`` keeps that of
            a model on a GPU on the host, where a thread averages what :meth:`update` has only
            begun to copy; the next update and whatever looks at the average waits for it.
        offload_buffer: bytes of a GPU that its parameters pass through to a shadow on the host.
        overlap: let a GPU read the weights for the average beside the next forward and backward,
            until an attached ``torch.optim.Optimizer`` steps again. Only for programs in which
            nothing else changes the weights in between, which no library can see: no clipping,
            normalising or loading there. ``"auto"`` does so where hooks of such an optimizer are
            attached and no buffers are averaged, and ``True`` refuses all else by name.
        capturable: let an update be part of a step that is recorded in a CUDA graph, as of torch's
            optimizers. The device counts the steps and has the decays of the next 65,536 of them,
            so that each replay is an update; ``num_updates``, metrics and saves read the count from
            there, and bring further decays there. Take a step with its update before the capture.
            For parameters of one GPU that the Triton kernel takes; all else is refused by name.
        shard_replicas: of parameters that R ranks hold alike (DDP, DeepSpeed without ZeRO, axes of
            a mesh that replicate, plain parameters beside DTensors) keep 1/R on each.
        nonfinite: NaN and Inf in parameters: ``"skip"`` these elements and count them, ``"raise"``
            before the shadow is touched (reads the parameters twice and waits for the device), or
            ``"allow"``.
        impl: ``"foreach"`` or ``"reference"``.
        total_steps: planned optimizer steps of the run; only used for warnings and for the check
            of ``shadow_dtype``. Without it, an average that is used while more than 5 % of it are
            its seed is warned of, whatever is to come.
        force_dtype: deprecated; accepts any ``shadow_dtype``, also one that would not move.
        process_group: over all ranks that hold parts of the model, if its layout does not say:
            stages of a pipeline that are wrapped in DistributedDataParallel each, or a mesh of
            which some ranks do something else.
        timeout: seconds after which a rank that does not come to a swap or save counts as absent.

    Raises:
        ConfigError: a setting is out of range.
        BindError: nothing to average, or a meta or size-0 parameter.
        UnsupportedLayoutError: a parameter is sharded in an unsupported way.
        FrameworkVersionError: this version of PyTorch or DeepSpeed lacks what reading it takes.
    """

    # What a copy does not share: it is attached to nothing.
    _not_copied = ("_engine_checkpoints", "_watch", "_twins")
    _engine_checkpoints: EngineCheckpoints | None = None
    _watch: StepWatch | None = None

    def __init__(
        self,
        target: nn.Module | Sequence[nn.Module],
        schedule: float | str | Schedule | Mapping[str, float | str | Schedule] = "warmup:0.9999",
        *,
        update_every: int = 1,
        start_step: int = 0,
        decay_per: str = "step",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        buffers: str | Mapping[str, str] = "copy",
        frozen: str | None = None,
        shadow_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        offload_buffer: int = OFFLOAD_BUFFER,
        overlap: bool | str = False,
        capturable: bool = False,
        shard_replicas: bool = True,
        nonfinite: str = "skip",
        impl: str | None = None,
        total_steps: int | None = None,
        force_dtype: bool = False,
        process_group: dist.ProcessGroup | None = None,
        timeout: float = 600.0,
    ) -> None:
        target = as_model(target)
        profiles = as_profiles(schedule)
        shadow_dtype = as_dtype(shadow_dtype, "shadow_dtype")
        settings = Settings(
            update_every=update_every,
            start_step=start_step,
            decay_per=decay_per,
            buffers=buffers,
            frozen=frozen or ("skip" if adapters_of(target) else "save"),
            nonfinite=nonfinite,
            total_steps=total_steps,
            offload_buffer=offload_buffer,
            overlap=overlap,
            capturable=capturable,
        )
        if force_dtype:
            warn(
                "force_dtype is deprecated: a shadow_dtype below float32 is accepted wherever the "
                "average moves in it",
                DeprecationWarning,
            )
        else:
            check_dtype(shadow_dtype, profiles, settings.total_steps)
        selection = Selection(
            include=as_patterns(include),
            exclude=as_patterns(exclude) or (),
            buffers=buffer_rules(buffers),
        )
        source = make_source(target, selection, process_group, shard_replicas=shard_replicas)
        self._closed = False
        self._begun = False  # whether an optimizer has stepped
        self._overlap = overlap
        self._capturable = capturable
        # The module of an average, with what it was made with.
        self._twins: dict[str, tuple[tuple[Any, ...], Twin]] = {}
        self._model = FollowedModel(source, timeout)
        self._model.refuse_in_other_swap("making a ShardedEMA")
        self._model.inventory.check_stored_apart(frozen=settings.frozen == "save")
        self._average = Average(
            profiles,
            self._model.live(),
            self._model.names,
            update_every=settings.update_every,
            start_step=settings.start_step,
            decay_per=decay_per,
            nonfinite=nonfinite,
            dtype=shadow_dtype,
            device=check_device(torch.device(device)) if device is not None else None,
            impl=impl,
            offload_buffer=offload_buffer,
            capturable=capturable,
        )
        self._health = Health(settings.total_steps)
        self._store = Store(self._average, self._model, settings, self._health)
        self._engine_checkpoints = EngineCheckpoints(target)
        self._health.see_statistics(self._model.statistics())
        self._begin(self._average.start())
        self._watch = self._model.watch(self._weights_will_change)
        self._health.check_plan(self._average)

    def __getstate__(self) -> dict[str, Any]:
        if is_called_from("torch.distributed.checkpoint"):
            raise CheckpointWriteError(f"the ShardedEMA lies {_BELOW}")
        self._model.refuse_copies()
        return {name: value for name, value in vars(self).items() if name not in self._not_copied}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _twins={})
        if not self._closed:
            self._watch = self._model.watch(self._weights_will_change)

    def __create_write_items__(self, key: str, value: object) -> NoReturn:
        """Refuse what torch.distributed.checkpoint would pickle whole; it asks by this name."""
        raise CheckpointWriteError(f"the ShardedEMA lies under {key!r}, {_BELOW}")

    # ------------------------------------------------------------------ following the optimizer

    def attach(self, *optimizers: Any, checkpoint: bool = True, strict: bool = False) -> StepHooks:
        """Update after every step that the optimizers apply; all of them in one call.

        The ranks check here once that they hold the same replicated parameters, and under
        DeepSpeed that the weights of the model are its masters, rounded.

        Args:
            optimizers: every optimizer that trains the model; with several, one update follows
                the last of them. For a DeepSpeed engine none, or the engine itself.
            checkpoint: for an engine: its ``save_checkpoint(dir, tag)`` writes the average to
                ``dir/<tag>/ema``, and its ``load_checkpoint`` brings it back.
            strict: for an engine: refuse to load a checkpoint that has no average. Else the
                average starts anew from the loaded weights, with a warning.

        Returns:
            A handle; its ``remove()`` detaches.

        Raises:
            OptimizerError: no optimizer given, or one that owns no averaged parameter.
            BindError: what the ranks hold contradicts itself; the parameter is named.
            StateError: already attached.
        """
        self._require_usable()
        self._model.refuse_in_other_swap("attach()")
        steps = self._model.attach(
            optimizers,
            StepListener(
                before=self._weights_will_change, applied=self._applied_step, removed=self._detached
            ),
            self._average.counted,
        )
        self._health.warn_of_all(self._model.not_shared())
        self._start_from_what_trains()
        if checkpoint and self._engine_checkpoints is not None:
            self._engine_checkpoints.carry(
                Traveller(
                    refuse=self._model.refuse_in_swap,
                    save=lambda path, step: self.save(path, step=step, replace=True, latest=False),
                    load=lambda path, step: self._loaded_by_engine(path, step, strict=strict),
                    unknown=self._engine_came_from_elsewhere,
                ),
                fresh=self._average.is_fresh,
            )
        return steps

    def update(self) -> None:
        """One optimizer step was applied: advance the average. Not needed once attached.

        Raises:
            SwapError: inside :meth:`swap`.
            BindError: a module has another parameter in the place of an averaged one; the step is
                not counted.
            NonFiniteError: with ``nonfinite="raise"``, on the ranks whose shard holds NaN or Inf;
                their shadow is untouched. There is no collective here to tell the others.
        """
        if self._model.steps is not None:
            self._health.warn_once(
                "double",
                "update() was called although an optimizer is attached, which updates the average "
                "already; every step counts twice now. Remove the call or the attachment",
            )
        if torch.compiler.is_compiling():  # compiled, it would be rounded in another way
            torch.compiler.disable(self._applied_step)()
        else:
            self._applied_step()

    def reseed(self) -> None:
        """Start the average anew from the weights as they are now; never communicates.

        For weights that were replaced after the average was made, such as those of an older run
        that kept none. ``num_updates`` is 0 again; before ``start_step`` nothing changes but the
        shadow.

        Raises:
            SwapError: inside :meth:`swap`.
        """
        self._model.refuse_in_swap("reseed()")
        self._require_open()
        self._catch_up()
        self._begun = False  # as of a new one: weights that are loaded until the next step are seen
        self._begin(self._average.start())

    def leave_engine_checkpoints(self) -> None:
        """Let a DeepSpeed engine's own checkpoints go without the average, which another saves.

        As ``attach(checkpoint=False)``, before or after it.
        """
        if self._engine_checkpoints is not None:
            self._engine_checkpoints.remove()
            self._engine_checkpoints = None

    # ------------------------------------------------------------------ using the average

    def swap(self, profile: str | None = None) -> Swap:
        """Let the average stand in for the parameters, and restore them exactly afterwards.

        A forward before it may have its backward after it, but not within. Entering is collective
        where replicas share the work (DDP; meshes that replicate parameters, or leave some plain)
        and under DeepSpeed, and in every layout the first time if :meth:`attach` was never called:
        every rank must come. Leaving is collective under ZeRO 1 to 3 alone, where an exception on
        one rank is raised on all; elsewhere it is safe on one rank alone.

        Args:
            profile: which average; may be left out if there is only one.

        Raises:
            SwapError: a swap is active already, of this average or another of the same weights;
                adapters are merged; a recorded step was replayed in the block; or, under ZeRO 1 to
                3, another rank left the block with an exception.
            StateError: from within a forward or backward of a module under ``fully_shard``.
            AbsentRankError: a rank did not come to a collective entry or exit.
        """
        return Swap(lambda: self._swapped(profile))

    @contextmanager
    def _swapped(self, profile: str | None) -> Iterator[None]:
        name = self._average.choose(profile)
        self._model.refuse_in_swap("a second swap()")

        def prepare() -> None:
            self._ready()
            self._check_moving()
            self._health.check_seed(self._average, [name])
            self._check_statistics()

        average = self._average
        with self._model.replaced(
            name, lambda: average.shadow.views[name], prepare, average.counted
        ):
            before = average.clock.applied_steps
            try:
                yield
            finally:
                # All other steps are refused as they come.
                replayed = average.clock.applied_steps != before
                if replayed:
                    average.broken = (
                        "a recorded step was replayed within swap(), so that it has taken in the "
                        "weights that stood in for the model's; load a checkpoint, or start it "
                        "anew from the weights with ema.reseed()"
                    )
            if replayed:
                raise SwapError(
                    "a recorded step was replayed within swap(): it has moved the weights that "
                    "stood in for the model's, which are now back as they were, and the average "
                    "has taken those in. Load a checkpoint, and replay outside of the block"
                )

    def copy_to(
        self,
        profile: str | None = None,
        *,
        module: nn.Module | Sequence[nn.Module] | None = None,
        share: float = 1.0,
    ) -> None:
        """Overwrite parameters with the average for good, or move them part of the way.

        Without ``module`` these are the averaged model's own, and the call is collective where
        swap is. Averages, and what an optimizer keeps of the weights (momentum), stay as they are:
        it goes on from where it was, at other weights. With ``share`` below 1, once in a while:
        the feedback of Switch EMA (Li et al. 2024, 2402.09240, equation 5, has ``share=1``), and
        with the roles of fast and slow weights changed the step of Lookahead (Zhang et al. 2019,
        1907.08610, algorithm 1).

        Args:
            profile: which average; may be left out if there is only one.
            module: another module with parameters of the same names and shapes, trained or
                frozen, plain or sharded alike or otherwise, in any dtype: a teacher, a reference,
                a model to be saved. Every rank must call. Its other buffers become those of the
                averaged model; frozen parameters of that are not copied.
            share: how far, in ``(0, 1]``: ``p + share * (average - p)``, computed in the precision
                of the average and rounded once.

        Raises:
            ConfigError: ``share`` is out of range, or ``module`` has parameters of the model.
            BindError: ``module`` lacks a parameter, or has another shape of it.
            SwapError: inside :meth:`swap`, without ``module``; or adapters are merged.
            AbsentRankError: a rank did not come.
        """
        name = self._average.choose(profile)
        if not 0.0 < share <= 1.0:
            raise ConfigError(f"share must be in (0, 1], got {share}")
        average = self._average

        def prepare() -> None:
            self._ready()
            self._health.check_seed(average, [name])
            self._check_statistics()

        def alike() -> dict[str, Any]:
            return {"share": share, **average.counted()}

        if module is not None:
            averages = self._store.averages
            write_into(module, self._model, lambda: averages(name), share, prepare, alike)
            return

        def moved() -> Sequence[Tensor]:
            return part_of_the_way(self._model.live(), average.shadow.views[name], share)

        self._model.refuse_in_swap("copy_to()")
        self._model.overwrite(name, moved, prepare, alike)
        self._health.note_weights(average, self._model.weights())

    def module(
        self,
        profile: str | None = None,
        *,
        dtype: torch.dtype | None = None,
        train: bool = False,
        build: Callable[[], nn.Module] | None = None,
    ) -> nn.Module:
        """The average as a module that computes beside the model: a teacher, a target network.

        Its averaged parameters *are* the average: no copy is made, every update moves them, and a
        checkpoint stores them once. Frozen parameters are the model's own, buffers (but averaged
        ones) copies that are its own from then on. Under ``fully_shard`` it is sharded as the
        model is, and a forward gathers layer by layer; the average moves into its padded shards.
        Where replicas share the average, a forward puts each parameter together when it asks for
        it. Under tensor parallelism it has the plan of the model.
        It is frozen: training it, loading into it and converting it are refused. Mean teacher:
        Tarvainen and Valpola (2017), 1703.01780; momentum encoders: He et al. (2020), 1911.05722.

        Every rank calls it, and under ``fully_shard`` or with shared replicas every forward is
        collective. One module for
        each average: calls with the same arguments return the same one.

        Args:
            profile: which average; may be left out if there is only one.
            dtype: to compute in; default that of the model. Parameters in another one, as the fp32
                average of bf16 weights, are converted layer by layer in each forward.
            train: leave it in training mode (dropout, statistics of batches).
            build: returns a module like the model, not wrapped, for a model that cannot be copied;
                its parameters and buffers are replaced.

        Raises:
            UnsupportedLayoutError: the layout has no place for it (FSDP1, DeepSpeed, tensor
                parallelism under ``fully_shard``), or replicas share the average and a module
                keeps its weights in a list, too (pass ``shard_replicas=False``).
            BindError: the model cannot be copied, or ``build`` returned another one.
            ConfigError: a module of this average was made with other arguments.
            StateError: a graph has recorded updates of the average.
            SwapError: inside :meth:`swap`.
            AbsentRankError: a rank did not come.
        """
        name = self._average.choose(profile)
        dtype = as_dtype(dtype, "dtype")
        known = self._twins.get(name)
        if known is not None:
            if known[0] != (dtype, train, build):
                raise ConfigError(
                    f"ema.module() was called before for the average {name!r} with other "
                    "arguments; each average is one module. Keep another profile for a second one"
                )
            known[1].settle()
            return known[1].module
        average = self._average

        def make() -> Twin:
            self._model.refuse_in_swap("module()")
            self._ready()
            if any(t.device != p.device for t, p in self._pairs(name)):
                raise ConfigError(
                    "ema.module() needs the average where the model is; make the ShardedEMA "
                    "without device="
                )
            if average.shadow.is_recorded:
                raise StateError(
                    "ema.module() may move the average to other memory, and a graph has recorded "
                    "updates of the one that it has; call it before the step is recorded"
                )
            views = average.shadow.views[name]
            return Twin(
                self._model.reader,
                views,
                dtype=dtype,
                build=build,
                refuse=self._before_its_forward,
                moment=lambda: average.moment,
            )

        self._model.meet()
        found: list[Twin] = []
        self._model.ranks.agree(lambda: found.append(make()), "ema.module()", average.counted)
        (twin,) = found
        average.shadow.move(name, twin.homes, self._model.live())
        twin.module.train(train)
        self._twins[name] = (dtype, train, build), twin
        return twin.module

    def _before_its_forward(self) -> None:
        """The module of an average is about to compute with it."""
        self._require_open()
        self._average.settle()
        if not self._average.has_started:  # it is what the parameters are now
            if self._model.is_recorded:
                raise StateError(
                    "a forward of the module of an average is recorded in a graph before "
                    "start_step, as far as was looked: there the average is the parameters, and "
                    "would be them for ever. Record it once ema.num_updates is above 0, and read "
                    "that number before"
                )
            self._look()

    def _pairs(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self._average.shadow.views[name], self._model.live(), strict=True)

    # ------------------------------------------------------------------ storing it

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that ``torch.distributed.checkpoint`` saves and loads in place; no collective.

        Keys are ``<profile>.<name>``, ``_frozen.<name>``, ``_buffers.<name>`` and ``_meta`` (uint8,
        canonical JSON). Averages alias the shadow; frozen parameters and buffers are written by a
        save but never overwritten by a load.

        Raises:
            CheckpointWriteError: what asks for it would write the state of rank 0 alone, and there
                are several.
        """
        self._refuse_rank_0_writers()
        self._ready()
        return self._store.state_dict()

    def _refuse_rank_0_writers(self) -> None:
        if self._model.ranks.size == 1:
            return
        caller = caller_among(_WRITE_RANK_0)
        if caller is not None:
            what, remedy = _WRITE_RANK_0[caller]
            raise CheckpointWriteError(
                f"{what} writes the state of rank 0 alone, in which the pieces of "
                f"{self._model.ranks.size - 1} other ranks would be missing; nothing of it was "
                f"written. {remedy}"
            )

    def full_state_dict(
        self,
        profile: str | None = None,
        *,
        rank0_only: bool = True,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """The averaged model, whole, in host memory; all ranks call it.

        Names, and what there is beside averages, are those of ``state_dict()`` of the bare model,
        so that it fits ``load_state_dict`` and ``save_pretrained(state_dict=...)``: parameters
        under each of their names, frozen ones (unless ``frozen="skip"``) and persistent buffers.
        The tensors come together one after the other; beside the result a rank holds one piece.
        For a model that does not fit into memory, save and ``sharded-ema consolidate``.

        Args:
            profile: which average; may be left out if there is only one.
            rank0_only: give it to the first rank alone, and nothing to the others.
            dtype: of all floating tensors; default that of the shadow for what is averaged, and
                their own for the others.

        Returns:
            Tensors on the CPU by name, of global shapes, that share no memory with the model;
            empty on the ranks that get nothing.

        Raises:
            ConfigError: ``dtype`` is no floating one.
            BindError: the ranks together do not hold all of a tensor.
            AbsentRankError: a rank did not come.
        """
        name = self._average.choose(profile)
        dtype = as_dtype(dtype, "dtype")
        if dtype is not None and not dtype.is_floating_point:
            raise ConfigError(f"dtype must be a floating one, got {dtype}")
        return self._store.full_state_dict(
            name, everywhere=not rank0_only, dtype=dtype, ready=self._ready
        )

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Take over a state: tensors loaded in place by DCP, or full tensors by the same keys.

        Args:
            strict: refuse missing or unknown names and a changed schedule.

        Raises:
            CheckpointMismatchError: names, shapes or schedules do not fit.
        """
        self._model.refuse_in_swap("load_state_dict()")
        self._require_open()
        self._catch_up()
        self._go_on_from(self._store.load_state_dict(state, strict=strict))

    def save(
        self,
        path: str | PathLike[str],
        *unnamed: object,
        step: int | None = None,
        asynchronous: bool = False,
        format: str = "safetensors",
        replace: bool = False,
        latest: bool = True,
        keep_last: int | None = None,
    ) -> SaveHandle:
        """Write a committed, durable checkpoint; all ranks call it. Also inside a swap.

        What killed saves have left beside ``path`` is removed first.

        Args:
            path: directory that the checkpoint will be, or a URL that fsspec has a driver for
                (``s3://bucket/run/step_1000``), where ``replace`` and ``format="dcp"`` are refused.
            step: training step to record; it must be given, by name.
            asynchronous: copy what is saved to host memory, return, and write it in a thread. The
                next save, load and ``close()`` wait for it, and raise what went wrong in it.
            format: ``"safetensors"``, or ``"dcp"`` for PyTorch's own distributed format.
            replace: replace a checkpoint that is at ``path``.
            latest: let the file ``latest`` beside ``path`` name this checkpoint. A file of that
                name which something else has put there is left alone.
            keep_last: after the commit, remove all but so many checkpoints of this average beside
                ``path`` whose names differ from its name in one number, the step. The new one
                and what ``latest`` names always stay.

        Returns:
            A handle; its ``result()`` is the path, once committed.

        Raises:
            ConfigError: no ``step``, or an option that cannot be.
            CheckpointExistsError: ``path`` is taken; nothing was written.
            CheckpointWriteError: a rank could not write, now or in the asynchronous save before;
                what could not be written was not committed.
        """
        if unnamed or step is None:
            given = unnamed[0] if unnamed else "..."
            raise ConfigError(f"save() takes the step by name: save(path, step={given})")
        handle = self._store.save(
            fspath(path),
            step=step,
            asynchronous=asynchronous,
            format=format,
            replace=replace,
            latest=latest,
            keep_last=keep_last,
            ready=self._ready,
        )
        self._check_health()
        self._health.check_seed(self._average)
        self._check_statistics()
        return handle

    def load(
        self,
        path: str | PathLike[str],
        *,
        strict: bool = True,
        verify: bool = False,
        num_updates: int | None = None,
    ) -> int:
        """Load a checkpoint of any sharding; all ranks call it.

        Or take over an average that another library has kept, and go on from there: a Hugging Face
        or diffusers directory or a safetensors file, or a file of ``torch.save`` with a state dict
        or with the state of torch_ema, diffusers' ``EMAModel``, timm or ``AveragedModel``, of
        which nothing is executed. It becomes every profile of this object. Every rank reads it.

        Args:
            path: directory of a committed checkpoint, ours or one of DCP with an average in it;
                or the file ``latest`` that names one; or one of those above.
            strict: refuse missing or unknown names and a changed schedule; else keep what the
                checkpoint lacks and go on with this object's schedule.
            verify: compare all that is read with its digests, for which chunks are read whole.
            num_updates: of an average of another library: after how many of its updates it was
                saved, the ``n`` from which the schedule goes on. May be left out where the file
                says so itself.

        Returns:
            The step it was saved under; of another library's average, ``num_updates``.

        Raises:
            CheckpointNotFoundError, CheckpointUncommittedError, CheckpointCorruptError,
            CheckpointMismatchError: on all ranks together. If data could not be read midway the
            average refuses use until a load succeeds.
            ConfigError: ``num_updates`` is missing, or given for a checkpoint of this library,
                which has counters of its own.
        """
        self._model.refuse_in_swap("load()")

        def ready() -> None:
            self._require_open()
            self._catch_up()
            self._average.mirror()  # which is kept where the checkpoint lacks something

        meta = self._store.load(
            fspath(path), strict=strict, verify=verify, num_updates=num_updates, ready=ready
        )
        self._go_on_from(meta)
        return int(meta["step"])

    # ------------------------------------------------------------------ looking at it

    @property
    def num_updates(self) -> int:
        """Applied optimizer steps since the seed, the ``n`` of ``schedule.decay(n)``."""
        return self._average.num_updates

    @property
    def decay(self) -> dict[str, float]:
        """Decay in force, by profile: per optimizer step, or as ``decay_per`` says."""
        return self._average.decays

    @property
    def memory(self) -> dict[str, int]:
        """Bytes on this rank.

        ``shadow``: allocated for the averages; ``ideal``: elements owned times their size;
        ``host``: the part of ``shadow`` on the CPU; ``swap_backup``: held while a swap is active;
        ``staging``: host memory that asynchronous saves copy to, kept from the first one on;
        ``transfer``: what parameters of a GPU pass through to a shadow on the host, there and here.
        """
        allocated = self._average.shadow.allocated
        return {
            "shadow": sum(allocated.values()),
            "ideal": self._average.shadow.num_bytes,
            "host": sum(n for device, n in allocated.items() if device.type == "cpu"),
            "swap_backup": self._model.backup_bytes,
            "staging": self._store.staging_bytes,
            "transfer": self._average.shadow.transfer_bytes,
        }

    @property
    def layout(self) -> str:
        """How the model was laid out when the average was made, such as ``fsdp2`` or ``zero-3``."""
        return self._model.reader.kind

    @property
    def names(self) -> list[str]:
        """Names of the averaged tensors, as in the bare model's ``state_dict()``."""
        return list(self._model.names)

    def metrics(self, *, distance: bool = False, prefix: str = "ema/") -> dict[str, float]:
        """Numbers to log; waits for the device.

        ``ema/num_updates``, ``ema/applied_steps``, ``ema/skipped_steps`` (seen by the hooks),
        ``ema/nonfinite_elements`` (on this rank) and for each profile ``ema/decay/<p>``,
        ``ema/horizon_steps/<p>`` (``1 / (1 - decay)``) and ``ema/seed_weight/<p>`` (share of the
        average that is still the initial weights).

        Args:
            distance: add ``ema/distance/<p>``, the norm of average minus parameters over that of
                the parameters, exact over all ranks; every rank must then call.
            prefix: what all names begin with; another for each of several averages in one log.
        """
        distances = self._distances() if distance else {}
        if not distance:  # one rank alone may call this, as loggers do
            self._require_usable()
            self._look()
        self._check_health()
        self._health.check_seed(self._average, logged=True)
        steps = self._model.steps
        found: dict[str, float] = {
            "num_updates": self.num_updates,
            "applied_steps": self._average.clock.applied_steps,
            "skipped_steps": steps.skipped_steps if steps else 0,
            "nonfinite_elements": self._average.shadow.collect_skipped(),
            **self._average.numbers,
            **distances,
        }
        return _Metrics(prefix, found)

    def _distances(self) -> dict[str, float]:
        def partial() -> dict[str, Part]:
            self._model.refuse_in_swap("metrics(distance=True)")
            self._ready()
            live, counted = self._model.live(), self._model.counted_here
            return partial_distances(self._average, live, counted, sampled=False)

        self._model.meet()
        gathered = self._model.ranks.agree(
            partial, "ema.metrics(distance=True)", self._average.counted
        )
        return {
            f"distance/{name}": relative_distance([parts[name] for parts in gathered])
            for name in gathered[0]
        }

    # ------------------------------------------------------------------ the end

    def close(self) -> None:
        """Wait for a save under way, detach, give last warnings and release the process groups.

        Call it before ``torch.distributed.destroy_process_group()``; the object cannot be used
        afterwards.

        Raises:
            CheckpointWriteError: an asynchronous save failed and nobody was told of it yet.
            StateError: the last update failed behind its call, and nobody was told of it yet.
        """
        told = self._average.broken
        try:
            self._store.wait()
        finally:
            if not self._closed:
                self._model.refuse_in_swap("close()")
                self._average.settle()
                self._say_goodbye()
                self._model.ranks.close()
                self._closed = True
            self._store.close()
        if told is None:
            self._average.require_whole()

    def _say_goodbye(self) -> None:
        if self._watch is not None:
            self._watch.remove()
        for _, twin in self._twins.values():
            twin.end()
        if self._model.steps is not None:
            self._model.steps.end_round()
        if self._average.broken is None:
            self._check_health(closing=True)
            self._check_statistics()
            self._health.check_seed(self._average, closing=True)
        if self._model.steps is not None:
            self._model.steps.remove()

    # ------------------------------------------------------------------ what happens in between

    def _applied_step(self) -> None:
        self._model.refuse_in_swap("update()")
        if not self._capturable:
            self._model.refuse_capture()
        if any(twin.is_running for _, twin in self._twins.values()):
            raise StateError(
                "an update was called within a forward of the module of this average, which would "
                "go on with other weights than it began with; update before or after it"
            )
        self._require_open()
        self._model.require_whole()
        self._model.inventory.check_not_replaced()
        started = self._average.advance(self._model.live(), overlap=self._overlaps())
        if started is not None:
            self._begin(started)
        if not self._capturable:  # a look waits for the device
            self._health.note_update(self._average, self._model.weights)

    def _overlaps(self) -> bool:
        """Whether an update may read the weights until a hook says that they will change."""
        if not self._overlap or self._capturable:
            return False
        buffers = len(self._model.weights_at) < len(self._model.names)
        hooked = isinstance(self._model.steps, OptimizerSteps)
        if self._overlap is True and (buffers or not hooked):
            reason = (
                "buffers are averaged, which a forward changes"
                if buffers
                else "no torch.optim.Optimizer is attached, whose hooks would tell before it "
                "changes the weights"
            )
            raise ConfigError(
                f"overlap=True was asked for and {reason}; pass overlap='auto', which then updates "
                "in the order of the program, or attach the optimizer"
            )
        return hooked and not buffers

    def _weights_will_change(self) -> None:
        """An optimizer is about to step, attached or not."""
        if self._closed:
            return
        self._average.release()
        self._model.refuse_in_swap("an optimizer step")
        if not self._begun:
            if self._capturable and self._model.is_recorded:
                raise StateError(
                    "a step is recorded in a graph, and none was taken outside of one since this "
                    "ShardedEMA was made or reseeded: whether the weights are still those that it "
                    "started from cannot be seen meanwhile; take a step with its update before, "
                    "as a warm-up"
                )
            self._begun = True
            self._start_from_what_trains()
        self._health.check_unedited(self._average, self._model.weights)

    def _start_from_what_trains(self) -> None:
        """Take weights in that were loaded or restored before the first step was counted."""
        if not self._average.is_fresh or self._model.standing_in is not None:
            return
        live = self._model.live()
        self._average.track(live)
        if self._average.is_seed(live, self._model.weights_at):
            return
        self._begin(self._average.start())
        self._health.warn_once(
            "other weights",
            "the weights have changed since the average was made, and no step was counted yet "
            "(load_state_dict, a restored run, new initial values): the average starts from the "
            "weights as they are now. Make the ShardedEMA after loading to begin with them at once",
        )

    def _begin(self, nonfinite: Sequence[str]) -> None:
        """The average has just become the weights, but for those that hold NaN or Inf."""
        self._health.warn_of_seed(nonfinite)
        self._health.begin(self._average, self._model.weights())

    def _detached(self) -> None:  # a handle calls it once
        self._model.detached()
        if self._engine_checkpoints is not None:
            self._engine_checkpoints.remove()

    def _engine_came_from_elsewhere(self, steps: int) -> None:
        self._health.warn_once(
            "engine not fresh",
            f"the engine has taken {steps} steps before attach(), and it is not known from which "
            "checkpoint it came: the average starts anew from its weights. If one was kept, call "
            "ema.load('<directory>/<tag>/ema'); to have it found, make the ShardedEMA before "
            "engine.load_checkpoint()",
        )

    def _loaded_by_engine(self, path: Path | None, engine_step: int, *, strict: bool) -> None:
        if path is None:
            self.reseed()
            return
        try:
            step = self.load(path)
        except CheckpointNotFoundError:
            if strict:
                raise
            self.reseed()
            self._health.warn_once(
                "no average",
                f"{path} does not exist, so the average starts anew from the loaded weights; if "
                "it lies elsewhere, load it with ema.load(path). attach(strict=True) makes this "
                "an error",
            )
            return
        if step != engine_step:
            self._health.warn_once(
                "other step",
                f"{path} was saved at step {step} and the engine's state at step "
                f"{engine_step}; they belong to different checkpoints",
            )

    def _go_on_from(self, meta: Mapping[str, Any]) -> None:
        """Values have just been loaded, and this is their description."""
        fresh = self._average.go_on_from(meta)
        if meta["seed_step"] is not None and self._average.clock.seed_step is None:
            self._health.warn_once(
                "later start",
                f"the checkpoint's average had started at step {meta['seed_step']}, and start_step="
                f"{self._average.clock.start_step} lies ahead: it starts anew there, and is the "
                "parameters until then. Keep start_step as it was to go on with it",
            )
        if fresh:
            self._health.warn_once(
                "fresh profiles",
                f"the checkpoint has no average {', '.join(fresh)}, which starts anew from the "
                "weights as they are now; its schedule goes on with the checkpoint's counters",
            )
        self._health.warn_of_loaded(self._average.examine())
        self._health.begin(self._average, self._model.weights(), loaded=True)

    # ------------------------------------------------------------------ common ground

    def _require_open(self) -> None:
        if self._closed:
            raise StateError("this average cannot be used: closed")

    def _require_usable(self) -> None:
        self._require_open()
        self._model.require_whole()
        self._average.settle()
        self._average.require_whole()

    def _look(self) -> None:
        """Bring the average into step, where that needs nothing of the model."""
        self._model.inventory.check_not_replaced()
        self._average.track(self._model.live())
        if self._model.is_itself:
            self._average.mirror()

    def _catch_up(self) -> None:
        """Bring model and average to rest and take up where the model's tensors are now."""
        self._average.settle()
        self._model.settle()
        self._health.warn_of_all(self._model.inventory.not_known())
        self._health.warn_of_all(self._model.not_shared())
        self._average.track(self._model.live())

    def _ready(self) -> None:
        """Bring model and average into step before anything reads them. Never communicates."""
        self._require_usable()
        self._catch_up()
        if self._model.standing_in is None:
            if self._average.clock.seed_step is None:
                self._model.refuse_in_other_swap("using an average before its start_step")
            self._average.mirror()

    def _check_moving(self, *, closing: bool = False) -> None:
        weights, attached = self._model.weights(), self._model.steps is not None
        self._health.check_counted(self._average, weights, attached=attached, closing=closing)
        self._health.check_moving(self._average, weights)

    def _check_statistics(self) -> None:
        if self._model.standing_in is None:  # else the body of a swap may have computed them anew
            self._health.check_statistics(self._model.statistics())

    def _check_health(self, *, closing: bool = False) -> None:
        if self._model.is_itself:
            self._check_moving(closing=closing)
        self._health.check_finite(self._average.shadow.collect_skipped())


class _Metrics(dict[str, float]):
    """Numbers under names with a prefix; those without one, as they once were, are found too."""

    def __init__(self, prefix: str, numbers: Mapping[str, float]) -> None:
        super().__init__({prefix + name: float(value) for name, value in numbers.items()})
        self._prefix = prefix

    def __missing__(self, name: str) -> float:
        now = self._prefix + name
        if now not in self:
            raise KeyError(name)
        warn(f"metrics()[{name!r}] is deprecated: it is called {now!r}", DeprecationWarning)
        return self[now]


_BELOW = (
    "below the top level of the state, and only there torch.distributed.checkpoint calls "
    "state_dict() and load_state_dict(). Move it up, as in dcp.save({'ema': ema, ...}) and "
    "dcp.load({'ema': ema, ...}); or put ema.state_dict() there, and pass that to "
    "ema.load_state_dict() after the load"
)

# Modules that ask every rank for a state_dict() and write that of rank 0: what the user has called,
# and what to call instead.
_WRITE_RANK_0 = {
    f"{package}.strategies": (
        "fabric.save()",
        "Leave the average out of what it is given, call ema.save(f'{path}.ema', step=...) after "
        "it, and ema.load(f'{path}.ema') after fabric.load(), on all ranks",
    )
    for package in ("lightning.fabric", "lightning_fabric")
} | {
    "accelerate.checkpointing": (
        "accelerator.register_for_checkpointing(ema)",
        "Use this instead: from sharded_ema.integrations.accelerate import register; "
        "register(accelerator, ema)",
    )
}
