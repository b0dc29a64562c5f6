"""Hosts, a SLURM and a job for the tests of this folder; they are made once, and end with the tests."""

import shutil
from pathlib import Path

import pytest
import slurm_cluster
from hosts import Hosts, user_environment
from hosts import missing as no_hosts
from workload import Workload


@pytest.fixture(scope="session")
def environment():
    """``user_environment``."""
    return user_environment()


@pytest.fixture(scope="session")
def hosts(tmp_path_factory):
    """``Hosts``: login, n1, n2 and n3."""
    if why := no_hosts():
        pytest.skip(f"there can be no hosts here: {why}")
    with Hosts(tmp_path_factory.mktemp("hosts"), [slurm_cluster.LOGIN, "n1", "n2", "n3"]) as hosts:
        yield hosts


@pytest.fixture(scope="session")
def ssh_environment(hosts, environment):
    """The environment of a user whom ssh lets into every host."""
    if not Path("/usr/sbin/sshd").exists() or not shutil.which("ssh"):
        pytest.skip("there is no ssh: openssh-server or openssh-client not installed (tests/cluster/install.sh)")
    return hosts.open_ssh(environment)


@pytest.fixture(scope="session")
def slurm(hosts, environment, tmp_path_factory):
    """``Slurm`` with the nodes n1, n2 and n3."""
    if why := slurm_cluster.missing():
        pytest.skip(f"there is no SLURM: {why} (tests/cluster/install.sh)")
    return slurm_cluster.Slurm(tmp_path_factory.mktemp("slurm"), hosts, environment)


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """The ``Workload`` of these tests."""
    return Workload(tmp_path_factory.mktemp("work"))
