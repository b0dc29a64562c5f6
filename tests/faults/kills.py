"""Jobs that are killed: all processes of a job get SIGKILL at a random moment, and the next run goes on on another grid.

``python tests/faults/kills.py [--kills 25] [--seed 0]``: SmolLM2 and 200 prompts (questions of GSM8K where LLAMA_HPC_TEST_DATA
names a folder with texts/gsm8k_test.jsonl), for each of some grids to begin with a job that is killed so often, while it starts,
loads, prefills, decodes, or writes. After every kill no answer that was there before may be gone, and none may have been found
twice; the next run has to say that it goes on behind all of them. In the end every prompt has one answer, that of the run which
first finished it, with the digest of a job that nobody disturbed. Prints a line a kill; the exit code tells whether all was well.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mpi_jobs import kill_all, start

from llama_hpc.errors import ResultsError
from llama_hpc.grid import GridShape
from llama_hpc.results import read_results
from llama_hpc.results.parts import ProgressFolder
from llama_hpc.results.records import read_records

GRIDS = ("2x1x2", "1x2x2", "1x1x2", "2x1x1", "1x2x1", "3x1x1", "1x3x1", "1x1x3", "1x1x1")
LIMIT = 900                     # seconds of a run
Answers = dict[tuple[int, int], str]    # the part that has the answer to a request's sample


class Wrong(Exception):
    """What must not be."""


def write_prompts(path: Path, count: int, tokens: int, choose: random.Random) -> None:
    """Of all lengths of answers, so that they do not end together; every third one with two sampled answers."""
    questions = Path(os.environ.get("LLAMA_HPC_TEST_DATA", "")) / "texts/gsm8k_test.jsonl"
    if questions.is_file():
        texts = [json.loads(line)["question"] for line in questions.read_text(encoding="utf-8").splitlines()]
    else:
        texts = [f"A farmer has {i} sheep{', and some of them sing' * (i % 9)}. Tell a story about them." for i in range(count)]
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            sampled = {"temperature": 0.8, "n": 2, "seed": i} if i % 3 == 0 else {}
            prompt = {"id": str(i), "messages": [{"role": "user", "content": texts[i % len(texts)]}]}
            file.write(json.dumps(prompt | {"max_tokens": choose.randint(-(-tokens // 4), tokens)} | sampled) + "\n")


def answers_in(folder: ProgressFolder) -> Answers:
    """The whole records of answers that lie in the parts. Raises Wrong where there are two for the same."""
    found: Answers = {}
    for part in folder.parts:
        for facts, _ in read_records(part).payloads[1:]:
            key = facts["request"], facts["sample"]
            if key in found:
                raise Wrong(f"the answer {key} is in {found[key]} and in {part.name}")
            found[key] = part.name
    return found


class Job:
    """Runs of one output. ``argv``: of llama-hpc, but for the grid."""

    def __init__(self, argv: list, output: Path):
        self.argv, self.output, self.folder, self.log = argv, output, ProgressFolder(output), output.with_suffix(".log")

    def start(self, grid: str) -> subprocess.Popen:
        """A run on a grid; what it says goes to ``log``."""
        argv = [*self.argv, "--output", self.output, "--resume", "--grid", grid]
        with open(self.log, "w", encoding="utf-8") as log:
            return start(GridShape.parse(grid).size, ["-m", "llama_hpc", *argv], stdout=log, stderr=log)

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def killed(self, grid: str, answers: int, delay: float) -> bool:
        """A run that is killed ``delay`` seconds after so many answers are kept; whether it had not ended by itself."""
        with self.start(grid) as run:
            end = time.monotonic() + LIMIT
            while not self._reached(answers) and run.poll() is None and time.monotonic() < end:
                time.sleep(0.02)
            time.sleep(delay)
            running = run.poll() is None
            kill_all(run)
        return running

    def _reached(self, answers: int) -> bool:
        try:
            return len(answers_in(self.folder)) >= answers
        except (OSError, ResultsError):
            return self.output.exists()         # What a run that has completed it is about to remove.

    def whole(self, grid: str) -> None:
        """A run that nobody disturbs. Raises Wrong where it fails."""
        with self.start(grid) as run:
            try:
                code = run.wait(LIMIT)
            except subprocess.TimeoutExpired:
                kill_all(run)
                code = f"none within {LIMIT} s"
        if code != 0:
            raise Wrong(f"a run on {grid} ended with exit code {code}:\n{self.said}")


def one_job(argv: list, output: Path, first_grid: str, kills: int, right: dict, choose: random.Random) -> int:
    """A job that is killed up to ``kills`` times, and then left alone; returns how often. ``right``: see ``undisturbed``.

    Raises Wrong for whatever is not as it should be.
    """
    job, grid, kept, done = Job(argv, output), first_grid, {}, 0
    while done < kills:
        # One in four while it starts or loads, the others when some more answers are there, which can be all of them.
        if choose.random() < 0.25:
            answers, delay = 0, choose.uniform(0, 2 * right["start"])
        else:
            answers = len(kept) + choose.randint(1, max(1, 2 * right["answers"] // kills))
            delay = choose.uniform(0, 0.2 if answers >= right["answers"] else 1)
        if not job.killed(grid, min(answers, right["answers"]), delay):
            if not output.exists():
                raise Wrong(f"a run on {grid} ended by itself, without an output:\n{job.said}")
            break
        done += 1
        check_resumed(job.said, len(kept), needed=False)
        if output.exists():
            print(f"{done:3} {grid}, killed when the output was complete", flush=True)
            break
        before, kept = kept, answers_in(job.folder)
        print(f"{done:3} {grid}, killed {delay:.1f} s after {answers} answers: {len(kept)} kept", flush=True)
        if lost := [key for key, part in before.items() if kept.get(key) != part]:
            raise Wrong(f"answers that were there before have gone: {sorted(lost)}")
        grid = choose.choice([other for other in GRIDS if other != grid])
    complete = output.exists()
    job.whole(grid)
    if not complete:
        check_resumed(job.said, len(kept), needed=bool(kept))
        check_redone(job.said, right["answers"] - len(kept))
    check_results(output, {} if complete else kept, right)
    output.unlink()
    return done


def check_resumed(said: str, answers: int, needed: bool) -> None:
    """A run said that it goes on behind so many answers; ``needed``: it was not killed before it could."""
    found = re.search(r"resuming: (\d+) answers", said)
    if (int(found[1]) != answers) if found else needed:
        raise Wrong(f"a run that had {answers} answers to go on behind said:\n{said}")


def check_redone(said: str, answers: int) -> None:
    """A run that was not killed has computed so many answers."""
    found = re.search(r"(\d+) answers with \d+ tokens", said)
    if not found or int(found[1]) != answers:
        raise Wrong(f"a run that had {answers} answers still to find said:\n{said}")


def check_results(output: Path, kept: Answers, right: dict) -> None:
    """One answer to each prompt, of the run that first finished it, and the right digest."""
    with read_results(output) as results:
        found = [(answer.request, answer.sample, answer.attempt) for answer in results.outputs()]
        if results.status != "complete" or results.verify() != right["digest"]:
            raise Wrong(f"{output} is {results.status} with digest {results.verify()}, not {right['digest']}")
    if len({answer[:2] for answer in found}) != len(found) or len(found) != right["answers"]:
        raise Wrong(f"{output} has {len(found)} answers, not one to each of {right['answers']}")
    for request, sample, attempt in found:
        part = kept.get((request, sample))
        if part and not part.startswith(f"part-{attempt}-"):
            raise Wrong(f"the answer {request, sample} in {output} is of run {attempt}, but {part} had it")


def undisturbed(argv: list, output: Path) -> dict:
    """Of a job that nobody disturbs: digest, number of answers, and seconds until its first step."""
    job, begin = Job(argv, output), time.monotonic()
    job.whole("1x1x1")
    seconds = time.monotonic() - begin
    with read_results(output) as results:
        return {"digest": results.verify(), "answers": results.num_outputs, "start": seconds - results.provenance["wall_seconds"]}


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25, help="for each grid")
    parser.add_argument("--grids", nargs="+", default=["2x1x2", "1x2x2"], help="on which jobs begin")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=200, help="of them")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer")
    args = parser.parse_args()
    choose, begin = random.Random(args.seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llama_hpc-kills-") as name:
        folder = Path(name)
        write_prompts(folder / "prompts.jsonl", args.prompts, args.max_tokens, choose)
        # Stored weights, so that runs start soon; few sequences at a time, so that answers come one by one.
        with start(1, ["-m", "llama_hpc", "quantize", args.model, folder / "model.h5", "--weights", "q8"]) as storing:
            if storing.wait():
                return 1
        argv = ["run", folder / "model.h5", "--prompts", folder / "prompts.jsonl", "--max-seqs", 8, "--ignore-eos"]
        kills, jobs, wrong = 0, 0, 0
        right = undisturbed(argv, folder / "right.h5")
        print(f"seed {args.seed}: {right['answers']} answers to {args.prompts} prompts, digest {right['digest']}", flush=True)
        for grid in args.grids:
            left = args.kills
            while left > 0:
                jobs += 1
                try:
                    done = one_job(argv, folder / f"killed-{jobs}.h5", grid, left, right, choose)
                except Wrong as error:
                    wrong, done = wrong + 1, left
                    print(f"WRONG: {error}", flush=True)
                kills, left = kills + done, left - done
            print(f"{grid}: {args.kills} kills", flush=True)
    print(f"kills: {jobs - wrong} of {jobs} jobs, killed {kills} times, ended with the digest of an undisturbed one and nothing "
          f"computed twice, {time.monotonic() - begin:.0f} s", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
