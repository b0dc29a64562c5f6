"""The frame of the command line: help, version, usage errors, alone and under mpirun."""

import os
import subprocess
import sys
import time

import pytest

import llama_hpc
from llama_hpc.cli.main import COMMANDS, main

HEAVY = ("mpi4py", "numpy", "numba", "h5py", "tokenizers", "sentencepiece", "safetensors", "gguf", "jinja2", "tqdm")


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"llama-hpc {llama_hpc.__version__}\n"


def test_help_names_the_commands(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n    {command} " in shown for command in COMMANDS)


@pytest.mark.parametrize("command", ["", "run", "score", "info", "show"])
def test_help_imports_nothing_heavy(command):
    arguments = [*command.split(), "--help"]
    code = (
        "import sys\n"
        "from llama_hpc.cli.main import main\n"
        f"code = main({arguments!r})\n"
        f"sys.exit(code or ' '.join(name for name in {HEAVY!r} if name in sys.modules) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: llama-hpc")


def test_output_that_cannot_be_written_is_an_error():
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "llama_hpc", "--version"], stdout=full, stderr=subprocess.PIPE, text=True,
                              env=env)
    assert done.returncode == 1
    assert done.stderr == "llama-hpc: error: cannot write to the standard output: No space left on device\n"


def test_help_is_quick():
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "llama_hpc", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3


USAGE = [
    ([], "required: COMMAND (see `llama-hpc --help`)"),
    (["fly"], "invalid choice: 'fly'"),
    (["run"], "required: MODEL"),
    (["run", "--wings"], "(see `llama-hpc run --help`)"),
    (["run", "smollm2", "--kv-cache", "q4"], "argument --kv-cache: invalid choice: 'q4'"),
    (["show", "results.h5", "--wings"], "unrecognized arguments: --wings (see `llama-hpc"),
]


@pytest.mark.parametrize(("arguments", "text"), USAGE)
def test_usage_errors_are_one_line(arguments, text, capsys):
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("llama-hpc: error: ") and shown.err.count("\n") == 1
    assert text in shown.err


@pytest.mark.parametrize("mpi", ["openmpi", "mpich"])
def test_usage_errors_under_mpirun_are_one_line_too(mpirun, mpi):
    job = mpirun(3, ["-m", "llama_hpc", "fly"], mpi=mpi)
    ours = [line for line in job.stderr.splitlines() if line.startswith("llama-hpc: ")]
    assert len(ours) == 1 and "invalid choice: 'fly'" in ours[0]
    assert job.returncode == 2
    assert job.stdout == ""


def test_help_under_mpirun_is_printed_once(mpirun):
    job = mpirun(3, ["-m", "llama_hpc", "--help"])
    assert job.returncode == 0
    assert job.stdout.count("usage: llama-hpc") == 1
