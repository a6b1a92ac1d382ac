"""The command: exit codes, one-line errors, no PyTorch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from argparse import _SubParsersAction
from dataclasses import replace
from inspect import Parameter, signature
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sharded_ema.cli import COMMANDS, build_parser, main
from sharded_ema.version import __version__
from tests.helpers.checkpoints import flip, make, meta


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path / "c", {"ema.layer.w": np.zeros((3, 4), "f4")})
    assert main(["inspect", str(path), "--tensors"]) == 0
    assert "ema.layer.w" in capsys.readouterr().out
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_consolidate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path / "c", {"ema.w": np.ones((3, 4), "f4")})
    command = ["consolidate", str(path), str(tmp_path / "out"), "--dtype", "float16", "--json"]
    assert main([*command, "--no-progress"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].dtype == np.float16


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.startswith("sharded-ema: error: ") and captured.err.count("\n") == 1
    return captured.err


def test_wrong_use_is_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path / "c", {"ema.w": np.ones(3, "f4")})
    out = str(tmp_path / "out")
    for command in (
        ["inspect", str(tmp_path / "nothing")],
        ["consolidate", str(tmp_path / "nothing"), out],
        ["consolidate", str(path), str(path)],
        ["consolidate", str(path), out, "--profile", "other"],
        ["consolidate", str(path), out, "--prefix", "other."],
        ["consolidate", str(path), out, "--max-shard-size", "x"],
        ["consolidate", str(path), out, "--jobs", "0"],
        ["consolidate", str(path), out, "--like", str(tmp_path / "nothing")],
    ):
        assert main([*command, *(["--no-progress"] if command[0] == "consolidate" else [])]) == 2
        error_line(capsys)
    for command in ([], ["dance"], ["inspect"], ["consolidate", str(path), out, "--dtype", "int8"]):
        with pytest.raises(SystemExit) as exit:
            main(command)
        assert exit.value.code == 2


def test_damage_is_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path / "c", {"ema.w": np.ones(3, "f4")})
    flip(path / "shard-00000.safetensors", 4096)
    assert main(["consolidate", str(path), str(tmp_path / "out"), "--no-progress"]) == 1
    line = error_line(capsys)
    assert "ema.w" in line and str(path / "shard-00000.safetensors") in line
    flip(path / "manifest.json", 9)
    assert main(["inspect", str(path)]) == 1
    assert "manifest.json" in error_line(capsys)


def test_a_failed_check_is_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path / "c", {"ema.w": np.ones(3, "f4")}, metas={"": meta()})
    (tmp_path / "like").mkdir()
    save_file({"v": np.ones(3, "f4")}, tmp_path / "like" / "model.safetensors")
    command = ["consolidate", str(path), str(tmp_path / "out"), "--like", str(tmp_path / "like")]
    assert main([*command, "--no-progress"]) == 1
    assert "v" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


COMMAND = [sys.executable, "-m", "sharded_ema"]


def test_whoever_reads_may_leave(tmp_path: Path) -> None:
    path = make(tmp_path / "run" / "c", {"ema.w": np.ones(3, "f4")})
    out = str(tmp_path / "out")
    for arguments in (
        ["inspect", str(path)],
        ["verify", str(path), "--json"],
        ["watch", str(path.parent), "--out", out],
    ):
        reader, writer = os.pipe()
        os.close(reader)
        ended = subprocess.run(
            [*COMMAND, *arguments], stdout=writer, stderr=subprocess.PIPE, check=False, timeout=60
        )
        os.close(writer)
        assert (ended.returncode, ended.stderr) == (0, b"")


def test_a_report_that_cannot_be_written_is_2(tmp_path: Path) -> None:
    path = make(tmp_path / "c", {"ema.w": np.ones(3, "f4")})
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [*COMMAND, "inspect", str(path)], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert ended.returncode == 2
    assert ended.stderr.startswith(b"sharded-ema: error: ") and ended.stderr.count(b"\n") == 1


def test_names_that_the_terminal_cannot_write(tmp_path: Path) -> None:
    path = make(tmp_path / "prüfen", {"ema.w": np.ones(3, "f4")})
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(
        [*COMMAND, "inspect", str(path)], capture_output=True, env=environment, check=True
    )
    assert b"pr\\xfcfen" in ended.stdout and not ended.stderr


def test_closed_streams(tmp_path: Path) -> None:
    path = make(tmp_path / "c", {"ema.w": np.ones(3, "f4")})
    command = [*COMMAND, "consolidate", str(path), str(tmp_path / "out")]
    ended = subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *command], check=False)
    assert ended.returncode == 0 and (tmp_path / "out").is_dir()


INTERRUPTED = """
import os, signal, sys
from sharded_ema.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's & has switched off
write = os.write
def interrupt(descriptor, data):
    if len(data) < 1000:  # who is at work, before there is anything to go on with
        return write(descriptor, data)
    os.write = write  # threads write side by side, and Ctrl-C is pressed once
    os.kill(os.getpid(), signal.SIGINT)
    return write(descriptor, data)
