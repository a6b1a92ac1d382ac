"""Two machines on this one: each has a network, a host name, processes and mounts of its own.

They are Linux namespaces, joined by a virtual cable; names resolve by a hosts file of their own,
and a process id means nothing on the other machine. Killing a machine kills all of its processes
at once. Not imitated: caches of a network file system, two clocks, a cable that is pulled.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.launch.programs import ROOT, environment

PROGRAM = Path(__file__).with_name("program.py")
PORT = 29400
# Of its own user namespace everybody is root; a machine is then made within it.
OUTER = ("unshare", "--map-root-user", "--net")
MACHINE = ("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")  # also where nobody comes to clean up
# A life of the namespaces' first process: it ends when this one does, which closes its input.
WAIT = ("sh", "-c", "echo ready; exec cat")


def why_not() -> str | None:
    """Why no machines can be made here; None if they can."""
    missing = [
        tool for tool in ("unshare", "nsenter", "setpriv", "ip") if shutil.which(tool) is None
    ]
    if missing:
        return f"two machines need {' and '.join(missing)}, of util-linux and iproute2"
    done = subprocess.run(
        [*OUTER, *MACHINE, "sh", "-ec", "hostname there; mount --bind /etc/hosts /etc/hosts"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return f"namespaces are not allowed here: {done.stderr.strip()}"
    return None


class Machine:
    """One of the two, by its number; ``holder`` keeps its network while nothing runs on it."""

    def __init__(self, number: int, holder: int, hosts: Path) -> None:
        self.number = number
        self.address = f"10.99.0.{number + 1}"
        self._holder = holder
        self._hosts = hosts
        self._agent: subprocess.Popen[bytes] | None = None

    def inside(self, *command: str) -> list[str]:
        """A command, in the network of this machine."""
        return ["nsenter", "--target", str(self._holder), "--user", "--net", *command]

    def start(self, job: Job, *flags: str, restarts: int = 3, disk: Path | None = None) -> None:
        """Start torchrun for this machine's one rank.

        Args:
            restarts: of failed workers.
            disk: what is mounted here in the place of the directory that the machines share.
        """
        mounts = [(self._hosts, Path("/etc/hosts"))]
        if disk is not None:
            mounts.append((disk, job.shared))
        prepare = [f"mount --bind '{source}' '{target}'" for source, target in mounts]
        prepare = [f"hostname machine{self.number}", *prepare, 'exec "$@"']
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
            *("--nproc-per-node", "1", "--max-restarts", str(restarts), "--rdzv-backend", "c10d"),
            *("--rdzv-endpoint", f"10.99.0.1:{PORT}", "--rdzv-id", job.name),
            # A machine that does not answer is given up after three seconds, not fifteen.
            *("--rdzv-conf", "join_timeout=120,keep_alive_interval=1"),
            *(str(PROGRAM), str(job.shared), str(job.notes), *flags),
        ]
        settings = {
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "GLOO_SOCKET_IFNAME": "eth0",
            "MACHINE": str(self.number),
        }
        with job.log(self.number).open("ab") as log:
            self._agent = subprocess.Popen(
                [
                    *DIES_WITH_US,
                    *self.inside(*MACHINE),
                    "sh",
                    "-ec",
                    "; ".join(prepare),
                    "sh",
                    *command,
                ],
                env=environment(settings),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def kill(self) -> None:
        """All processes are gone, at once."""
        if self._agent is not None:
            self._agent.kill()
            self._agent.wait()
            self._agent = None

    def wait(self, timeout: float) -> int:
        """The exit code of torchrun."""
        assert self._agent is not None
        return self._agent.wait(timeout)

    def ends_within(self, seconds: float) -> bool:
        """Whether torchrun ends in this time, which is waited for."""
        try:
            self.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True


class Job:
    """A training on both machines: the directory they share, and what they note and say."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.shared = folder / name / "shared"
        self.notes = folder / name / "notes"
        for path in (self.shared, self.notes):
            path.mkdir(parents=True)

    def log(self, number: int) -> Path:
        return self.notes / f"machine{number}.log"

    def said(self) -> str:
        """What both machines said last, for a test that fails."""
        texts = (self.log(number).read_text(errors="replace")[-3000:] for number in (0, 1))
        return "\n-----\n".join(texts)

    def begun(self) -> list[list[int]]:
        """By machine, the steps from which its lives have gone on."""
        found = [self.notes / f"begun{number}" for number in (0, 1)]
        return [list(map(int, path.read_text().split())) for path in found]


@contextmanager
def two_machines(folder: Path) -> Iterator[Sequence[Machine]]:
    """Both machines, with nothing running on them; at the end nothing of them is left."""
    hosts = folder / "hosts"
    hosts.write_text("127.0.0.1 localhost\n10.99.0.1 machine0\n10.99.0.2 machine1\n")
    kept: list[subprocess.Popen[bytes]] = []
    machines: list[Machine] = []

    def hold(*command: str) -> int:
        process = subprocess.Popen([*command, *WAIT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        kept.append(process)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        return process.pid

    try:
        enter = ("nsenter", "--target", str(hold(*OUTER)), "--user", "--net")
        pids = [hold(*enter, "unshare", "--net") for _ in range(2)]
        ends = ["eth0", "netns", str(pids[0]), "type", "veth", "peer", "name", "eth0"]
        subprocess.run([*enter, "ip", "link", "add", *ends, "netns", str(pids[1])], check=True)
        machines += [Machine(number, pid, hosts) for number, pid in enumerate(pids)]
        for machine in machines:
            address = ["addr", "add", f"{machine.address}/24", "dev", "eth0"]
            for words in (address, ["link", "set", "lo", "up"], ["link", "set", "eth0", "up"]):
                subprocess.run(machine.inside("ip", *words), check=True)
        yield machines
    finally:
        for machine in machines:
            machine.kill()
        for process in kept:
            process.kill()
            process.communicate()


def poll(path: Path, job: Job, machines: Sequence[Machine]) -> None:
    """Until a file is there; the test fails if the machines end before."""
    while not path.exists():
        for machine in machines:
            if machine.ends_within(0.05):
                raise AssertionError(f"machine {machine.number} ended early\n{job.said()}")
