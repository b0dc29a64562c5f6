"""Several hosts on this machine, each with a network, a name, a /dev/shm and processes of its own. Linux, as root.

A host is a set of namespaces that live as long as their first process, which waits for the end of its standard input: hosts
and everything on them end with the process that made them, however that ends.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mpi_jobs
import psutil

from llama_hpc.runtime import numba_setup

NEEDED = ("unshare", "nsenter", "ip")
_ENTER = "--net --uts --ipc --mount --pid"
# Where hosts keep what is not for others: MPI's daemons name their files after processes, whose numbers hosts have in common.
_TEMPORARY = "/var/tmp"
# The first process of a host adopts what its daemons leave behind: to ignore SIGCHLD is to bury it.
_FIRST = f"""
trap '' CHLD
hostname "$1" && mount -t tmpfs -o size=1G tmpfs /dev/shm && mount --bind "$2" /etc/hosts && mount -t tmpfs tmpfs /run &&
mkdir /run/sshd && mount -t tmpfs tmpfs {_TEMPORARY} && ip link set lo up && echo ready && exec cat
"""


def user_environment() -> dict[str, str]:
    """The environment of a user of the hosts: llama-hpc of this checkout and mpirun are installed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin"])
    return mpi_jobs.environment(env={
        "PATH": path, "TMPDIR": _TEMPORARY, "NUMBA_CACHE_DIR": os.environ.get("NUMBA_CACHE_DIR") or numba_setup.cache_folder(),
        # mpirun must keep to the slots that SLURM or a file of hosts gives it.
        "PRTE_MCA_rmaps_default_mapping_policy": None})


def missing() -> str:
    """Why there can be no hosts here; empty where there can."""
    if os.geteuid():
        return "it takes root"
    if absent := [name for name in NEEDED if not shutil.which(name)]:
        return f"{', '.join(absent)} not installed"
    tried = subprocess.run(["unshare", *_ENTER.split(), "--fork", "true"], capture_output=True, text=True)
    return f"no namespaces ({tried.stderr.strip()})" if tried.returncode else ""


class _Namespaces:
    """Namespaces of the kinds ``kinds`` and their first process, which says ``ready``."""

    def __init__(self, kinds: str, script: str, *arguments: str):
        command = ["unshare", *kinds.split(), "--fork", "--kill-child", "sh", "-c", script, "sh", *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        text=True, start_new_session=True)
        if (said := self.process.stdout.readline()) != "ready\n":
            raise RuntimeError(f"no namespaces: {said}{self.process.communicate()[0]}")
        self.pid = psutil.Process(self.process.pid).children()[0].pid

    def end(self) -> None:
        """Kills everything in it."""
        if self.process.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        self.process.communicate()


class Host(_Namespaces):
    """One of ``Hosts``: programs are started on it by ``popen`` and ``run``."""

    def __init__(self, network: _Namespaces, name: str, address: str, names: Path):
        super().__init__(f"{_ENTER} --mount-proc", _FIRST, name, str(names))
        self.name, self.address, self._network = name, address, network
        plug = f"ip link add {name} type veth peer name eth0 netns {self.pid} && ip link set {name} master switch up"
        subprocess.run(["nsenter", "-t", str(network.pid), "--net", "sh", "-c", plug], check=True)
        self.run("sh", "-c", f"ip addr add {address}/24 dev eth0 && ip link set eth0 up")

    def popen(self, *command, cwd=None, **options) -> subprocess.Popen:
        """Starts a program on the host, with the options of subprocess.Popen."""
        enter = ["nsenter", "-t", str(self.pid), *_ENTER.split(), "env", "-C", str(cwd or "/"), *map(str, command)]
        return subprocess.Popen(enter, **{"stdin": subprocess.DEVNULL} | options)

    def run(self, *command, timeout=60, check=True, **options) -> subprocess.CompletedProcess:
        """Runs a program to its end; its output is text, both kinds together. Raises AssertionError where it fails."""
        with self.popen(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                        **options) as program:
            try:
                said, _ = program.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                os.killpg(program.pid, signal.SIGKILL)
                raise AssertionError(f"no end after {timeout} s: {command}\n{program.communicate()[0]}") from None
        assert not check or program.returncode == 0, f"{command}: exit code {program.returncode}\n{said}"
        return subprocess.CompletedProcess(command, program.returncode, said)

    def kill_everything(self) -> None:
        """Kills every process on the host; the host itself stays, and its network says so to others."""
        self.run("sh", "-c", "kill -KILL -1", check=False)

    def lose_power(self) -> None:
        """Ends it as a power cut does: nothing that it was doing says goodbye to other hosts."""
        subprocess.run(["nsenter", "-t", str(self._network.pid), "--net", "ip", "link", "del", self.name], check=True)
        self.end()


class Hosts:
    """Hosts of the given names on one switch; ``names`` is their /etc/hosts. Use it in a ``with`` block."""

    def __init__(self, folder: Path, names: list[str]):
        self._addresses = {name: f"10.77.0.{i + 1}" for i, name in enumerate(names)}
        self._folder, self._names = folder, folder / "hosts"
        self._names.write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for n, a in self._addresses.items()))
        switch = "ip link add switch type bridge && ip link set switch up && echo ready && exec cat"
        self._network = _Namespaces("--net --pid", switch)
        self._hosts: dict[str, Host] = {}
        try:
            for name in names:
                self.start(name)
        except BaseException:
            self.end()
            raise

    def start(self, name: str) -> Host:
        """Starts a host, for the first time or after its end."""
        self._hosts[name] = Host(self._network, name, self._addresses[name], self._names)
        return self._hosts[name]

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __iter__(self):
        return iter(self._hosts.values())

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, *_) -> None:
        self.end()

    def open_ssh(self, environment: dict[str, str]) -> dict[str, str]:
        """Starts sshd on every host, for users with ``environment`` there; returns it with what tells mpirun how to get in."""
        key = self._folder / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        (self._folder / "authorized").write_bytes(key.with_suffix(".pub").read_bytes())
        theirs = ("PATH", "PYTHONPATH", "TMPDIR", "NUMBA_CACHE_DIR")
        own = " ".join(f'"{name}={environment[name]}"' for name in theirs)
        config = self._folder / "sshd_config"
        config.write_text(f"HostKey {key}\nAuthorizedKeysFile {self._folder}/authorized\nStrictModes no\nPermitRootLogin yes\n"
                          f"UsePAM no\nSetEnv {own}\n")
        for host in self:
            host.run("/usr/sbin/sshd", "-f", config)
        trust = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
        return environment | {"PRTE_MCA_plm_ssh_args": f"-q -i {key} {trust}"}

    def end(self) -> None:
        """Ends all hosts and what runs on them."""
        for part in (*self, self._network):
            part.end()
