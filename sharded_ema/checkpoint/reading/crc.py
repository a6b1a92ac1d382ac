"""CRC32, as the zip archives of PyTorch have it, by the fastest that is installed."""

from __future__ import annotations

try:
    # By the processor's own instructions; zlib of most systems goes without.
    from isal.isal_zlib import crc32  # type: ignore[import-not-found]
except ImportError:
    from zlib import crc32

__all__ = ["crc32"]
