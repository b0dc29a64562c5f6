"""A job that is long enough to be disturbed, and what has to come of it all the same."""

import json
import subprocess
import sys
from pathlib import Path

import mpi_jobs
from reference_models import prompt, write_checkpoint
from slurm_cluster import Slurm

from llama_hpc.results import read_results
from llama_hpc.results.parts import ProgressFolder
from llama_hpc.results.records import read_records

JOBS = mpi_jobs.ROOT / "jobs"
CASE = "llama_odd"


class Workload:
    """A tiny model in ``folder`` and ``count`` prompts for it; ``digest`` is that of a run that nobody disturbs."""

    options = ("--ignore-eos",)

    def __init__(self, folder: Path, count: int = 100):
        self.count, self.model, output = count, write_checkpoint(CASE, folder / "model"), folder / "undisturbed.h5"
        self.write_prompts(folder / "prompts.jsonl")
        subprocess.run([sys.executable, "-m", "llama_hpc", "run", self.model, "--prompts", folder / "prompts.jsonl",
                        "--output", output, *self.options], env=mpi_jobs.environment(), capture_output=True, check=True)
        self.answers = answers_of(output)
        with read_results(output) as results:
            self.digest = results.digest

    def write_prompts(self, path: Path, pace: float = 0) -> None:
        """The file of prompts. One arrives every ``pace`` seconds, so that a job lasts long enough on any machine; the job and
        its answers are the same."""
        ids = [int(i) for i in prompt(CASE)]
        entries = [{"id": f"q{i}", "token_ids": ids[i % 7 : i % 7 + 3 + i % 5], "max_tokens": 20 + 15 * (i % 4),
                    "temperature": 0.8, "seed": i, "arrival_s": pace * i} for i in range(self.count)]
        if not pace:
            entries = [{name: value for name, value in entry.items() if name != "arrival_s"} for entry in entries]
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    def environment(self, prompts: Path, output: Path) -> dict[str, str]:
        """What the scripts of jobs/ read."""
        return {"MODEL": str(self.model), "PROMPTS": str(prompts), "OUTPUT": str(output)}

    def check(self, output: Path, runs: int = 1) -> dict:
        """Asserts that ``output`` is complete, of ``runs`` runs, and has the right answers, each once; returns its provenance."""
        with read_results(output) as results:
            assert results.status == "complete" and results.verify() == self.digest
            assert results.num_outputs == self.count and len(results.provenance["runs"]) == runs
            assert sum(run["answers"] for run in results.provenance["runs"]) == self.count
            assert not ProgressFolder(output).path.exists()
            return results.provenance


class User:
    """Who submits the job ``work`` to ``slurm``, with ``folder`` for prompts, outputs and logs."""

    def __init__(self, slurm: Slurm, work: Workload, folder: Path):
        self.slurm, self.work, self.folder, self.prompts = slurm, work, folder, folder / "prompts.jsonl"

    def submit(self, script: str, *sbatch: str, options: tuple = (), output: str = "out.h5", pace: float = 0,
               **environment: str) -> tuple[str, Path]:
        """Submits a script of jobs/ with options of sbatch and of llama-hpc run; returns the job's number and its output."""
        self.work.write_prompts(self.prompts, pace)
        where = self.work.environment(self.prompts, self.folder / output)
        job = self.slurm.submit(*sbatch, f"--output={self.folder}/slurm-%A_%a.out", JOBS / script, *self.work.options, *options,
                                cwd=JOBS.parent, env=where | environment)
        return job, self.folder / output

    def hurry(self) -> None:
        """Has all prompts arrive at once in runs that begin from now on."""
        self.work.write_prompts(self.prompts)

    def status(self, output: Path) -> str:
        """What a script sees of an output."""
        return self.slurm.on_login("llama-hpc", "show", "--status", output).stdout.strip()


def stopped(output: Path, *reasons: str) -> int:
    """Asserts that an output has a part of the answers, for one of ``reasons``; returns how many."""
    with read_results(output) as results:
        assert results.status == "incomplete" and results.provenance["stopped"] in reasons, results.provenance["stopped"]
        return results.num_outputs


def answers_of(output: Path) -> dict[str, list[int]]:
    """The tokens of every answer, by the prompt's id."""
    with read_results(output) as results:
        return {results.ids[found.request]: found.tokens.tolist() for found in results.outputs()}


def kept(output: Path, run: int = 0) -> int:
    """Finished answers that a run has kept so far."""
    parts = [path for path in ProgressFolder(output).parts if path.name.startswith(f"part-{run}-")]
    return sum(max(0, len(read_records(path).payloads) - 1) for path in parts)
