"""A real Slurm cluster on this machine for as long as a test needs it: own key, own configuration, own state.

Plain, its nodes share this machine's network and processes. With namespaces (root, Linux) each has its own network
(real traffic over virtual Ethernet), processes and host name, so that a node can lose power or its cable; and where the
cgroup freezer can be used tasks are tracked with it as on real clusters: a signal then reaches only what srun started.
(The freezer is one for the whole machine, so that only one such cluster can run at a time.)
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.slurm import network
from tests.slurm.network import PATH, Network

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
FREEZER = Path("/sys/fs/cgroup/freezer")
CPUS = 4

# The intervals are short so that a lost node is noticed within seconds; a requeued job waits for cred_expire.
CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}({controller})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge/munge.sock,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/{tracking}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=25
MessageTimeout=20
TCPTimeout=2
KillWait=5
UnkillableStepTimeout=10
MinJobAge=600
CompleteWait=0
StateSaveLocation={root}/state
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdSpoolDir={root}/spool/%n
SlurmdPidFile={root}/run/{pid_file}
SlurmdLogFile={root}/log/slurmd.%n.log
SlurmdParameters=config_overrides
CommunicationParameters={binding}
{gpus}{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


def missing(*, namespaces: bool = False) -> str | None:
    """Say why there can be no cluster here, or return None."""
    for program in PROGRAMS:
        if shutil.which(program, path=PATH) is None:
            return f"Slurm is not installed: there is no {program} (apt-get install slurm-wlm munge)"
    return network.missing() if namespaces else None


def can_freeze() -> bool:
    """Whether tasks can be tracked with the cgroup freezer."""
    probe = FREEZER / f"probe-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return False
    return os.geteuid() == 0


class Cluster:
    """`nodes` nodes, node1 the first, with `gpus` GPUs each that Slurm alone knows of.

    To be used as a context: when it ends, all is stopped and removed.
    """

    def __init__(self, root: Path, nodes: int, *, namespaces: bool = False, gpus: int = 0) -> None:
        self.root, self.gpus = root, gpus
        self.names = [f"node{number}" for number in range(1, nodes + 1)]
        self.tracking = "cgroup" if namespaces and can_freeze() else "linuxproc"
        self.network = Network(self.names) if namespaces else None
        self.variables = {**os.environ, "PATH": PATH, "SLURM_CONF": str(root / "slurm.conf")}
        for name in [name for name in self.variables if name.startswith(("SLURM_", "SBATCH_"))]:
            if name != "SLURM_CONF":
                del self.variables[name]
        self.machines: dict[str, subprocess.Popen[bytes]] = {}
        self.munged: subprocess.Popen[bytes] | None = None
        self.controller: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Cluster:
        for name in ("run", "log", "state", "spool", "munge"):
            (self.root / name).mkdir(parents=True)
        try:
            self._configure()
            self._start_munge()
            if self.network is not None:
                self.network.__enter__()
            self._start_controller()
            for name in self.names:
                self.boot(name)
            self.until(lambda: self.call("sinfo", "-hNp", "low", "-t", "idle").count("node") == len(self.names), 30)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            self.call("scancel", "--full", "-s", "KILL", "--user", str(os.geteuid()))
            self.call("scancel", "--user", str(os.geteuid()))
            self.until(lambda: not self.call("squeue", "-h"), 15)
        for name in list(self.machines):
            self.cut_power(name)
        for process in (self.controller, self.munged):
            if process is not None:
                process.kill()
                process.wait()
        if self.network is not None:
            self.network.__exit__()
        for folder in FREEZER.glob("slurm_node*") if self.tracking == "cgroup" else ():
            for inner in sorted(folder.rglob("*"), reverse=True):
                if inner.is_dir():
                    with contextlib.suppress(OSError):
                        inner.rmdir()
            with contextlib.suppress(OSError):
                folder.rmdir()

    def call(self, *command: str, check: bool = True, timeout: float = 60) -> str:
        """Run a command as a user of the cluster would; return what it prints."""
        done = subprocess.run(command, env=self.variables, text=True, capture_output=True, timeout=timeout)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def until(self, true: Callable[[], bool], seconds: float) -> None:
        """Wait until something is true."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"still not after {seconds} s; {self.call('squeue', check=False)}"
            time.sleep(0.2)

    def state(self, job: str) -> str:
        """Return the state of a job, such as RUNNING."""
        match = re.search(r"JobState=(\S+)", self.call("scontrol", "show", "job", job))
        assert match is not None
        return match[1]

    def boot(self, name: str) -> None:
        """Start a node; one that was lost only after the controller has noticed, or its job would never be requeued."""
        spool = self.root / "spool" / name
        shutil.rmtree(spool, ignore_errors=True)
        spool.mkdir()
        command = ["slurmd", "-D", "-N", name]
        if self.network is not None:
            inside = 'hostname "$0"; mount --bind "$1" /etc/hosts; exec slurmd -D -N "$0"'
            command = [
                "nsenter",
                f"--net=/run/netns/{self.network.space(name)}",
                "unshare",
                "--uts",
                "--mount",
                "--pid",
                "--fork",
            ]
            command += ["--kill-child=KILL", "--mount-proc", "bash", "-c", inside, name, str(self.root / "hosts")]
        self.machines[name] = self._start(command, f"boot.{name}.log")

    def cut_power(self, name: str) -> None:
        """End a node and everything that runs on it, at once."""
        machine = self.machines.pop(name)
        found = set(_below(machine.pid))
        listening = subprocess.run(["ss", "-xlpH"], env=self.variables, text=True, capture_output=True).stdout
        for line in listening.splitlines():  # slurmd's step daemons leave its tree, but their sockets lie in its spool
            if f" {self.root}/spool/{name}/" in line:
                for number in re.findall(r"pid=(\d+)", line):
                    found |= set(_below(int(number)))
        for number in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        machine.wait()

    def set_cable(self, name: str, state: str) -> None:
        """Cut a node off from the network ("down"), or connect it again ("up")."""
        assert self.network is not None
        self.network.set_cable(name, state)

    def down(self, name: str) -> bool:
        """Whether the controller has noticed that a node is lost."""
        match = re.search(r"State=(\S+)", self.call("scontrol", "show", "node", name))
        return match is not None and "DOWN" in match[1]  # sinfo shows such a node as completing for a while

    def _start(self, command: list[str], log: str) -> subprocess.Popen[bytes]:
        with (self.root / "log" / log).open("ab") as stream:
            return subprocess.Popen(
                command, env=self.variables, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
                start_new_session=True,
            )  # fmt: skip

    def _configure(self) -> None:
        ports = _free_ports(len(self.names) + 1)
        host = socket.gethostname().partition(".")[0]
        gpus = f"Gres=gpu:{self.gpus} " if self.gpus else ""
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr={self._address(number)} Port={ports[number]} CPUs={CPUS} "
            f"RealMemory=4000 {gpus}State=UNKNOWN"
            for number, name in enumerate(self.names, 1)
        ]
        text = CONFIGURATION.format(
            host=host,
            controller=self._address(254),
            port=ports[0],
            user=self.call("id", "-un"),
            root=self.root,
            tracking=self.tracking,
            # in a namespace of its own slurmd writes a process id that is another one's outside
            pid_file="inside.%n.pid",
            binding="NoCtldInAddrAny" if self.network is not None else "NoInAddrAny,NoCtldInAddrAny",
            nodes="\n".join(nodes),
            gpus="GresTypes=gpu\n" if self.gpus else "",
        )
        for number in range(self.gpus):  # Slurm wants a file of each
            (self.root / f"gpu{number}").symlink_to("/dev/null")
        if self.gpus:
            (self.root / "gres.conf").write_text(f"Name=gpu File={self.root}/gpu[0-{self.gpus - 1}]\n")
        (self.root / "slurm.conf").write_text(text)
        (self.root / "cgroup.conf").write_text("CgroupAutomount=no\nConstrainDevices=no\n")
        names = [f"{self._address(number)} {name}" for number, name in enumerate(self.names, 1)]
        (self.root / "hosts").write_text("\n".join(["127.0.0.1 localhost", f"{self._address(254)} {host}", *names, ""]))

    def _address(self, number: int) -> str:
        return self.network.address(number) if self.network is not None else "127.0.0.1"

    def _start_munge(self) -> None:
        munge = self.root / "munge"
        munge.chmod(0o711)
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o600)
        files = {"key-file": "key", "socket": "munge.sock", "pid-file": "pid", "seed-file": "seed"}
        options = [f"--{name}={munge / file}" for name, file in files.items()]
        self.munged = self._start(["munged", "--foreground", "--force", "--num-threads=2", *options], "munged.log")
        self.until((munge / "munge.sock").exists, 10)

    def _start_controller(self) -> None:
        command = ["slurmctld", "-D", "-c"]
        if self.network is not None:  # it binds to what this machine's name resolves to: that must be on the bridge
            inside = 'mount --bind "$0" /etc/hosts; exec slurmctld -D -c'
            command = ["unshare", "--mount", "bash", "-c", inside, str(self.root / "hosts")]
        self.controller = self._start(command, "controller.log")
        self.until(lambda: "UP" in self.call("scontrol", "ping", check=False), 20)


def _below(process: int) -> Iterator[int]:
    """Yield a process and all that it has started, directly or not."""
    yield process
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text().split():
                yield from _below(int(child))


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]
