"""Bad input of every kind: one line of ours over all ranks, the exit code of its kind, nothing left behind, no hang."""

from dataclasses import dataclass
from pathlib import Path

import mpi_jobs
import pytest
from damaged_models import Models

LIMIT = 60                      # seconds that any of these may take, on a busy machine
GOOD = b'{"id": "a", "token_ids": [1, 2, 3], "max_tokens": 4}\n'


@dataclass(frozen=True)
class Case:
    """What is wrong, the exit code, and what the line must say; ``{n}`` stands for the number of ranks."""

    code: int
    texts: tuple[str, ...]
    model: str = "small"
    prompts: bytes = GOOD
    options: str = ""
    file: str = "prompts.jsonl"
    output: str = "out.h5"
    # Where the texts differ: those of one rank.
    alone: tuple[str, ...] | None = None


@pytest.fixture(scope="module")
def models(mpirun, tmp_path_factory):
    """Good input is answered, and compiles the kernels: the seconds that the others may take are not for that."""
    folder = tmp_path_factory.mktemp("models")
    made = Models(folder)
    (folder / "prompts.jsonl").write_bytes(GOOD)
    for weights in ("f32", "q8", "q3_5"):
        job = mpirun(1, ["-m", "llama_hpc", "run", made["small"], "--prompts", "prompts.jsonl", "--output", f"{weights}.h5",
                         "--weights", weights], timeout=300, cwd=folder)  # fmt: skip
        assert job.returncode == 0 and not ours(job), job.stderr
        assert (folder / f"{weights}.h5").stat().st_size
    return made


def bad(*texts, **more):
    return Case(1, texts, **more)


def usage(*texts, **more):
    return Case(2, texts, **more)


def entry(text):
    """A good prompt, then one with these fields."""
    return GOOD + b'{"id": "b", ' + text.encode() + b"}\n"


CHECKPOINTS = {
    "missing folder": usage("models", "absent", "does not exist", "smollm2", model="absent"),
    "missing GGUF file": usage("absent_gguf.gguf", "does not exist", model="absent_gguf"),
    "no config.json": bad("no_config", "no config.json", model="no_config"),
    "config.json damaged": bad("config.json", "not valid JSON", model="config_not_json"),
    "no weights": bad("no_weights", "neither model.safetensors nor", model="no_weights"),
    "missing shard": bad("1 of 3 shards are missing", "model-00002-of-00003.safetensors", model="no_shard"),
    "truncated safetensors": bad("model.safetensors: truncated: tensor", "ends at byte", model="truncated"),
    "truncated GGUF": bad("gguf_truncated.gguf", "truncated", model="gguf_truncated"),
    "truncated GGUF header": bad("header goes beyond the file's 1000 bytes", model="gguf_truncated_header"),
    "not GGUF": bad("not a GGUF file", model="gguf_not_one"),
    "unknown architecture": bad("FalconForCausalLM is not supported", "LlamaForCausalLM", model="unknown_architecture"),
    "unknown GGUF architecture": bad("gptjx is not supported", "llama", model="gguf_unknown_architecture"),
    "unknown tensor type": bad("has the type F64, supported are F32, F16, BF16", model="unknown_type"),
    "unknown GGUF tensor type": bad("blk.1.ffn_gate.weight has the type number 99", model="gguf_unknown_type"),
    "contradicting shape": bad("mlp.gate_proj.weight has shape [128, 64], expected [160, 64]", model="contradiction"),
    "contradicting GGUF shape": bad("has shape [128, 64], expected [160, 64]", model="gguf_contradiction"),
}