os.write = interrupt
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["consolidate", "average"])
def test_interrupted_is_130(tmp_path: Path, command: str) -> None:
    path, out = make(tmp_path / "c", {"ema.w": np.ones(3, "f4")}), str(tmp_path / "out")
    arguments = [str(path), out] if command == "consolidate" else [str(path), "--out", out]
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, command, *arguments, "--no-progress"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 130 and not ended.stdout
    assert ended.stderr.startswith("sharded-ema: interrupted") and ended.stderr.count("\n") == 1
    left = [entry.name for entry in tmp_path.iterdir() if entry != path]
    # Only a consolidation can be gone on with.
    assert len(left) == ("goes on" in ended.stderr) == (command == "consolidate")


PRESSED_AGAIN = """
import os, signal, sys, threading
from sharded_ema.cli import run
signal.signal(signal.SIGINT, signal.default_int_handler)
write, main_thread = os.write, threading.main_thread()
def never_ends(descriptor, data):
    if threading.current_thread() is main_thread or len(data) < 1000:
        return write(descriptor, data)
    while True:  # as a disk that does not answer
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(0.05)
os.write = never_ends
sys.exit(run())
"""


def test_pressed_again_while_a_thread_still_writes(tmp_path: Path) -> None:
    path, out = make(tmp_path / "c", {"ema.w": np.ones(3000, "f4")}), tmp_path / "out"
    ended = subprocess.run(
        [sys.executable, "-c", PRESSED_AGAIN, "consolidate", path, out, "--no-progress"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 130 and not ended.stdout and not out.exists()
    assert ended.stderr == "sharded-ema: interrupted; the same command goes on where this one was\n"
    assert main(["consolidate", str(path), str(out), "--no-progress"]) == 0


def test_a_host_keeps_its_handler(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    assert main(["inspect", str(tmp_path)]) == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_debug_shows_where_an_error_comes_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tmp_path / "nothing"), "--debug"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("Traceback") and said[-1].startswith("sharded-ema: error: ")


@pytest.mark.parametrize(
    "trouble",
    [ConnectionError("reset by peer"), TimeoutError(), MemoryError(), PermissionError(13)],
)
def test_trouble_of_stores_and_disks_is_one_line(
    tmp_path: Path,
    trouble: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise trouble

    monkeypatch.setitem(COMMANDS, "verify", replace(COMMANDS["verify"], tool=fails))
    assert main(["verify", str(tmp_path)]) == 2
    assert error_line(capsys).strip().removeprefix("sharded-ema: error:").strip()


def python(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_version_and_help() -> None:
    assert __version__ in python("-m", "sharded_ema", "--version")
    assert "consolidate" in python("-m", "sharded_ema", "--help")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It has an example, which can be parsed, and says what the command ends with."""
    build_parser().parse_args([name, *COMMANDS[name].example.split()])
    with pytest.raises(SystemExit):
        main([name, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert f"sharded-ema {name} {COMMANDS[name].example}" in told
    assert "0 all is well 1 a check failed" in told and "2 wrong use" in told


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_says_every_default(name: str) -> None:
    commands = next(a for a in build_parser()._actions if isinstance(a, _SubParsersAction))
    for action in commands.choices[name]._actions:
        if action.option_strings and action.nargs != 0 and not action.required:
            assert "(default: " in str(action.help), action.dest


def test_a_verdict_is_the_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        make(tmp_path / name, {"ema.w": np.full(3, value, "f4")})
    a, b, out, mean = (str(tmp_path / name) for name in ("a", "b", "out", "mean"))
    for command, code, verdict in (
        (["verify", a], 0, "ok: no damage was found"),
        (["diff", a, a], 0, "ok: equal in every bit"),
        (["diff", a, b, "--tolerance", "1"], 0, "ok: equal within 1"),
        (["diff", a, b], 1, "FAILED: a check did not pass"),
        (["consolidate", a, out, "--plan"], 0, "ok: only planned, nothing was written"),
        (["consolidate", a, out, "--no-progress"], 0, f"ok: {out} is whole and on disk"),
        (["average", a, b, "--out", mean, "--no-progress"], 0, f"ok: {mean} is whole and on disk"),
    ):
        assert main(command) == code
        assert capsys.readouterr().out.splitlines()[-1] == verdict


def test_no_torch_is_loaded() -> None:
    script = """
import sys
from argparse import _SubParsersAction
from inspect import Parameter, signature
from sharded_ema import cli
from sharded_ema.tools import consolidate
try:
    cli.main(["--help"])
except SystemExit:
    pass
assert "torch" not in sys.modules and "numpy" in sys.modules
"""
    python("-c", script)


def test_flags_are_the_parameters_of_the_tools() -> None:
    """With the same defaults; each tool is called with all that its command has."""
    commands = next(a for a in build_parser()._actions if isinstance(a, _SubParsersAction))
    for name, parser in commands.choices.items():
        parameters = signature(COMMANDS[name].tool).parameters
        for action in parser._actions:
            if action.dest in ("help", "json", "debug") or not action.option_strings:
                continue
            wanted = parameters[action.dest].default
            if wanted is not Parameter.empty:
                assert action.default == (list(wanted) if wanted == () else wanted), action.dest
