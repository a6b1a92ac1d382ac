"""``python -m sharded_ema``."""

import sys

from sharded_ema.cli import run

sys.exit(run())