PROMPTS = {
    "missing file": usage("cannot read nowhere.jsonl: No such file", options="--prompts nowhere.jsonl"),
    "no prompts": usage("the file holds no prompts", prompts=b"\n\n"),
    "invalid JSON": usage("prompts.jsonl, line 2: invalid JSON", "column", prompts=GOOD + b'{"id": "b", "token_ids": [1\n'),
    "not UTF-8": usage("line 2: not UTF-8 (byte 0xff)", prompts=entry('"prompt": "hi"').replace(b"hi", b"h\xff")),
    "text not UTF-8": usage("line 2: not UTF-8 (byte 0xe9)", prompts=b"one\ncaf\xe9\n", file="prompts.txt"),
    "damaged HDF5": usage("prompts.h5: not an HDF5 file", file="prompts.h5"),
    "duplicate id": usage("line 2: id 'a' is already used by line 1", prompts=GOOD + GOOD),
    "id is a number": usage("line 2: id must be a string, got 7", prompts=entry('"id": 7, "token_ids": [1]')),
    "empty prompt": usage("line 2: the prompt is empty", prompts=entry('"prompt": ""')),
    "empty token ids": usage("line 2: token_ids must be a list of at least one", prompts=entry('"token_ids": []')),
    "negative token id": usage("line 2: token_ids[1] must be an integer from 0", "got -1", prompts=entry('"token_ids": [1, -1]')),
    "token id outside": usage("'b': token id 320 at position 1 is outside the vocabulary (0 to 319)",
                              prompts=entry('"token_ids": [1, 320]')),
    "stop token outside": usage("'b': stop token id 320 is outside the vocabulary (0 to 319)",
                                prompts=entry('"token_ids": [1], "stop_token_ids": [2, 320]')),
    "negative temperature": usage("line 2: temperature must be", "got -1", prompts=entry('"token_ids": [1], "temperature": -1')),
    "NaN temperature": usage("line 2: temperature must be", "got nan", prompts=entry('"token_ids": [1], "temperature": NaN')),
    "top-p of 0": usage("line 2: top_p must be", "at most 1, got 0", prompts=entry('"token_ids": [1], "top_p": 0')),
    "negative top-k": usage("line 2: top_k must be", "got -5", prompts=entry('"token_ids": [1], "sampling": {"top_k": -5}')),
    "min-p above 1": usage("line 2: min_p must be a number from 0 to 1, got 2", prompts=entry('"token_ids": [1], "min_p": 2')),
    "repetition penalty of 0": usage("line 2: repetition_penalty must be a number from 0.01 to 100, got 0",
                                     prompts=entry('"token_ids": [1], "repetition_penalty": 0')),
    "greedy samples": usage("line 2: n must be 1 at temperature 0", "got 3", prompts=entry('"token_ids": [1], "n": 3')),
    "min above max tokens": usage("line 2: min_tokens must be at most max_tokens, 5, got 6",
                                  prompts=entry('"token_ids": [1], "max_tokens": 5, "min_tokens": 6')),
    "biased token outside": usage("'b': logit_bias token id 320 is outside the vocabulary (0 to 319)",
                                  prompts=entry('"token_ids": [1], "logit_bias": {"320": 1}')),
    "setting of another engine": usage("line 2: key 'max_length' is not a setting here: use max_tokens",
                                       prompts=entry('"token_ids": [1], "max_length": 7')),
    "negative arrival": usage("line 2: arrival_s must be a number of seconds, 0 or more, got -1",
                              prompts=entry('"token_ids": [1], "arrival_s": -1')),
    "unsorted arrivals": usage("id 'b': arrival_s 2 is before that of the prompt above, 3: sort the prompts",
                               prompts=b'{"token_ids": [1], "arrival_s": 3}\n{"id": "b", "token_ids": [1], "arrival_s": 2}\n'),
    "some arrivals": usage("id 'b': arrival_s is given for some prompts only", prompts=entry('"token_ids": [1], "arrival_s": 2')),
    "longer than the context": usage("'b': the prompt has 256 tokens, but a context of 256 holds at most 255",
                                     prompts=entry('"token_ids": [' + ", ".join(["7"] * 256) + "]")),
    "longer than allowed": usage("'a': the prompt has 3 tokens, but a context of 3 holds at most 2", options="--max-seq-len 3"),
    "text without tokenizer": usage("'b': the model has no tokenizer", prompts=entry('"prompt": "hello"')),
    "stop without tokenizer": usage("'b': the model has no tokenizer", "stop", prompts=entry('"token_ids": [1], "stop": "x"')),
    "messages without template": usage("'b'", "chat template", model="text",
                                       prompts=entry('"messages": [{"role": "user", "content": "hello"}]')),
}

