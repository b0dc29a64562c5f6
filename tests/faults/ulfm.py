"""Ranks that die: jobs under ``mpirun --with-ft ulfm`` lose a rank at a random moment, and are to end with the right digest.

``python tests/faults/ulfm.py [--runs 25] [--seed 0]``: SmolLM2 on 3x1x1, 2x1x2 and 2x2x1 in turn, and with a spare rank. A
rank, the first one included, is killed with SIGKILL while the job loads, prefills, decodes or writes, and a second one while the
loss of the first is handled. Prints a line a run; the exit code tells whether all was well: at most one run in 25 without the
digest of an undisturbed run, which ``--resume`` then gives, and none that does not end.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import h5py

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mpi_jobs import environment

# What the log says before a phase begins, and from when to when after that the killer strikes, in seconds.
PHASES = {"load": ("grid ", 0.0, 2.0), "prefill": ("loading: ", 0.0, 0.8), "decode": ("loading: ", 0.8, 4.0),
          "write": (" answers with ", 0.0, 0.05), "recovery": ("loading: ", 0.5, 3.0)}
LAYOUTS = (("3x1x1", 0), ("2x1x2", 0), ("2x2x1", 0), ("2x1x2", 1))
LIMIT = 240                     # seconds of a job


def ranks_of(job: int) -> dict[int, int]:
    """Processes of the ranks that mpirun, itself process ``job``, has started."""
    found = {}
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and int((process / "stat").read_text().rsplit(")", 1)[1].split()[1]) == job:
                variables = dict(item.split("=", 1) for item in (process / "environ").read_text().split("\0") if "=" in item)
                found[int(variables["OMPI_COMM_WORLD_RANK"])] = int(process.name)
        except (OSError, KeyError, ValueError):
            continue
    return found


class DyingJob:
    """A job whose log is followed, and whose ranks can be killed. ``argv``: arguments of llama-hpc."""

    def __init__(self, ranks: int, argv: list[str], folder: Path, threads: int = 1):
        mpirun = str(Path(sys.executable).parent / "mpirun")
        command = [mpirun, "--with-ft", "ulfm", "-n", str(ranks), sys.executable, "-m", "llama_hpc", *map(str, argv)]
        self.job = subprocess.Popen(command, env=environment(env={"OMP_NUM_THREADS": threads}), cwd=folder, text=True,
                                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                    start_new_session=True)
        self.lines: list[str] = []
        self._said = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.job.stdout:
            with self._said:
                self.lines.append(line.replace("\0", "").rstrip())
                self._said.notify_all()

    def wait_for(self, text: str, seconds: float) -> bool:
        """Whether a line with this text came."""
        with self._said:
            return self._said.wait_for(lambda: any(text in line for line in self.lines), seconds)

    def kill(self, choose) -> int | None:
        """Kills one of the living ranks; returns which one."""
        ranks = ranks_of(self.job.pid)
        if len(ranks) < 2 or self.job.poll() is not None:
            return None
        rank = choose(sorted(ranks))
        os.kill(ranks[rank], signal.SIGKILL)
        return rank

    def end(self, seconds: float) -> int | None:
        """The exit code; None where there was no end."""
        try:
            code = self.job.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(self.job.pid, signal.SIGKILL)
            for process in ranks_of(self.job.pid).values():
                os.kill(process, signal.SIGKILL)
        self._reader.join(5)
        return code

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def result_of(output: Path) -> tuple[str, str, int]:
    """Status, digest and number of answers; empty where there is no output."""
    if not output.exists():
        return "", "", 0
    with h5py.File(output) as file:
        return file.attrs["status"], file.attrs["digest"], len(file["outputs/request"])


def one_run(model: Path, prompts: Path, folder: Path, layout: tuple[str, int], phase: str, choose: random.Random,
            tokens: int) -> tuple[bool, str, str]:
    """Runs a job in which ranks die; returns whether one did, what happened, and its digest (empty where it is not complete)."""
    grid, spares = layout
    ranks = spares + eval(grid.replace("x", "*"))
    output = folder / "dying.h5"
    output.unlink(missing_ok=True)
    argv = ["run", model, "--prompts", prompts, "--output", output, "--max-tokens", tokens, "--resume"]
    job = DyingJob(ranks, [*argv, "--grid", grid, "--spares", spares], folder)
    start, (text, *when) = time.monotonic(), PHASES[phase]
    killed = []
    if job.wait_for(text, LIMIT):
        time.sleep(choose.uniform(*when))
        killed.append(job.kill(choose.choice))
        if phase == "recovery" and job.wait_for("lost rank", 60):
            time.sleep(choose.uniform(0, 0.3))
            killed.append(job.kill(choose.choice))
    code = job.end(LIMIT)
    status, digest, _ = result_of(output)
    story = f"{grid} and {spares} spare, {phase}: killed {killed}, exit code {code}, {time.monotonic() - start:.0f} s"
    if status == "complete" and code is not None:
        return killed[:1] != [None], story, digest
    DyingJob(2, argv, folder).end(LIMIT)
    return True, f"{story}{', NO END' if code is None else ''}, resumed to {result_of(output)}\n{job.text}", ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=60, help="of them")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    args = parser.parse_args()
    choose = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="llama_hpc-dying-") as name:
        folder = Path(name)
        prompts, model = folder / "prompts.jsonl", folder / "smollm2.h5"
        prompts.write_text("".join(json.dumps({"id": str(i), "prompt": f"Tell a story about {i} sheep" + " that sing" * (i % 9)})
                                   + "\n" for i in range(args.prompts)))
        whole = [("1x1x1", ["quantize", "smollm2", model, "--weights", "q3_5"]),
                 ("1x1x1", ["run", model, "--prompts", prompts, "--output", folder / "right.h5", "--max-tokens", args.tokens])]
        for _, argv in whole:
            job = DyingJob(1, argv, folder, threads=2)
            if job.end(600) != 0:
                print(job.text)
                return 1
        right = result_of(folder / "right.h5")[1]
        print(f"seed {args.seed}, undisturbed digest {right}", flush=True)
        number, wrong, hung = 0, 0, 0
        while number < args.runs:
            phase = list(PHASES)[number % len(PHASES)]
            died, story, digest = one_run(model, prompts, folder, LAYOUTS[number % len(LAYOUTS)], phase, choose, args.tokens)
            # The killer was too late: that is no run, unless it went wrong.
            number += died or digest != right
            wrong, hung = wrong + (digest != right), hung + ("NO END" in story)
            print(f"{number:3} {'right' if digest == right else 'WRONG'}{'' if died else ', too late,'} {story}", flush=True)
    print(f"ulfm: {args.runs - wrong} of {args.runs} runs with the right digest, {hung} without an end", flush=True)
    return int(hung > 0 or wrong > args.runs // 25)


if __name__ == "__main__":
    sys.exit(main())
