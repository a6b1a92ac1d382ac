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
from pathlib import Path

from sharded_ema.checkpoint import durable
from sharded_ema.checkpoint.location import as_path
from sharded_ema.checkpoint.reading.opened import Catalog
from sharded_ema.checkpoint.reading.rank_shards import FORMAT as RANK_SHARDS
from sharded_ema.config import DEFAULT_PROFILE
from sharded_ema.errors import (
    CheckpointMismatchError,
    CheckpointWriteError,
    ConfigError,
    EMAError,
)
from sharded_ema.tools.contents import Average, find_tensors
from sharded_ema.tools.huggingface import (
    ADAPTER_STEM,
    INDEX,
    copy_description,
    index_bytes,
    open_model,
    read_model,
)
from sharded_ema.tools.naming import Renaming
from sharded_ema.tools.plan import Wanted, digest_plan, parse_size, plan_files, plan_outputs
from sharded_ema.tools.report import Report
from sharded_ema.tools.source import open_source
from sharded_ema.tools.tally import Tally
from sharded_ema.tools.workplace import Workplace, check_space, check_target
from sharded_ema.tools.write import Files, verify_rest, write_files

FORMATS = ("safetensors", "torch", "dcp")


def consolidate(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    profile: str = DEFAULT_PROFILE,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    prefix: str | None = None,
    like: str | os.PathLike[str] | None = None,
    jobs: int = 1,
    tied: str = "drop",
    adapter: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rename: Sequence[str] = (),
    base: str | os.PathLike[str] | None = None,
    format: str = "safetensors",
    plan: bool = False,
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
            nearest even; ``None`` keeps what is stored.
        max_shard_size: bytes per output file, such as ``"5GB"``; a larger tensor gets its own.
        prefix: key prefix of the average if the checkpoint holds several. If no average of this
            library lies under it, all tensors there are written as they are; ``""`` means all.
        like: a Hugging Face directory. Its configuration and tokenizer files are copied; if it has
            safetensors weights, names and shapes must be theirs. The directory of a PEFT adapter
            makes the output one: ``adapter_model.safetensors``, with PEFT's names.
        jobs: output files written at a time.
        tied: ``"drop"`` writes tied weights under one name, ``"emit"`` under all their names.
        adapter: write the PEFT adapter of this name; needed if the model had several.
        include, exclude: shell patterns of output names; ``*`` also stands for dots. Each must fit
            a name.
        rename: substitutions ``s/PATTERN/REPLACEMENT/``, or with ``g`` at the end, of :mod:`re`,
            one after the other. Each must change a name, and no two may become equal. ``like``,
            ``base``, ``include`` and ``exclude`` see the new names.
        base: a Hugging Face directory or a safetensors file, from which comes what the checkpoint
            does not store (``frozen="skip"``, ``exclude``). It must have all of that, and equal
            shapes where both have a tensor.
        format: ``"safetensors"``; ``"torch"``, one ``pytorch_model.bin``; or ``"dcp"``, a
            checkpoint of torch.distributed.checkpoint. The last two import PyTorch and are made
            from the first one, so they need the disk twice.
        plan: write nothing, only report what would be written.
        progress: show a progress bar on standard error.

    Returns:
        A report. If ``ok`` is false a check failed and nothing was published.

    Raises:
        CheckpointError: the source cannot be read, is corrupt or lacks the profile; the target
            exists or cannot be written. Nothing is left at ``dst``.
        ConfigError: an argument is out of range.
    """
    started = time.monotonic()
    if jobs < 1:
        raise ConfigError(f"jobs must be at least 1, got {jobs}")
    if format not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    limit = parse_size(max_shard_size)
    catalog = open_source(src)
    average = find_tensors(catalog, profile, prefix)
    target = as_path(dst, "dst")
    check_target(target, catalog.path)
    wanted = Wanted(
        dtype=dtype,
        tied=tied,
        adapter=adapter,
        rename=Renaming(rename),
        include=include,
        exclude=exclude,
        base=open_model(as_path(base, "base")) if base is not None else None,
        model=read_model(as_path(like, "like")) if like is not None else None,
    )
    _check_shapes_known(catalog, wanted)
    report = Report("consolidate", str(src))
    if not average.meta and catalog.index is not None:
        left = sum(key.startswith(average.prefix) for key in catalog.index.values)
        if left:
            report.notes.append(f"{left} values that are no tensors are left out, unread")
    outputs = plan_outputs(catalog, average, wanted, report)
    total = sum(output.num_bytes for output in outputs)
    if wanted.is_adapter:  # PEFT reads one file
        files = plan_files(outputs, total, ADAPTER_STEM)
    else:
        files = plan_files(outputs, limit)
    report.facts |= {
        "output": str(target),
        "format": format,
        **average.facts(),
        "tensors": len(outputs),
        "bytes": total,
        "files": len(files) if format == "safetensors" else 1,
        "metadata": "verified" if catalog.verified_metadata else "unverified",
    }
    if plan:
        report.facts["plan"] = {
            name: f"{len(group)} tensors, {sum(o.num_bytes for o in group):,} bytes"
            for name, group in files
        }
    if report.ok and not plan:
        try:
            _write(catalog, average, files, target, wanted, report, format, jobs, progress)
        except EMAError:
            raise
        except OSError as error:
            raise CheckpointWriteError(
                f"{src} could not be written to {target}: {error}"
            ) from error
    report.facts["seconds"] = round(time.monotonic() - started, 3)
    return report


def _check_shapes_known(catalog: Catalog, wanted: Wanted) -> None:
    if catalog.format == RANK_SHARDS and wanted.shapes is None:
        raise CheckpointMismatchError(
            f"{catalog.path} holds shards without metadata, which do not say how large the tensors "
            "are, so that a missing shard would not be noticed; pass a directory of the model with "
            "safetensors weights as like (--like)"
        )
    if wanted.is_adapter and wanted.base is not None:
        raise ConfigError("an adapter takes nothing from a base model; leave base (--base) out")


def _write(
    catalog: Catalog,
    average: Average,
    files: Files,
    target: Path,
    wanted: Wanted,
    report: Report,
    format: str,
    jobs: int,
    progress: bool,
) -> None:
    """Write the planned files, those of PyTorch out of them if wanted, and publish."""
    header = {"format": "pt", **average.header()}
    header["source"] = catalog.manifest.uuid if catalog.manifest else "unknown"
    if wanted.base is not None:
        header["base"] = wanted.base.path.name
    with Workplace(target, digest_plan(files, header, format)) as place:
        finished = [line.bytes for line in place.finished.values()]
        total = sum(output.num_bytes for _, group in files for output in group)
        needed = total if format == "safetensors" else 2 * total
        check_space(target, needed - sum(finished))
        verify_rest(catalog, average)
        write_files(files, place, header, jobs=jobs, progress=progress)
        if format != "safetensors":
            _convert([place.model / name for name, _ in files], place.model, format)
        elif len(files) > 1:
            durable.write_durably(place.model / INDEX, index_bytes(files))
        copied = copy_description(wanted.model, place.model) if wanted.model is not None else []
        place.publish()
    tally = Tally()
    for line in place.finished.values():
        tally.add(Tally(line.unchecked, line.overflowed))
    report.notes += tally.notes()
    report.facts |= {"copied": len(copied), "taken_over": len(finished)}


def _convert(written: Sequence[Path], folder: Path, format: str) -> None:
    """Replace safetensors files by those of PyTorch."""
    from sharded_ema.checkpoint.writing.torch_files import write_dcp, write_torch  # imports PyTorch

    if format == "dcp":
        write_dcp(written, folder)
    else:
        is_adapter = written[0].name.startswith(ADAPTER_STEM)
        write_torch(written, folder / f"{ADAPTER_STEM if is_adapter else 'pytorch_model'}.bin")
    for path in written:
        path.unlink()
