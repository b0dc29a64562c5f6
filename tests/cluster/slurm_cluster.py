"""A real SLURM on ``Hosts``: a controller on the first, compute nodes on the others. Without systemd and cgroups."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from hosts import Hosts

NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "munged")
LOGIN = "login"
# SLURM looks here for libpmix.so, a name that Debian's package without headers lacks.
_PMIX = Path("/usr/lib/x86_64-linux-gnu/pmix2/lib")

# MinJobAge keeps ended jobs where scontrol shows them. A node that is silent for SlurmdTimeout is lost. KillWait is the time
# between SIGTERM and SIGKILL. Jobs of the partition cheap make room for those of main, with GraceTime to leave. SLURM takes
# /dev/null of each node for a GPU.
_CONF = """
ClusterName=test
SlurmctldHost={login}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
TmpFS={folder}/tmp-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/{task}
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=10
MinJobAge=3600
SlurmctldTimeout=10
SlurmdTimeout=5
PropagateResourceLimits=NONE
GresTypes=gpu
NodeName={nodes} CPUs={cpus} RealMemory=4000 Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=cheap Nodes=ALL MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
"""
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "DEADLINE", "BOOT_FAIL")


def missing() -> str:
    """Which programs are not installed; empty where all are."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [name for name in NEEDED if not shutil.which(name, path=path)]
    return f"{', '.join(absent)} not installed" if absent else ""


class Slurm:
    """SLURM on ``hosts``. ``environment`` is that of the user who submits jobs. It ends with the hosts.

    ``bind``: whether ranks are bound to cores. The first core of each node is one and the same.
    """

    def __init__(self, folder: Path, hosts: Hosts, environment: dict[str, str], bind: bool = False):
        self.folder, self.hosts = folder, hosts
        self._hastened: set[str] = set()
        self.environment = environment | {"SLURM_CONF": str(folder / "slurm.conf")}
        self.nodes = [host.name for host in hosts if host.name != LOGIN]
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(_CONF.format(
            login=LOGIN, folder=folder, nodes=",".join(self.nodes), cpus=len(os.sched_getaffinity(0)),
            task="affinity" if bind else "none"))
        (folder / "gres.conf").write_text("AutoDetect=off\nName=gpu File=/dev/null\n")
        shutil.copytree(_PMIX, folder / "pmix", symlinks=True)
        if not (folder / "pmix/libpmix.so").exists():
            (folder / "pmix/libpmix.so").symlink_to("libpmix.so.2")
        key = folder / "munge.key"
        key.touch(0o400)
        key.write_bytes(os.urandom(1024))
        files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
        self.on_login("munged", "--force", f"--socket={folder}/munge.socket", *files)
        self._show_pmix(LOGIN)
        self.on_login("slurmctld")
        for node in self.nodes:
            self.start_node(node)
        self.wait_for_nodes()

    def on_login(self, *command, **options) -> subprocess.CompletedProcess:
        """Runs a program where users are, see ``Host.run``."""
        return self.hosts[LOGIN].run(*command, **{"env": self.environment} | options)

    def start_node(self, node: str) -> None:
        """Starts the daemon of a node."""
        for kind in ("spool", "tmp"):
            (self.folder / f"{kind}-{node}").mkdir(exist_ok=True)
        self._show_pmix(node)
        self.hosts[node].run("slurmd", env=self.environment)

    def restart_node(self, node: str) -> None:
        """Starts a node again after its end."""
        self.hosts.start(node)
        self.start_node(node)
        self.wait_for_nodes()

    def _show_pmix(self, host: str) -> None:
        self.hosts[host].run("mount", "--bind", self.folder / "pmix", _PMIX)

    def wait_for_nodes(self, timeout: float = 60) -> None:
        """Returns when every node can take jobs."""
        def ready() -> bool:
            return self.on_login("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%n").stdout.split() == self.nodes
        wait(ready, timeout, lambda: self.on_login("sinfo", "-N").stdout + (self.folder / "slurmctld.log").read_text())

    def submit(self, *options, cwd: Path, env: dict[str, str] | None = None) -> str:
        """sbatch with ``options``; returns the job's number."""
        said = self.on_login("sbatch", "--parsable", *options, cwd=cwd, env=self.environment | (env or {})).stdout
        return said.split(";")[0].strip()

    def facts(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job (of an array: of its task, such as 7_1)."""
        return dict(re.findall(r"(\w+)=(\S*)", self.on_login("scontrol", "show", "job", job).stdout))

    def job_nodes(self, job: str) -> list[str]:
        """The nodes that a job has."""
        return self.on_login("scontrol", "show", "hostnames", self.facts(job)["NodeList"]).stdout.split()

    def wait_for(self, job: str, *states: str, timeout: float = 240) -> dict[str, str]:
        """Waits until a job is in one of ``states`` (by default, has ended); returns its facts."""
        facts: dict[str, str] = {}

        def there() -> bool:
            facts.update(self.facts(job))
            return facts["JobState"] in (states or _ENDED)
        wait(there, timeout, lambda: f"{facts}\n{self.log(facts)}")
        return facts

    def go_on(self, job: str, restarts: int) -> None:
        """Lets a job that is requeued for the so-manieth time start soon, and waits for that: SLURM gives it two minutes."""
        def restarted() -> bool:
            facts = self.facts(job)
            self.hasten(job, facts)
            again = facts["Restarts"] == str(restarts)
            assert again or facts["JobState"] not in _ENDED, f"{facts}\n{self.log(facts)}"
            return again and facts["JobState"] in ("RUNNING", *_ENDED)
        wait(restarted, explain=lambda: self.log(self.facts(job)))

    def hasten(self, job: str, facts: dict[str, str]) -> None:
        """Shortens the wait of a requeued job. Not to nothing: in the same second nodes would take it for the one before."""
        if (facts["JobState"], facts["Reason"]) == ("PENDING", "BeginTime") and job not in self._hastened:
            self.on_login("scontrol", "update", f"JobId={job}", "StartTime=now+2")
            self._hastened.add(job)
        elif facts["JobState"] == "RUNNING":
            self._hastened.discard(job)

    def log(self, facts: dict[str, str]) -> str:
        """What a job has printed."""
        path = Path(facts.get("StdOut", ""))
        return path.read_text() if path.is_file() else ""


def wait(condition, timeout: float = 240, explain=lambda: "", pause: float = 0.1) -> None:
    """Returns as soon as ``condition()`` is true; AssertionError with ``explain()`` after ``timeout`` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"waited {timeout} s in vain: {explain()}"
        time.sleep(pause)
