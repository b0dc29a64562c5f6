"""Hosts, a SLURM and a job for the tests of this folder; they are made once, and end with the tests."""

import os
import shutil
import sys
from pathlib import Path

import mpi_jobs
import pytest
import slurm_cluster
from hosts import Hosts
from hosts import missing as no_hosts
from workload import Workload


@pytest.fixture(scope="session")
def user():
    """The environment of a user of the cluster: llama-hpc of this checkout and mpirun are installed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin"])
    # mpirun must keep to the slots that SLURM or a file of hosts gives it.
    return mpi_jobs.environment(env={"PATH": path, "PRTE_MCA_rmaps_default_mapping_policy": None})


@pytest.fixture(scope="session")
def hosts(tmp_path_factory):
    """``Hosts``: login, n1, n2 and n3."""
    if why := no_hosts():
        pytest.skip(f"there can be no hosts here: {why}")
    with Hosts(tmp_path_factory.mktemp("hosts"), [slurm_cluster.LOGIN, "n1", "n2", "n3"]) as hosts:
        yield hosts


@pytest.fixture(scope="session")
def ssh_user(hosts, user):
    """The environment of a user whom ssh lets into every host."""
    if not Path("/usr/sbin/sshd").exists() or not shutil.which("ssh"):
        pytest.skip("there is no ssh: openssh-server or openssh-client not installed (tests/cluster/install.sh)")
    return hosts.open_ssh(user)


@pytest.fixture(scope="session")
def slurm(hosts, user, tmp_path_factory):
    """``Slurm`` with the nodes n1, n2 and n3."""
    if why := slurm_cluster.missing():
        pytest.skip(f"there is no SLURM: {why} (tests/cluster/install.sh)")
    return slurm_cluster.Slurm(tmp_path_factory.mktemp("slurm"), hosts, user)


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """The ``Workload`` of these tests."""
    return Workload(tmp_path_factory.mktemp("work"))
