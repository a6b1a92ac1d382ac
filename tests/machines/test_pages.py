"""What docs/machines.md has for schedulers, as far as it can be tried without one."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "machines.md"
# srun starts every task with what SLURM sets for it; the training says what it was started with.
STAND_INS = {
    "srun": """for task in 0 1 2 3; do
  SLURM_PROCID=$task SLURM_NTASKS=4 SLURM_LOCALID=$((task % 2)) SLURM_NTASKS_PER_NODE=2 \
    "${@:2}" || exit
done""",
    "scontrol": """if [ $1 = show ]; then printf '%s\\n' one two; else echo "$@" >> "$LOG"; fi""",
    "python": """echo $RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR >> "$LOG"
mkdir -p "$OUT"; if [ "$MARK" ]; then touch "$OUT/preempted"; fi; exit $CODE""",
}


def block(kind: str, containing: str) -> str:
    """The one block of code of the page with some text in it."""
    blocks = re.findall(rf"^```{kind}\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    (found,) = [text for text in blocks if containing in text]
    return found


@pytest.mark.parametrize(
    ("mark", "code", "restarts", "back"),
    [("", 0, 0, False), ("1", 0, 0, True), ("", 1, 3, True), ("", 1, 20, False)],
    ids=["at its end", "told to stop", "a machine lost", "failed too often"],
)
def test_slurm_script_goes_back_into_the_queue(
    tmp_path: Path, mark: str, code: int, restarts: int, back: bool
) -> None:
    for name, text in STAND_INS.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/bash\n{text}\n")
        program.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SHARED": str(tmp_path / "shared"),
        "LOG": str(tmp_path / "log"),
        "MARK": mark,
        "CODE": str(code),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NAME": "ema",
        "SLURM_JOB_NODELIST": "one,two",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    script = block("sh", "#SBATCH")
    subprocess.run(["bash", "-c", script], env=environment, check=False)
    lines = (tmp_path / "log").read_text().splitlines()
    tasks = lines[:-1] if back else lines
    expected = [f"{rank} 4 {rank % 2} 2 one" for rank in range(4)]
    assert tasks == expected[: len(tasks)] and len(tasks) == (1 if code else 4)
    assert lines[len(tasks) :] == (["requeue 77"] if back else [])


def test_manifest_can_be_read() -> None:
    yaml = pytest.importorskip("yaml", reason="comes with transformers")
    manifest = yaml.safe_load(block("yaml", "PyTorchJob"))
    (worker,) = manifest["spec"]["pytorchReplicaSpecs"].values()
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    # torchrun must have killed its workers before the pod is killed.
    assert int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
