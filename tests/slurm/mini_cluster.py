"""A real SLURM cluster of several nodes on this machine, for tests: own folder, own ports, no systemd.

Every daemon, job step and task has `SLURM_CONF` (the cluster's own) and, on a node, `SLURMD_NODENAME` in its
environment: that is how a node is crashed, and how a guard process ends whatever is left, also when the tests
themselves were killed.

    cluster = MiniCluster(folder); cluster.start()
    job = cluster.sbatch(script); cluster.wait_for(job, "COMPLETED")
    cluster.crash("n1"); cluster.bring_up("n1"); cluster.stop()
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Optional

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scancel", "scontrol", "sinfo", "squeue")
APT_LINE = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
CPUS, GPUS = 8, 8  # of each node, whatever the machine has
COMMAND_SECONDS = 180.0  # for each command; `chiar submit` imports torch

CONFIGURATION = """\
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a job waits until its old credential has expired before it may run again; less than 5 is not taken
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
TmpFS={folder}/tmp/%n
MailProg=/bin/true
# no cgroups, no affinity, no accounting
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
# believe what stands here, not the hardware
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
# failures are noticed soon
JobRequeue=1
ReturnToService=2
SlurmdTimeout=5
SlurmctldTimeout=10
MessageTimeout=5
TCPTimeout=2
KillWait=20
OverTimeLimit=0
UnkillableStepTimeout=60
MinJobAge=3600
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
NodeName=n[0-{last}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first_port}-{last_port}] CPUs={cpus} \
RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN
# a job of `urgent` takes nodes from one of `batch`, which is queued again
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9
"""


def missing_for_slurm() -> Optional[str]:
    """Why no cluster can be brought up here; None if it can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"SLURM is not installed ({', '.join(absent)} missing): {APT_LINE}"
    if os.geteuid() != 0:
        return "a cluster on one machine needs root, for a mount namespace in which node names resolve"
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0:
        return "this container forbids mount namespaces, in which node names would resolve"
    return None


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class MiniCluster:
    """Nodes n0, n1, … of one cluster, with a partition `batch` and one, `urgent`, that preempts it."""

    def __init__(self, folder: Path, nodes: int = 4) -> None:
        self.folder = folder
        self.nodes = [f"n{number}" for number in range(nodes)]
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "PATH": _path(),
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._guard: Optional[subprocess.Popen[bytes]] = None

    def start(self) -> None:
        """Bring it up and wait until every node is idle. Raises AssertionError with the logs' ends."""
        self._write_files()
        guard = [sys.executable, "-m", "tests.slurm.mini_cluster", self.environment["SLURM_CONF"]]
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, cwd=REPOSITORY, start_new_session=True)
        files = {
            "key-file": "key",
            "socket": "socket",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        options = [f"--{option}={self.folder}/munge.{name}" for option, name in files.items()]
        # --force: the temporary folder is root's alone, as are all its users.
        self._launch("munged", ["munged", "--foreground", "--force", *options])
        self._wait(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._launch("slurmctld", ["slurmctld", "-D"])
        for node in self.nodes:
            self.bring_up(node)
        self._wait(lambda: self.idle() == len(self.nodes), "nodes are not idle")

    def stop(self) -> None:
        """End everything that belongs to it."""
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()
            self._guard.wait()
        for process in self._daemons.values():
            process.wait()

    def bring_up(self, node: str) -> None:
        """Start a node, or bring it back."""
        self._launch(node, ["slurmd", "-D", "-N", node], {"SLURMD_NODENAME": node})

    def crash(self, node: str, noticed: bool = True) -> None:
        """Kill -9 all that runs on a node. noticed: tell the controller, which takes 10 s to find out."""
        kill_all(self.environment["SLURM_CONF"], node)
        self._daemons[node].wait()
        if noticed:
            self.command("scontrol", "update", f"nodename={node}", "state=down", "reason=crash")

    def partition(self, node: str) -> None:
        """Cut a node off: the controller believes it dead, while its tasks run on. `heal` ends that."""
        self._signal_daemons(node, signal.SIGSTOP)

    def heal(self, node: str) -> None:
        """End a partition."""
        self._signal_daemons(node, signal.SIGCONT)

    def command(self, *words: object, check: bool = True, cwd: Optional[Path] = None) -> str:
        """What a SLURM command, or any that talks to the cluster, prints."""
        command = [str(word) for word in words]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=COMMAND_SECONDS, cwd=cwd
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def sbatch(self, *options: object, cwd: Optional[Path] = None) -> str:
        """Submit; the job's id."""
        return self.command("sbatch", "--parsable", *options, cwd=cwd)

    def job(self, job: str) -> dict[str, str]:
        """What scontrol says of a job; of an array task with `"<job>_<task>"`."""
        shown = self.command("scontrol", "show", "job", "-o", job)
        return dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", shown))

    def wait_for(self, job: str, *states: str, seconds: float = 120.0) -> dict[str, str]:
        """Wait until a job is in one of these states; fails when the time is up, or it is in another end."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY"}
        deadline = time.monotonic() + seconds
        while True:
            facts = self.job(job)
            if facts["JobState"] in states:
                return facts
            over = facts["JobState"] in ends and facts.get("Requeue") == "0"
            assert not over and time.monotonic() < deadline, f"job {job} is not {states}: {facts}"
            time.sleep(0.1)

    def idle(self) -> int:
        """Nodes that are free."""
        return self.command("sinfo", "-hN", "-p", "batch", "-o", "%T", check=False).split().count("idle")

    def wait_until_idle(self, seconds: float = 60.0) -> None:
        """Wait until every node is free, reviving those that were set down; jobs must have ended."""
        down = self.command("sinfo", "-h", "-N", "-p", "batch", "-t", "down,drain", "-o", "%N").split()
        for node in down:
            self.command("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        self._wait(lambda: self.idle() == len(self.nodes), "nodes are not idle", seconds)

    def _write_files(self) -> None:
        for name in ("state", *(f"{kind}/{node}" for node in self.nodes for kind in ("spool", "tmp"))):
            (self.folder / name).mkdir(parents=True)
        host = socket.gethostname().partition(".")[0]
        port = _free_ports(len(self.nodes) + 1)
        content = CONFIGURATION.format(
            host=host,
            folder=self.folder,
            port=port,
            first_port=port + 1,
            last_port=port + len(self.nodes),
            last=len(self.nodes) - 1,
            cpus=CPUS,
            gpus=GPUS,
        )
        (self.folder / "slurm.conf").write_text(content)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # asks for no mounted tree
        for number in range(GPUS):
            (self.folder / f"gpu{number}").touch()
        gres = f"NodeName=n[0-{len(self.nodes) - 1}] Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n"
        (self.folder / "gres.conf").write_text(gres)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        names = "".join(f"127.0.0.1 {node}\n" for node in self.nodes)
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + names)

    def _launch(self, name: str, command: Sequence[str], extra: Optional[Mapping[str, str]] = None) -> None:
        """Start a daemon where the nodes' names resolve."""
        hosts = str(self.folder / "hosts")
        inside = ["sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', hosts, *command]
        with (self.folder / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                ["unshare", "-m", "--propagation", "private", *inside],
                env={**self.environment, **(extra or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _signal_daemons(self, node: str, number: int) -> None:
        for process in processes_of(self.environment["SLURM_CONF"], node):
            with suppress(psutil.Error):
                if process.name().startswith(("slurm", "srun")):
                    process.send_signal(number)

    def _wait(self, condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [name for name, daemon in self._daemons.items() if daemon.poll() not in (None, -9)]
            if time.monotonic() > deadline or ended:
                what = f"{what}; {', '.join(ended)} ended" if ended else what
                logs = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
                ends = "\n".join(f"--- {log.name}\n{log.read_text()[-1500:]}" for log in logs)
                raise AssertionError(f"mini cluster: {what} after {seconds:g} s\n{ends}")
            time.sleep(0.05)


def processes_of(conf: str, node: Optional[str] = None) -> Iterator[psutil.Process]:
    """Processes of the cluster with this slurm.conf; of one node alone if it is given."""
    wanted = {f"SLURM_CONF={conf}".encode(), *([f"SLURMD_NODENAME={node}".encode()] if node else [])}
    for process in psutil.process_iter():
        with suppress(OSError):
            # psutil would stop at the first gap, and slurmstepd writes its title over the first variables.
            if wanted <= set(Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")):
                yield process


def kill_all(conf: str, node: Optional[str] = None) -> None:
    """Kill -9 the daemons and tasks of a cluster or node; whoever calls is spared.

    All are frozen first, daemons before scripts and tasks: nobody sees another die and says goodbye.
    """
    spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}

    def living() -> list[psutil.Process]:
        found = [p for p in processes_of(conf, node) if p.pid not in spared and alive(p)]
        return sorted(found, key=_rank_in_a_crash)

    frozen: set[int] = set()
    while found := living():
        for process in (p for p in found if p.pid not in frozen):
            with suppress(psutil.Error):
                process.suspend()
        if {p.pid for p in found} <= frozen:  # none was started meanwhile
            for process in found:
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(found, timeout=1.0)
        frozen |= {p.pid for p in found}


def _rank_in_a_crash(process: psutil.Process) -> int:
    """Daemons first, then batch scripts, then tasks."""
    with suppress(psutil.Error):
        name = process.name()
        return 1 if name.startswith("slurm_script") else 0 if name.startswith("slurm") else 2
    return 2


def alive(process: psutil.Process) -> bool:
    """Whether it runs; one that waits for its parent to take note of its end does not."""
    with suppress(psutil.Error):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def _free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens at."""
    for _ in range(200):
        first = random.randrange(10000, 12000)  # below those of outgoing connections
        with suppress(OSError):
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
    raise AssertionError("no free ports")


def main(conf: str) -> None:
    """The guard: wait until whoever brought the cluster up closes the pipe, or is gone; then end it."""
    sys.stdin.buffer.read()
    kill_all(conf)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    main(sys.argv[1])