OPTIONS = {
    "unknown option": usage("unrecognized arguments: --wings", options="--wings"),
    "no number": usage("--temperature must be a number, got 'hot'", options="--temperature hot"),
    "negative temperature": usage("temperature must be", "got -0.5", options="--temperature=-0.5"),
    "NaN temperature": usage("temperature must be", "got nan", options="--temperature nan"),
    "negative top-k": usage("top_k must be", "got -1", options="--top-k -1"),
    "max tokens of 0": usage("max_tokens must be", "got 0", options="--max-tokens 0"),
    "bias without id": usage("--logit-bias must be ID=BIAS, such as 42=-1.5, got '7'", options="--logit-bias 7"),
    "samples of no number": usage("--n must be a whole number, got 'two'", options="--n two"),
    "too many logprobs": usage("logprobs must be an integer from 0 to 20, got 21", options="--logprobs 21"),
    "stop without tokenizer": usage("'a': the model has no tokenizer", "stop", options="--stop x"),
    "no size": usage("--kv-memory: must be a number of bytes, or with a unit such as 512M or 4G, got 'lots'",
                     options="--kv-memory lots"),
    "a cache for nobody": usage("the KV cache holds 0 tokens, but request 'a' needs 7 (a prompt of 3 and up to 4 more): raise "
                                "--kv-memory, or lower", options="--kv-memory 1K"),
    "a cache for nobody but in q8": usage("the KV cache holds 0 tokens", "raise --kv-memory, give --kv-cache q8, or lower",
                                          options="--kv-memory 8K"),
    "a budget of nothing": usage("--token-budget: must be a whole number of at least 1, got '0'", options="--token-budget 0"),
    "no group": usage("--context-parallel: must be a whole number of at least 1, got '0'", options="--context-parallel 0"),
    "no grid of such groups": usage("no grid of {n} ranks", "--context-parallel 2", options="--context-parallel 2"),
    "unknown reduce mode": usage("--reduce: invalid choice: 'magic'", options="--reduce magic"),
    "no target": usage("--slo: 'fast' is no target: give METRIC.pN=SECONDS", options="--slo fast"),
    "targets without arrivals": usage("--slo sets targets for requests that arrive over time: give each prompt its arrival_s",
                                      options="--slo ttft.p99=1"),
    "trace in a missing folder": bad("output folder", "nowhere does not exist", options="--trace nowhere/trace.json"),
    "beyond the context": usage("--max-seq-len 257", "context of 256", options="--max-seq-len 257"),
    "dynamic RoPE": usage("203 positions", "dynamic RoPE", "--max-seq-len 128", model="two_layers_dynamic",
                          prompts=b'{"token_ids": [1, 2, 3], "max_tokens": 200}\n'),
}

GRIDS = {
    "malformed": usage("--grid '2x2'", "DxPxT", options="--grid 2x2"),
    "zero": usage("pipeline dimension is 0", options="--grid 1x0x1"),
    "other size": usage("grid 2x2x2 needs 2 x 2 x 2 = 8 ranks, but the job has {n}", options="--grid 2x2x2"),
    "too many tensor ranks": usage("tensor dimension is 3", "2 query heads", "at most 2", model="two_heads",
                                   options="--grid 1x1x3", alone=("= 3 ranks, but the job has 1",)),
    "too many stages": usage("pipeline dimension is 3", "2 layers", "at most 2", model="two_layers_dynamic",
                             options="--grid 1x3x1", alone=("= 3 ranks, but the job has 1",)),
}

OUTPUTS = {
    "exists": usage("prompts.jsonl exists", "--overwrite", output="prompts.jsonl"),
    "folder": usage("is a folder", output="."),
    "missing folder": bad("output folder", "nowhere does not exist", output="nowhere/out.h5"),
    "folder is a file": bad("prompts.jsonl", "not a folder", output="prompts.jsonl/out.h5"),
    "not writable": bad("cannot write to the output folder /sys", output="/sys/out.h5"),
}

NUMBERS = {
    f"{name} {weights}": bad(*texts, model=model, options=f"--weights {weights} --grid {grid}")
    for name, model, grid, formats, texts in [
        ("NaN in gate", "nan_column_parallel", "1x1x{n}", "f32 q3_5", ("NaN", "layers.1.gate, row 2046")),
        ("NaN in down", "nan_row_parallel", "1x1x{n}", "f32 q8 q3_5", ("NaN", "layers.1.down, row 94")),
        ("NaN in o", "nan_attention_output", "1x1x{n}", "q8", ("NaN", "layers.1.o, row 95")),
        ("NaN in the embedding", "nan_embedding", "1x{n}x1", "q8", ("NaN", "embedding, row 63")),
        ("NaN in a norm", "nan_norm", "1x{n}x1", "f32", ("NaN", "layers.2.attention_norm")),
        ("infinite head", "infinite_head", "{n}x1x1", "q8", ("infinity", "head, row 63")),
        ("out of range", "large", "1x1x{n}", "f32 q8 q3_5", ("layer 1, v", "range of exact sums", "--weights")),
        ("out of range in a stage", "large", "1x{n}x1", "q8", ("layer 1, v", "range of exact sums")),
        ("out of range in a replica", "large", "{n}x1x1", "q8", ("layer 1, v", "range of exact sums")),
        ("beyond the format", "huge", "1x1x{n}", "q8 q3_5", ("layers.1.v", "1e+30", "--weights")),
    ]
    for weights in formats.split()
}

CASES = {f"{group}: {name}": case for group, cases in [
    ("checkpoint", CHECKPOINTS), ("prompts", PROMPTS), ("options", OPTIONS), ("grid", GRIDS), ("output", OUTPUTS),
    ("numbers", NUMBERS)] for name, case in cases.items()}  # fmt: skip


