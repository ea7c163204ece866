"""A real Slurm cluster on this machine: daemons of Debian's packages, any number of virtual nodes, no systemd.

Every node has its own host name, /etc/hosts and one private directory (``private``); everything else is shared, as on
a cluster with one file system. Nothing outside of the cluster's folder is changed.
"""

import os
import shutil
import signal
import socket
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from deadlines import seconds, until

PACKAGES = ("slurm-wlm", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "unshare")
DEADLINE = seconds(60)  # for one command
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL")
CONF = """\
ClusterName=ci
SlurmctldHost=localhost
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/munge.sock,cred_expire=5
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=10
SlurmdTimeout=10
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
{nodes}
PartitionName=ci Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""  # cred_expire: a requeued job waits for one second more than this (121 by default)


def install() -> str | None:
    """Install Slurm if CI is set and it is missing. Return why it is not available, or None if it is."""
    os.environ["PATH"] += os.pathsep + "/usr/sbin"  # contains the daemons; not in an ordinary user's PATH
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if os.geteuid() != 0:
        return "a cluster of virtual nodes needs root (for separate host names and mounts)"
    if missing and not os.environ.get("CI"):
        return f"{', '.join(missing)} missing: apt-get install {' '.join(PACKAGES)} (done automatically if CI is set)"
    if missing and shutil.which("apt-get") is None:
        return f"{', '.join(missing)} missing, and apt-get is not available"
    if missing:
        quiet = {"env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, "capture_output": True, "text": True}
        subprocess.run(["apt-get", "update"], timeout=seconds(300), check=False, **quiet)
        command = ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]
        done = subprocess.run(command, timeout=seconds(600), check=False, **quiet)
        if done.returncode:
            return f"apt-get install {' '.join(PACKAGES)} failed: {done.stderr.strip()[-300:]}"
    probe = subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True, text=True, check=False)
    return f"unshare: {probe.stderr.strip()}" if probe.returncode else None


@dataclass
class Cluster:
    """Nodes n1, n2, ... of four CPUs each.

    Args:
        folder: an empty folder for all files of the cluster.
        nodes: number of nodes.
    """

    folder: Path
    nodes: int = 2

    @property
    def private(self) -> Path:
        """A directory that is separate on every node."""
        return self.folder / "private"

    @property
    def names(self) -> list[str]:
        return [f"n{i}" for i in range(1, self.nodes + 1)]

    def start(self) -> None:
        """Start all daemons, and wait until all nodes are idle."""
        self.folder.chmod(0o755)
        for name in ("munge", "state", "log", "run", "private", *(f"spool.{n}" for n in self.names)):
            (self.folder / name).mkdir(mode=0o755)
        port, *ports = free_ports(1 + self.nodes)
        lines = [
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={p} CPUs=4 RealMemory=4000 State=UNKNOWN"
            for name, p in zip(self.names, ports, strict=True)
        ]
        conf = self.folder / "slurm.conf"
        conf.write_text(CONF.format(folder=self.folder, port=port, nodes="\n".join(lines)))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # prevents a search
        hosts = [f"127.0.1.{i} {name}" for i, name in enumerate(self.names, 1)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
        key = self.folder / "munge" / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        os.environ["SLURM_CONF"] = str(conf)
        munge = {"key-file": key, "socket": key.with_name("munge.sock"), "pid-file": self.folder / "run/munged.pid"}
        munge |= {"log-file": self.folder / "log/munged.log", "seed-file": key.with_name("munged.seed")}
        run("munged", *(f"--{option}={value}" for option, value in munge.items()))
        run("slurmctld")
        for name in self.names:
            self.start_node(name)
        up = partial(run, "sinfo", "-h", "-N", "-o", "%T")
        try:
            until(lambda: up().split() == ["idle"] * self.nodes, "all nodes idle", pause=0.1)
        except AssertionError as error:
            raise AssertionError(f"the cluster did not come up:\n{self.logs()}") from error

    def start_node(self, name: str) -> None:
        """Start a node's daemon in its own namespaces."""
        inside = f"""
            mount --bind {self.folder}/hosts /etc/hosts && mount -t tmpfs none {self.private} &&
            hostname {name} && exec slurmd -N {name}"""
        run("unshare", "--uts", "--mount", "sh", "-c", inside)

    def stop(self) -> None:
        """End all jobs and daemons."""
        with suppress(AssertionError):
            run("scancel", "--user=root", "--signal=KILL", "--full")
            run("scancel", "--user=root")
        with suppress(AssertionError):
            until(lambda: not run("squeue", "-h", check=False), "the end of all jobs", limit=15, pause=0.2)
        for path in sorted((self.folder / "run").glob("*.pid"), key=lambda p: p.name == "munged.pid"):
            with suppress(OSError, ValueError):
                end_process(int(path.read_text()))
        os.environ.pop("SLURM_CONF", None)

    def logs(self) -> str:
        """Return the last log lines of all daemons."""
        found = []
        for path in sorted((self.folder / "log").glob("*.log")):
            found += [f"-- {path.name}", *path.read_text(errors="replace").splitlines()[-20:]]
        return "\n".join(found)


def run(*command: str, check: bool = True, deadline: float = DEADLINE) -> str:
    """Run a command and return its output; fail with its error output."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=deadline, check=False, stdin=subprocess.DEVNULL
    )
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr or done.stdout}"
    return done.stdout.strip()


def free_ports(count: int) -> list[int]:
    """Return ports that are not in use."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    found = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return found


def alive(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def end_process(pid: int) -> None:
    """End a process with SIGTERM, then SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        with suppress(AssertionError):
            until(lambda: not alive(pid), "the end of a process", limit=5)
