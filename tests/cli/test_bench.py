"""Options of ``llama-hpc bench``: what cannot be done is refused in one line with exit code 2."""

import pytest
from reference_models import write_checkpoint

from llama_hpc.bench.peer import TOOLS
from llama_hpc.cli.main import build_parser, main

WRONG = [
    (["kernels", "--shapes", "4096"], "must be KxN, such as 4096x11008, got '4096'"),
    (["kernels", "--shapes", "0x16"], "must be KxN"),
    (["kernels", "--tokens", "0"], "must be a whole number from 1 to 65536, got '0'"),
    (["kernels", "--weights", "q2"], "invalid choice: 'q2'"),
    (["kernels", "--schedules", "random"], "invalid choice: 'random'"),
    (["kernels", "--output", "missing/bench"], "--output missing/bench: cannot write missing/bench.json"),
    (["comm"], "bench comm measures between ranks, and there is one; start several, as in mpirun -n 2 llama-hpc bench comm"),
    (["comm", "--sizes", "12"], "must be a multiple of 8 bytes from 8 to 1G, got '12'"),
    (["comm", "--sizes", "2G"], "must be a multiple of 8 bytes from 8 to 1G, got '2G'"),
    (["comm", "--sizes", "large"], "must be a number of bytes, or with a unit such as 512M or 4G, got 'large'"),
    (["comm", "--operations", "gather"], "invalid choice: 'gather'"),
    (["comm", "--rounds", "0"], "must be a whole number from 1 to 1000, got '0'"),
    (["scaling", "--shape", "4096"], "must be KxN, such as 4096x11008, got '4096'"),
    (["scaling", "--batches", "0"], "must be a whole number from 1 to 65536, got '0'"),
    (["scaling", "--strategies", "pipeline"], "invalid choice: 'pipeline'"),
    (["scaling", "--weights", "q2"], "invalid choice: 'q2'"),
    (["scaling", "--copies", "0"], "must be a whole number from 1 to 1024, got '0'"),
    (["scaling", "--output", "missing/bench"], "--output missing/bench: cannot write missing/bench.json"),
    (["model"], "needs either a MODEL or --shape"),
    (["model", "model", "--shape", "tinyllama"], "needs either a MODEL or --shape"),
    (["model", "--shape", "llama9"], "invalid choice: 'llama9'"),
    (["model", "--shape", "tinyllama", "--layers", "23"], "tinyllama has 22 layers; take 1 to 22"),
    (["model", "{model}", "--layers", "1"], "--layers is for --shape"),
    (["model", "missing.gguf"], "model missing.gguf does not exist"),
    (["model", "{model}", "--prompt", "60000"], "60000 tokens are more than the model's context of 256; lower --prompt"),
    (["model", "--shape", "tinyllama", "--peer", "missing"], "missing has no llama-bench, llama-batched-bench, llama-quantize"),
    (["model", "{model}", "--prompt", "8", "--peer", "{build}"], "llama.cpp cannot read"),
]


@pytest.mark.parametrize("arguments, text", WRONG)
def test_wrong_command_lines(arguments, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, build = write_checkpoint("smollm", tmp_path / "model"), tmp_path / "build"
    build.mkdir()
    for tool in TOOLS:
        (build / tool).write_text("#!/bin/sh\n")
        (build / tool).chmod(0o755)
    assert main(["bench", *(argument.format(model=model, build=build) for argument in arguments)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("llama-hpc: error: ") and shown.count("\n") == 1 and text in shown
    assert not list(tmp_path.glob("benchmark*"))


def test_several_processes_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert main(["bench", "kernels"]) == 2
    assert "bench kernels measures one process, but 2 were started" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("arguments, text", [
    (["comm", "--sizes", "12"], "must be a multiple of 8 bytes"),
    (["comm", "--output", "missing/bench"], "cannot write missing/bench.json"),
    (["scaling", "--output", "missing/bench"], "cannot write missing/bench.json"),
])
def test_wrong_command_lines_of_several_ranks(command, tmp_path, ranks, arguments, text):
    job = command(ranks, ["bench", *arguments], cwd=tmp_path)
    lines = [line for line in job.stderr.splitlines() if line.startswith("llama-hpc:")]
    assert job.returncode == 2 and len(lines) == 1 and text in lines[0] and not list(tmp_path.iterdir())


FAILING = """
import sys
from llama_hpc.runtime import numba_setup
numba_setup.configure(1)
from llama_hpc.bench import comm, scaling
from llama_hpc.cli.main import main
from llama_hpc.runtime.launch import environment_rank
def fail(*arguments):
    raise MemoryError
if environment_rank() == 1:
    PATCH
sys.exit(main(["bench", "KIND", "--rounds", "1"]))
"""


@pytest.mark.parametrize("kind, patch", [("comm", "comm.slowest_seconds = fail"), ("scaling", "scaling.Matrix.held = fail"),
                                         ("scaling", "scaling.repetitions = fail"), ("scaling", "scaling.Matrix.random = fail")])
def test_a_failing_rank_ends_the_job(mpirun, tmp_path, kind, patch):
    job = mpirun(3, ["-c", FAILING.replace("PATCH", patch).replace("KIND", kind)], cwd=tmp_path)
    lines = [line for line in job.stderr.splitlines() if line.startswith("llama-hpc:")]
    assert job.returncode == 1 and len(lines) == 1 and "out of memory" in lines[0] and "rank 1 " in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind, name", [("comm", "operations"), ("scaling", "strategies")])
def test_options_name_what_there_is(kind, name):
    from llama_hpc.bench.exchanges import OPERATIONS
    from llama_hpc.bench.strategies import STRATEGIES
    offered = getattr(build_parser().parse_args(["bench", kind]), name)
    assert offered == list(OPERATIONS if kind == "comm" else STRATEGIES)


@pytest.mark.parametrize("name", ["bench", "bench.json", "bench.h5", "version.1"])
def test_output_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llama_hpc.bench.products.MOST_COPIES", 1)
    monkeypatch.setattr("llama_hpc.bench.products.PROBE_BYTES", 1 << 16)
    quick = ["--shapes", "64x48", "--tokens", "1", "--threads", "1", "--rounds", "1"]
    assert main(["bench", "kernels", *quick, "--output", name]) == 0
    base = name.removesuffix(".json").removesuffix(".h5")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{base}.h5", f"{base}.json"]