# These are jobs of their own: one of each kind, and those that one rank alone notices.
ALONE = ("checkpoint: truncated safetensors", "prompts: duplicate id", "options: unknown option", "options: no target",
         "grid: other size", "output: exists", "numbers: NaN in o q8", "numbers: out of range in a stage q8",
         "numbers: out of range in a replica q8")

# What befalls one rank (the last, but for the result file, which the first one writes), and what the line says.
FAULTS = {
    "cannot read": ("model.safetensors: Input/output error while loading the weights on rank {rank} (",),
    "memory": ("out of memory while making the KV cache on rank {rank} (",),
    "bug": ("internal error on rank {rank} (", "ValueError: an odd value (traceback in "),
    "disk full": ("cannot write the results to out.h5: No space left on device; all answers are kept in",
                  "make room or mend the file system, then --resume"),
}


def ours(job):
    return [line for line in (job.stdout + "\n" + job.stderr).splitlines() if "llama-hpc:" in line]


def contents(folder):
    """Files and their bytes, but for tracebacks that a message points to."""
    return {path.name: path.read_bytes() if path.is_file() else b"" for path in folder.iterdir()
            if not path.name.startswith("llama-hpc-error-")}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_one_line_and_nothing_left(mpirun, command, models, tmp_path, name, n):
    case = CASES[name]
    (tmp_path / case.file).write_bytes(case.prompts)
    arguments = ["run", models[case.model], "--prompts", case.file, "--output", case.output, *case.options.split()]
    arguments = [str(argument).replace("{n}", str(n)) for argument in arguments]
    if name in ALONE:
        job = mpirun(n, ["-m", "llama_hpc", *arguments], timeout=LIMIT, cwd=tmp_path)
    else:
        job = command(n, arguments, timeout=LIMIT, cwd=tmp_path)
    lines = ours(job)
    assert len(lines) == 1 and lines[0].startswith("llama-hpc: error: "), job.stdout + job.stderr
    for text in case.alone if n == 1 and case.alone else case.texts:
        assert text.replace("{n}", str(n)) in lines[0]
    # Ranks that MPI has not joined are killed when the first leaves; of their codes mpiexec of MPICH may tell the last one.
    assert job.returncode == case.code or (mpi_jobs.MPI == "mpich" and name in ALONE and n > 1 and job.returncode == 9)
    assert "Traceback" not in job.stderr
    assert contents(tmp_path) == {case.file: case.prompts}


def run_with_fault(mpirun, models, folder, fault, n):
    """Answers a prompt that takes many steps, while a fault befalls one rank."""
    rank = 0 if fault == "disk full" else n - 1
    prompts = b'{"token_ids": [1, 2, 3], "max_tokens": 250}\n'
    (folder / "prompts.jsonl").write_bytes(prompts)
    program = Path(__file__).with_name("failing_rank.py")
    job = mpirun(n, [program, fault, rank, "run", models["small"], "--prompts", "prompts.jsonl", "--output", "out.h5",
                     "--grid", f"1x1x{n}"], timeout=LIMIT, cwd=folder)  # fmt: skip
    assert "Traceback" not in job.stdout + job.stderr
    # What a job that was under way has kept for --resume.
    assert contents(folder).keys() - {"out.h5.progress"} == {"prompts.jsonl"}
    return job, rank


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("fault", FAULTS)
def test_one_rank_that_fails_ends_all(mpirun, models, tmp_path, fault, n):
    job, rank = run_with_fault(mpirun, models, tmp_path, fault, n)
    (line,) = ours(job)
    assert line.startswith("llama-hpc: ")
    for text in FAULTS[fault]:
        assert text.replace("{rank}", str(rank)) in line
    assert job.returncode == 1


@pytest.mark.parametrize("n", [1, 3])
# MPICH's mpiexec leaves it to the ranks what they do about its signals: they stop in order.
@pytest.mark.parametrize("fault", ["killed", "interrupted twice", pytest.param("interrupted mpirun", marks=pytest.mark.openmpi),
                                   pytest.param("terminated mpirun", marks=pytest.mark.openmpi)])
def test_a_kill_or_a_second_interrupt_ends_all_and_leaves_no_file(mpirun, models, tmp_path, fault, n):
    job, _ = run_with_fault(mpirun, models, tmp_path, fault, n)
    assert job.returncode != 0


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("arguments", [["fly"], ["run"], ["run", "small", "--wings"]], ids=" ".join)
def test_unknown_commands_and_options(mpirun, tmp_path, arguments, n):
    job = mpirun(n, ["-m", "llama_hpc", *arguments], timeout=LIMIT, cwd=tmp_path)
    (line,) = ours(job)
    assert line.startswith("llama-hpc: error: ") and "--help`)" in line
    assert job.returncode == 2
    assert contents(tmp_path) == {}
