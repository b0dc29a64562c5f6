"""The scripts of jobs/ on a real SLURM: submitted, signalled, requeued, cancelled, and with a node that dies."""

import pytest
from slurm_cluster import wait
from workload import JOBS, User, answers_of, kept, stopped

PACE = 0.05                     # seconds between prompts of a job that is going to be disturbed, of which there are 100


@pytest.fixture
def user(slurm, work, tmp_path):
    """A ``User``, whose jobs end with the test."""
    yield User(slurm, work, tmp_path)
    slurm.on_login("scancel", "--user=root", "--signal=KILL", check=False)


def succeeded(slurm, job):
    """Waits for a job's end, and asserts that it was a good one; returns what it printed."""
    facts = slurm.wait_for(job)
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), slurm.log(facts)
    return slurm.log(facts)


def test_jobs_of_one_step(slurm, work, user):
    """One node, several, ranks of several threads, those for GPUs on the CPU, and mpirun inside a job: the same answers, and the
    file says where from."""
    nodes = "--nodes=2", "--ntasks-per-node=1"
    for script, sbatch, grid, hosts, threads in (("cpu.slurm", (), "2x1x1", 1, 1), ("nodes.slurm", (), "1x2x1", 2, 1),
                                                 ("hybrid.slurm", (), "1x1x1", 1, 2), ("mpirun.sh", nodes, "2x1x1", 2, 1),
                                                 ("gpu.slurm", (), "1x1x1", 1, 2), ("gpu-nodes.slurm", (), "1x2x1", 2, 2)):
        job, output = user.submit(script, *sbatch, output=f"{script}.h5", options=("--device", "cpu") * script.startswith("gpu"))
        succeeded(slurm, job)
        facts = work.check(output)
        assert len(facts["hosts"]) == hosts and set(facts["hosts"]) <= set(slurm.nodes), script
        assert "x".join(map(str, facts["grid"].values())) == grid and facts["threads"] == threads
        assert facts["job"] == f"SLURM_JOB_ID={job}"


def test_an_array_shares_out_the_prompts(slurm, work, user):
    job, folder = user.submit("array.slurm", "--array=0-1", output="answers", SLICES="2")
    for task in range(2):
        succeeded(slurm, f"{job}_{task}")
    found = [answers_of(folder / f"answers-{task}.h5") for task in range(2)]
    assert [len(answers) for answers in found] == [work.count // 2] * 2 and found[0] | found[1] == work.answers


def test_signalled_requeued_cancelled_and_submitted_again(slurm, work, user):
    job, output = user.submit("requeue.slurm", options=("--grid", "2x1x1"), pace=PACE)
    wait(lambda: kept(output) >= 5)
    # What SLURM does two minutes before the limit.
    slurm.on_login("scancel", "--signal=USR1", job)
    slurm.go_on(job, restarts=1)
    first = stopped(output, "SIGUSR1")
    assert 5 <= first < work.count

    wait(lambda: kept(output, run=1) >= 5)
    slurm.on_login("scancel", job)
    facts = slurm.wait_for(job)
    assert (facts["JobState"], facts["ExitCode"]) == ("CANCELLED", "0:15"), slurm.log(facts)
    # The job has ended for SLURM, its ranks have not.
    wait(lambda: user.status(output) == "incomplete")
    second = stopped(output, "SIGTERM")
    assert f"resuming: {first} answers of 1 earlier run" in slurm.log(facts) and second >= first + 5

    job, _ = user.submit("cpu.slurm", "--ntasks-per-node=1", options=("--resume",))
    assert f"resuming: {second} answers of 2 earlier runs" in succeeded(slurm, job)
    work.check(output, runs=3)


def test_a_node_that_dies_costs_nothing_that_is_finished(slurm, work, user):
    job, output = user.submit("requeue.slurm", options=("--grid", "1x2x1"), pace=PACE)
    wait(lambda: kept(output) >= 5)
    node = next(node for node in slurm.job_nodes(job) if node != slurm.facts(job)["BatchHost"])
    slurm.hosts[node].lose_power()
    # SLURM finds out by itself after half a minute.
    slurm.on_login("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=power")
    before = kept(output)
    user.hurry()
    slurm.go_on(job, restarts=1)
    log = succeeded(slurm, job)
    assert node not in work.check(output, runs=2)["hosts"] and f"resuming: {before} answers" in log
    slurm.restart_node(node)


def test_a_chain_goes_on_until_all_is_answered(slurm, work, user):
    job, output = user.submit("chain.slurm", "--array=1-4%1", "--ntasks-per-node=1", pace=PACE)
    wait(lambda: kept(output) >= 5)
    user.hurry()
    # This SLURM tells of an error, with the signal on its way.
    slurm.on_login("scancel", "--signal=USR1", f"{job}_1", check=False)
    succeeded(slurm, f"{job}_1")
    assert "resuming" in succeeded(slurm, f"{job}_2")
    work.check(output, runs=2)
    assert not slurm.on_login("squeue", "--noheader").stdout, "the other links are gone"


def test_interactive(slurm, work, user, tmp_path):
    user.hurry()
    said = slurm.on_login("bash", JOBS / "interactive.sh", *work.options, cwd=JOBS.parent,
                          env=slurm.environment | work.environment(user.prompts, tmp_path / "out.h5")).stdout
    work.check(tmp_path / "out.h5")
    assert "Granted job allocation" in said and f"{tmp_path / 'out.h5'}: complete, {work.count} prompts" in said


def test_exit_codes(slurm, work, user):
    """2 for what the user can mend, 1 for a failure, as SLURM reports them, with one line from one rank."""
    job, output = user.submit("cpu.slurm", options=("--grid", "5x1x1"))
    facts = slurm.wait_for(job)
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "2:0")
    assert slurm.log(facts).count("llama-hpc: error:") == 1 and not output.exists()
    alone = slurm.on_login("srun", "-n2", "--mpi=pmi2", "llama-hpc", "run", work.model, "--prompts", user.prompts,
                           "--output", output, check=False)
    assert alone.returncode == 1 and alone.stdout.count("llama-hpc: error: 2 processes were started but MPI") == 1
    assert "srun --mpi=pmix" in alone.stdout


@pytest.mark.parametrize("script", sorted(JOBS.glob("*.slurm")), ids=lambda path: path.name)
def test_sbatch_takes_the_directives(slurm, script):
    slurm.on_login("sbatch", "--test-only", script)
