"""Run a program that is killed at a step: python killed.py STEP PROGRAM [ARGUMENT ...]."""

from __future__ import annotations

import os
import runpy
import signal
import sys

from torch.optim.optimizer import register_optimizer_step_pre_hook


def main() -> None:
    at, program, *arguments = sys.argv[1:]
    taken = 0

    def count(*_: object) -> None:
        nonlocal taken
        taken += 1
        if taken == int(at):
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_pre_hook(count)
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
