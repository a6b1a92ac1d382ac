"""Which tensors of a model stay in fp32 while the others become narrower.

Its files show it, if they hold both. Otherwise transformers may know it of the architecture: its
source is read, not imported, as that would take seconds and PyTorch.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sharded_ema.tools.huggingface import Model, read_config

_NARROW = {"F16", "BF16"}
_WIDE = {"F32", "F64"}
# The first one counts for float16 alone when transformers loads a model. In a file it counts for
# both: a loader that wants less rounds to the same bits.
_FIELDS = {"_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"}


def kept_wide(model: Model | None, names: Iterable[str]) -> Collection[str]:
    """Those of the names that stay in fp32.

    Args:
        model: to be like; ``None`` if there is none.
    """
    if model is None:
        return frozenset()
    dtypes = {name: dtype for name, (_, dtype) in (model.tensors or {}).items()}
    if _NARROW & set(dtypes.values()):
        return {name for name, dtype in dtypes.items() if dtype in _WIDE}
    modules = sorted(_modules_of(read_config(model.path)))
    if not modules:
        return frozenset()
    patterns = (re.escape(module).replace(r"\*", ".*") for module in modules)
    within = re.compile(rf"(^|\.)({'|'.join(patterns)})(\.|$)")
    return {name for name in names if within.search(name)}


def _modules_of(config: Mapping[str, Any]) -> set[str]:
    """Names of modules and parameters that transformers keeps, of a model and of its parts."""
    found: set[str] = set()
    model_type = config.get("model_type")
    if isinstance(model_type, str):
        for source in _sources(model_type):
            found |= _read_fields(source)
    for part in config.values():
        if isinstance(part, dict):
            found |= _modules_of(part)
    return found


def _sources(model_type: str) -> Iterator[Path]:
    """The files of transformers in which the classes of a kind of model are."""
    spec = find_spec("transformers")
    name = model_type.replace("-", "_")
    if spec is None or spec.origin is None or not name.isidentifier():
        return
    models = Path(spec.origin).parent / "models"
    # A part of a model, such as "x_text", is defined beside the whole.
    while name and not (models / name).is_dir():
        name = name.rpartition("_")[0]
    if name:
        yield from sorted((models / name).glob("modeling_*.py"))


def _read_fields(source: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        else:
            continue
        if node.value is not None and any(getattr(t, "id", "") in _FIELDS for t in targets):
            with suppress(ValueError):  # what is computed there is not known here
                found |= set(ast.literal_eval(node.value) or ())
    return found
