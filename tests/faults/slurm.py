"""What a SLURM does to jobs, at random moments, over and over; prints a line for each time and a count for each kind.

    python tests/faults/slurm.py [--rounds N] [--seed S] [--only KIND …]

Every job has to end with the right answers, each once, and on the way with the states and exit codes that jobs/README.md
tells. Needs what tests/cluster needs.
"""

import argparse
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "cluster")]

import slurm_cluster  # noqa: E402
from hosts import Hosts, user_environment  # noqa: E402
from hosts import missing as no_hosts  # noqa: E402
from slurm_cluster import Slurm, wait  # noqa: E402
from workload import User, Workload, answers_of, kept, stopped  # noqa: E402

from llama_hpc.results import read_results  # noqa: E402
from llama_hpc.results.parts import ProgressFolder  # noqa: E402

PACE = 0.08                     # seconds between prompts of a job that is disturbed: 8 s for all
GRIDS = ("2x1x1", "1x2x1", "1x1x2")
SCRIPTS = ("requeue.slurm", "requeue-mpirun.slurm")


class Campaign:
    """Kinds of faults are the methods without an underscore: each takes the number of the round, and returns what happened."""

    def __init__(self, slurm: Slurm, work: Workload, folder: Path, rng: random.Random):
        self.slurm, self.work, self.folder, self.rng = slurm, work, folder, rng

    def _user(self) -> User:
        return User(self.slurm, self.work, Path(tempfile.mkdtemp(dir=self.folder)))

    def _moment(self, number: int, output: Path) -> str:
        """Waits for a random time from the very start of a job on or, in odd rounds, for a random number of answers."""
        if number % 2:
            answers = self.rng.randrange(1, self.work.count // 2)
            # An array's task has a part of the prompts.
            wait(lambda: kept(output) >= answers or output.exists())
            return f"after {kept(output)} answers"
        seconds = self.rng.uniform(0, 4)
        time.sleep(seconds)
        return f"after {seconds:.1f} s"

    def _start(self, user: User, script: str, *sbatch: str) -> tuple[str, Path, str]:
        grid = self.rng.choice(GRIDS)
        job, output = user.submit(script, *sbatch, options=("--grid", grid), pace=PACE)
        self.slurm.wait_for(job, "RUNNING")
        return job, output, f"{script} {grid}"

    def _ends(self, job: str) -> str:
        facts = self.slurm.wait_for(job)
        state = facts["JobState"], facts["ExitCode"]
        assert state == ("COMPLETED", "0:0"), f"{state}\n{self.slurm.log(facts)}"
        return self.slurm.log(facts)

    def _is_whole(self, output: Path) -> str:
        """The right answers, each once; how many runs it took."""
        with read_results(output) as results:
            runs = len(results.provenance["runs"])
        self.work.check(output, runs)
        return f"{runs} runs"

    def preemption(self, number: int) -> str:
        """A job of a cheap partition makes room for another, and puts itself back into the queue."""
        user = self._user()
        job, output, what = self._start(user, "requeue.slurm", "--partition=cheap")
        when = self._moment(number, output)
        self.slurm.on_login("srun", "--exclusive", f"--nodes={len(self.slurm.nodes)}", "true", timeout=120)
        user.hurry()
        self.slurm.go_on(job, restarts=1)
        self._ends(job)
        return f"{what} {when}, {self._is_whole(output)}"

    def scancel(self, number: int) -> str:
        """Cancelled, with SIGTERM or at once with SIGKILL, then submitted again on another grid."""
        user, how = self._user(), self.rng.choice((("SIGTERM", ()), ("SIGKILL", ("--signal=KILL", "--full"))))
        job, output, what = self._start(user, self.rng.choice(SCRIPTS))
        when = self._moment(number, output)
        self.slurm.on_login("scancel", *how[1], job, check=False)
        state = self.slurm.wait_for(job)["JobState"]
        user.hurry()
        job, _ = user.submit("cpu.slurm", options=("--resume", "--grid", self.rng.choice(GRIDS)))
        self._ends(job)
        return f"{how[0]} to {what} {when}: {state}, {self._is_whole(output)}"

    def power(self, number: int) -> str:
        """A node loses its power; in every third round SLURM has to find out by itself."""
        return self._node_dies(number, lambda host: host.lose_power())

    def node(self, number: int) -> str:
        """The slurmd of a node is killed, and its steps with it."""
        return self._node_dies(number, lambda host: host.kill_everything())

    def _node_dies(self, number: int, die) -> str:
        user = self._user()
        job, output, what = self._start(user, self.rng.choice(SCRIPTS))
        nodes = self.slurm.job_nodes(job)
        when, node = self._moment(number, output), self.rng.choice(nodes)
        die(self.slurm.hosts[node])
        before = kept(output)
        if number % 3:
            self.slurm.on_login("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=power")
        user.hurry()
        try:
            if self.slurm.facts(job)["JobState"] != "COMPLETED":
                self.slurm.go_on(job, restarts=1)
            log = self._ends(job)
        finally:
            self.slurm.hosts[node].end()
            self.slurm.restart_node(node)
        assert not before or f"resuming: {before} answers" in log or "complete already" in log, log
        return f"{node} of {','.join(nodes)} running {what} {when}: {before} kept, {self._is_whole(output)}"

    def limit(self, number: int) -> str:
        """The real signal before the real limit, to both scripts at once; they go on until all is answered."""
        users = [self._user() for _ in SCRIPTS]
        jobs = [user.submit(script, "--time=1", f"--signal={'B:' * (script == SCRIPTS[1])}USR1@50", pace=0.6)
                for user, script in zip(users, SCRIPTS, strict=True)]
        said = []
        for user, (job, output), script in zip(users, jobs, SCRIPTS, strict=True):
            self.slurm.go_on(job, restarts=1)
            found = stopped(output, "SIGUSR1")
            user.hurry()
            # The run that has begun keeps the pace: it may be stopped once more.
            wait(lambda job=job: self._nudged(job), 240)
            assert self.slurm.facts(job)["ExitCode"] == "0:0"
            said.append(f"{script}: stopped with {found}, {self._is_whole(output)}")
        return "; ".join(said)

    def _nudged(self, job: str) -> bool:
        facts = self.slurm.facts(job)
        self.slurm.hasten(job, facts)
        assert facts["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "COMPLETED"), self.slurm.log(facts)
        return facts["JobState"] == "COMPLETED"

    def timeout(self, number: int) -> str:
        """The limit without a signal before it: SIGTERM, and an output that says incomplete."""
        user = self._user()
        job, output = user.submit("cpu.slurm", "--time=1", pace=1.5)
        facts = self.slurm.wait_for(job, timeout=180)
        assert facts["JobState"] == "TIMEOUT", facts
        wait(lambda: user.status(output) == "incomplete")
        found = stopped(output, "SIGTERM")
        user.hurry()
        self._ends(user.submit("cpu.slurm", options=("--resume",))[0])
        return f"stopped with {found}, {self._is_whole(output)}"

    def array(self, number: int) -> str:
        """A task of an array is killed, and run again by its number."""
        user, tasks = self._user(), 3
        job, folder = user.submit("array.slurm", f"--array=0-{tasks - 1}", output="answers", pace=PACE, SLICES=str(tasks))
        victim = self.rng.randrange(tasks)
        self.slurm.wait_for(f"{job}_{victim}", "RUNNING", "COMPLETED")
        when = self._moment(number, folder / f"answers-{victim}.h5")
        self.slurm.on_login("scancel", "--signal=KILL", "--full", f"{job}_{victim}", check=False)
        states = [self.slurm.wait_for(f"{job}_{task}")["JobState"] for task in range(tasks)]
        assert [state for task, state in enumerate(states) if task != victim] == ["COMPLETED"] * (tasks - 1), states
        again, _ = user.submit("array.slurm", f"--array={victim}", output="answers", SLICES=str(tasks))
        self._ends(f"{again}_{victim}")
        found = {}
        for task in range(tasks):
            found |= answers_of(folder / f"answers-{task}.h5")
        assert found == self.work.answers
        return f"task {victim} killed {when}: {states[victim]}"

    def controller(self, number: int) -> str:
        """slurmctld ends and is started again: the job does not notice."""
        user = self._user()
        job, output, what = self._start(user, "requeue.slurm")
        when = self._moment(number, output)
        login = self.slurm.hosts[slurm_cluster.LOGIN]
        login.run("sh", "-c", f"kill $(cat {self.slurm.folder}/slurmctld.pid)")
        wait(lambda: login.run("pidof", "slurmctld", check=False).returncode)
        self.slurm.on_login("slurmctld")
        self._ends(job)
        assert not ProgressFolder(output).path.exists()
        return f"{what} {when}, {self._is_whole(output)}"


KINDS = [name for name in vars(Campaign) if not name.startswith("_")]
ONCE = ("limit", "timeout")


def main() -> int:
    """Runs the campaign; returns 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help=f"of each kind but {' and '.join(ONCE)} (default: 6)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default: 0)")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help=", ".join(KINDS))
    args = parser.parse_args()
    if why := no_hosts() or slurm_cluster.missing():
        print(f"there can be no SLURM here: {why}")
        return 1
    good, bad, rng = Counter(), Counter(), random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="llama-hpc-faults-") as name:
        folder = Path(name)
        work = Workload(folder)
        for kind in args.only:
            for number in range(1 if kind in ONCE else args.rounds):
                place = Path(tempfile.mkdtemp(dir=folder, prefix=f"{kind}-{number}-"))
                with Hosts(place, [slurm_cluster.LOGIN, "n1", "n2", "n3"]) as hosts:
                    campaign = Campaign(Slurm(place, hosts, user_environment()), work, place, rng)
                    start = time.monotonic()
                    try:
                        said, counts = getattr(campaign, kind)(number), good
                    except Exception:
                        control = (place / "slurmctld.log").read_text().splitlines()
                        said, counts = "\n".join([traceback.format_exc(), *(line for line in control if "JobId" in line)]), bad
                    counts[kind] += 1
                    print(f"{kind} {number}, {time.monotonic() - start:.0f} s: {said}", flush=True)
    print("\n".join(f"{kind:12} {good[kind]} of {good[kind] + bad[kind]} right" for kind in args.only))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
