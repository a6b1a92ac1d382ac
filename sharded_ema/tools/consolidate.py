"""``consolidate``: one averaged model out of a sharded checkpoint, streaming, without PyTorch.

Everything is planned from metadata first. Tensors are then assembled through small buffers into
safetensors files in the Hugging Face layout, every chunk's checksum being verified on the way, and
the finished directory is published by one rename: whoever looks finds nothing or a whole model.
A consolidation that was killed goes on with the files that it had finished.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack

from sharded_ema.checkpoint.files import as_path
from sharded_ema.checkpoint.reading.dcp import DcpIndex
from sharded_ema.checkpoint.reading.models import open_model
from sharded_ema.checkpoint.reading.rank_shards import FORMAT as RANK_SHARDS
from sharded_ema.checkpoint.reading.rank_shards import LACKS
from sharded_ema.config import DEFAULT_PROFILE, as_whole
from sharded_ema.errors import CheckpointExistsError, ConfigError, require_torch
from sharded_ema.tools.casting import parse_dtypes
from sharded_ema.tools.contents import find_tensors
from sharded_ema.tools.huggingface import left_out_code, read_like
from sharded_ema.tools.naming import Renaming
from sharded_ema.tools.parts import FORMAT, Part, is_made, write_shared
from sharded_ema.tools.plan import Wanted, group_bytes, parse_size, plan_model
from sharded_ema.tools.report import Report
from sharded_ema.tools.source import open_source
from sharded_ema.tools.workplace import check_target
from sharded_ema.tools.write import Written, as_write_error, copied, write_models

FORMATS = ("safetensors", "torch", "dcp")


def consolidate(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    profile: str = DEFAULT_PROFILE,
    dtype: str | Sequence[str] | None = None,
    max_shard_size: str | int = "5GB",
    prefix: str | None = None,
    like: str | os.PathLike[str] | None = None,
    trust_code: bool = False,
    jobs: int = 1,
    tied: str | None = None,
    adapter: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rename: Sequence[str] = (),
    base: str | os.PathLike[str] | None = None,
    format: str = "safetensors",
    plan: bool = False,
    part: str | None = None,
    progress: bool = True,
) -> Report:
    """Write one average as a model directory that ``from_pretrained`` loads.

    A run that was killed leaves ``<dst>.tmp-<digest>``. The same call goes on from there: files
    that were finished are checked and kept. A call with other arguments for the same ``dst``
    removes it.

    Args:
        src: a committed checkpoint: ours, a DCP one, what ``engine.save_checkpoint`` of DeepSpeed
            wrote with an average in it, or the shards of ``HuggingFaceStorageWriter``.
        dst: directory to create; it must not exist, or be empty.
        profile: which average.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"`` for floating tensors, rounded to
            nearest even; ``None`` keeps what is stored. ``"PATTERN=float32"`` is for those whose
            names fit; a list may have several, of which the last that fits counts. What the model
            of ``like`` keeps in fp32 beside narrower tensors, or transformers does, stays so.
        max_shard_size: bytes per output file, such as ``"5GB"``; a larger tensor gets its own.
        prefix: key prefix of the average if the checkpoint holds several. If no average of this
            library lies under it, all tensors there are written as they are; ``""`` means all.
        like: a Hugging Face directory. What a model needs beside weights is copied from it:
            configuration, tokenizer, processor, chat template, licence, model card, and nothing
            else, nor what a link out of it leads to; ``config.json`` says the dtype that is
            written. If it has weights, names and shapes must be theirs, but for experts that are
            fused in memory and not there; a file of weights says nothing but these. A pipeline of
            diffusers gets the average in place of the component that has its names. The directory
            of a PEFT adapter makes the output one: ``adapter_model.safetensors``, with PEFT's
            names.
        trust_code: copy Python files from ``like`` as well.
        jobs: output files written at a time.
        tied: ``"emit"`` writes tied weights under all their names, as ``load_state_dict`` wants
            them, ``"drop"`` under one. Default ``"emit"``; with ``like`` the names there, and
            ``"drop"`` if it has no weights.
        adapter: write the PEFT adapter of this name; needed if the model had several.
        include, exclude: shell patterns of output names; ``*`` also stands for dots. Each must fit
            a name.
        rename: substitutions ``s/PATTERN/REPLACEMENT/``, or with ``g`` at the end, of :mod:`re`,
            one after the other. Each must change a name, and no two may become equal. ``like``,
            ``base``, ``include`` and ``exclude`` see the new names.
        base: a Hugging Face directory, a safetensors file or a state dict of ``torch.save``
            (``.pt``, ``.bin``), from which comes what the checkpoint does not store
            (``frozen="skip"``, ``exclude``). It must have all of that, and equal shapes where both
            have a tensor.
        format: ``"safetensors"``; ``"torch"``, one ``pytorch_model.bin``, in which names of a tied
            weight share it; or ``"dcp"``, a checkpoint of torch.distributed.checkpoint. The last
            two import PyTorch and are made from the first one, so they need the disk twice.
        plan: write nothing, only report what would be written.
        part: ``"I/N"`` if ``N`` processes on machines that share the directory of ``dst`` do this
            together, each with another ``I`` from 0 on. Each output file is written by one of them,
            so ``max_shard_size`` says how finely the work is shared; every call returns when
            ``dst`` is there, or was there already with the same content.
        progress: show a progress bar on standard error.

    Returns:
        A report. If ``ok`` is false a check failed and nothing was published.

    Raises:
        CheckpointError: the source cannot be read, is corrupt or lacks the profile; the target
            exists or cannot be written. Nothing is left at ``dst``.
        ConfigError: an argument is out of range.
        MissingPackageError: ``format`` needs PyTorch.
    """
    started = time.monotonic()
    jobs = as_whole(jobs, "jobs", least=1)
    if format not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format != "safetensors":
        require_torch(f"format={format!r}")
    share = None if part is None else Part.parse(part)
    if share is not None and format != FORMAT:
        raise ConfigError(f"part goes with format={FORMAT!r} only, got {format!r}")
    limit = parse_size(max_shard_size)
    src, dst = os.fspath(src), os.fspath(dst)
    done = f"{dst} is whole and on disk"
    verdict = "only planned, nothing was written" if plan else done
    report = Report("consolidate", src, verdict=verdict)
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_source(src))
        average = find_tensors(checkpoint, profile, prefix)
        target = as_path(dst, "dst")
        taken = None
        try:
            check_target(target, checkpoint.path)
        except CheckpointExistsError as error:
            if share is None:
                raise
            taken = error  # perhaps by what the other parts have made
        weights = None if base is None else stack.enter_context(open_model(as_path(base, "base")))
        renaming = Renaming(rename)
        shapes = {renaming(name): tensor.shape for name, tensor in average.tensors.items()}
        wanted = Wanted(
            dtypes=parse_dtypes(dtype),
            max_shard_size=limit,
            tied=tied,
            adapter=adapter,
            rename=renaming,
            include=include,
            exclude=exclude,
            base=weights,
            model=read_like(like, shapes, trust_code=trust_code),
            format=format,
        )
        if wanted.is_adapter and wanted.base is not None:
            raise ConfigError("an adapter takes nothing from a base model; leave base (--base) out")
        if checkpoint.format == RANK_SHARDS and wanted.shapes is None:
            report.notes.append(
                f"{checkpoint.path} holds {LACKS}; a directory of the model with weights as like "
                "(--like) shows it"
            )
        if not average.meta and isinstance(checkpoint.index, DcpIndex):
            left = sum(key.startswith(average.prefix) for key in checkpoint.index.values)
            if left:
                report.notes.append(f"{left} values that are no tensors are left out, unread")
        report.notes += average.notes()
        code = left_out_code(wanted.model) if wanted.model is not None else []
        if code:
            report.notes.append(
                f"Python files of the model are left out ({', '.join(code[:5])}"
                f"{', ...' if len(code) > 5 else ''}); trust_code (--trust-code) copies them"
            )
        planned = plan_model(average, wanted, report)
        report.facts |= {
            "output": str(target),
            "format": format,
            **average.facts(),
            "tensors": len(planned.outputs) + len(planned.shared),
            "bytes": planned.num_bytes,
            "files": len(planned.files) if format == "safetensors" else 1,
            "metadata": "verified" if checkpoint.verified_metadata else "unverified",
        }
        if plan:
            report.facts["plan"] = [
                {"file": name, "tensors": len(group), "bytes": group_bytes(group)}
                for name, group in planned.files.items()
            ]
        elif taken is not None:
            if not is_made(planned, target):
                raise taken
        elif report.ok and share is not None:
            with as_write_error(f"{src} could not be written to {target}"):
                written = write_shared(
                    planned,
                    target,
                    copied,
                    inputs=[average],
                    like=wanted.model,
                    jobs=jobs,
                    progress=progress,
                    part=share,
                )
            _tell_written(written, report)
        elif report.ok:
            with as_write_error(f"{src} could not be written to {target}"):
                written = write_models(
                    planned,
                    target,
                    copied,
                    inputs=[average],
                    like=wanted.model,
                    what="consolidate",
                    jobs=jobs,
                    progress=progress,
                    resume=True,
                    format=format,
                )
            _tell_written(written, report)
    report.facts["seconds"] = round(time.monotonic() - started, 3)
    return report


def _tell_written(written: Written, report: Report) -> None:
    report.notes += written.tally.notes()
    report.facts |= {"copied": len(written.copied), "taken_over": written.taken_over}
