"""Command lines of llama-hpc in jobs that stand ready: most of a short run is the start of its processes.

A test takes them through the fixture ``command``, where it states what a command line does; what a process does from its start
to its end is for ``mpirun``. Under mpirun this file is the other end: ``standing_jobs.py FOLDER`` runs on every rank one command
line after the other, each as a run of its own that finds MPI started and kernels loaded.
"""

import json
import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

_RESULTS = "results"
_MOST = 4                       # jobs at a time


class StandingJobs:
    """Jobs by number of ranks, threads of each and MPI, started when a command line first needs one."""

    def __init__(self, make_folder):
        self._make_folder, self._jobs = make_folder, {}

    def run(self, n, argv, *, mpi=None, timeout=180, cwd=None):
        """Runs ``llama-hpc ARGV`` on ``n`` ranks. Threads are those that ``argv`` asks for, or one; ``mpi``, ``timeout``, ``cwd``
        and what is returned are as in ``mpi_jobs.mpirun``: where the run ends the job, the next one gets another."""
        import mpi_jobs
        import pytest
        argv, mpi = [str(word) for word in argv], mpi or mpi_jobs.MPI
        threads = argv[argv.index("--threads") + 1] if "--threads" in argv else "1"
        job = self._jobs.pop((n, threads, mpi), None)
        if job is None or job.over:
            while len(self._jobs) >= _MOST:
                self._jobs.pop(next(iter(self._jobs))).close()
            job = StandingJob(n, threads, mpi, self._make_folder())
        self._jobs[n, threads, mpi] = job       # The last one: used most recently.
        done = job.run(argv, cwd or mpi_jobs.ROOT, timeout)
        if done is None:
            pytest.fail(f"no end after {timeout} s on {n} ranks of {mpi}: {argv}")
        return done

    def close(self):
        """Ends all jobs."""
        for job in self._jobs.values():
            job.close()


class StandingJob:
    """``n`` ranks that wait for command lines. They come as lines of JSON through a pipe to each rank; each answers in one
    common pipe, and what it writes meanwhile to standard output and error goes to files in ``folder``, an empty one."""

    def __init__(self, n: int, threads: str, mpi: str, folder: Path):
        import mpi_jobs
        self.n, self.folder, self._count = n, folder, 0
        self._pipes = []
        for name in (*map(str, range(n)), _RESULTS):
            os.mkfifo(folder / name)
            # For reading as well: nobody waits for the other end to be opened.
            self._pipes.append(os.open(folder / name, os.O_RDWR))
        with open(folder / "log", "w") as log:
            self.job = mpi_jobs.start(n, [__file__, folder], mpi=mpi, env={"OMP_NUM_THREADS": threads}, stdout=log, stderr=log)

    def run(self, argv: list, cwd: Path, seconds: float) -> subprocess.CompletedProcess | None:
        """What ``llama-hpc ARGV`` returned, or mpirun where it ended the job, and all that its ranks wrote; None if it takes
        more than ``seconds``. In both of the latter cases the job is over."""
        self._count += 1
        order = json.dumps({"number": self._count, "cwd": str(cwd), "argv": [str(word) for word in argv]}) + "\n"
        for pipe in self._pipes[:-1]:
            os.write(pipe, order.encode())
        codes, end = [], time.monotonic() + seconds
        while len(codes) < self.n and self.job.poll() is None:
            if select.select([self._pipes[-1]], [], [], 0.05)[0]:
                codes += map(int, os.read(self._pipes[-1], 1 << 16).split())
            elif time.monotonic() > end:
                self.close()
                return None
        code = max(codes) if len(codes) == self.n else self.job.returncode
        output, errors = ("".join(path.read_text(errors="replace") for path in sorted(self.folder.glob(f"{self._count}.*.{fd}")))
                          for fd in (1, 2))
        return subprocess.CompletedProcess(argv, code, output, errors)

    @property
    def over(self) -> bool:
        """Whether the job has ended."""
        return self.job.poll() is not None

    def close(self) -> None:
        """Ends the job."""
        for pipe in self._pipes:
            os.close(pipe)              # The end of its orders, for a rank that waits for one.
        self._pipes = []
        for end in (lambda: None, self.job.terminate, self.job.kill):
            end()
            with suppress(subprocess.TimeoutExpired):
                self.job.wait(5)
                return


def serve(folder: Path) -> None:
    """One rank: runs what comes through its pipe until that is closed."""
    from llama_hpc.cli.main import main
    from llama_hpc.runtime.abort import end_process
    from llama_hpc.runtime.launch import world
    rank, cpus = world().rank, os.sched_getaffinity(0)
    with open(folder / str(rank)) as orders, open(folder / _RESULTS, "w", buffering=1) as results:
        for order in map(json.loads, orders):
            os.chdir(order["cwd"])
            os.sched_setaffinity(0, cpus)
            for fd in (1, 2):
                file = os.open(folder / f"{order['number']}.{rank}.{fd}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
                os.dup2(file, fd)
                os.close(file)
            sys.argv[:] = ["llama-hpc", *order["argv"]]
            code = main(order["argv"])
            sys.stdout.flush()
            sys.stderr.flush()
            results.write(f"{code}\n")
    end_process(0)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
