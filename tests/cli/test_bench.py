"""Options of ``llama-hpc bench``: what cannot be done is refused in one line with exit code 2."""

import pytest
from reference_models import write_checkpoint

from llama_hpc.bench.peer import TOOLS
from llama_hpc.cli.main import main

WRONG = [
    (["kernels", "--shapes", "4096"], "must be KxN, such as 4096x11008, got '4096'"),
    (["kernels", "--shapes", "0x16"], "must be KxN"),
    (["kernels", "--tokens", "0"], "must be a whole number from 1 to 65536, got '0'"),
    (["kernels", "--weights", "q2"], "invalid choice: 'q2'"),
    (["kernels", "--schedules", "random"], "invalid choice: 'random'"),
    (["kernels", "--output", "missing/bench"], "--output missing/bench: cannot write missing/bench.json"),
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
    assert "bench measures one process, but 2 were started" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bench", "bench.json", "bench.h5", "version.1"])
def test_output_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llama_hpc.bench.products.MOST_COPIES", 1)
    monkeypatch.setattr("llama_hpc.bench.products.PROBE_BYTES", 1 << 16)
    quick = ["--shapes", "64x48", "--tokens", "1", "--threads", "1", "--rounds", "1"]
    assert main(["bench", "kernels", *quick, "--output", name]) == 0
    base = name.removesuffix(".json").removesuffix(".h5")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{base}.h5", f"{base}.json"]
