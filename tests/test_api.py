"""The names of the package: a model from Python on one rank, layouts, and functions on arrays."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from local_model import LocalModel
from reference_models import write_checkpoint

import llama_hpc
from llama_hpc import LLM, ParallelConfig, SamplingParams, Transformer
from llama_hpc.errors import NumericsError, UsageError
from llama_hpc.results import digest, read_results, read_scores

NAMES = """
    ColumnParallelLinear Grid GridShape InferenceState LLM NumaHint ParallelAttention ParallelConfig ParallelLayer ParallelMLP
    PipelineConfig PipelineStage PipelineState Pool RowParallelLinear SamplingParams TensorParallelConfig
    TensorParallelStrategy Transformer WorkDistribution WorkStealingStats all_reduce_sum attention column_parallel_linear matmul
    matvec mlp_tensor_parallel num_cpus pack_weights row_parallel_linear
"""
WORDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3, "world": 4, "user": 5}
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
CHAT = [{"role": "user", "content": "hello world"}]
GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)


def bits(x):
    return np.ascontiguousarray(x).view(np.uint32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_checkpoint("llama_odd", tmp_path_factory.mktemp("api") / "model")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def llm(model):
    with LLM(model, threads=2) as llm:
        yield llm


@pytest.fixture(scope="module")
def local(model):
    return LocalModel(model, "q8")


def test_importing_the_package_starts_nothing():
    code = """
import sys, llama_hpc
from llama_hpc import LLM, ParallelConfig, SamplingParams
assert not {"mpi4py.MPI", "numba"} & {*sys.modules}
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_all_names_are_there_and_documented():
    assert NAMES.split() == llama_hpc.__all__
    for name in NAMES.split():
        assert getattr(llama_hpc, name).__doc__, name
        assert name in dir(llama_hpc)
    with pytest.raises(AttributeError, match="no attribute 'LLm'"):
        _ = llama_hpc.LLm


PROMPTS = [("prompt", "hello world"), ("messages", CHAT), ("token_ids", [3, 4, 4]), ("token_ids", [7])]
SETTINGS = [{"ignore_eos": True}, {"temperature": 1.1, "seed": 3, "n": 3}, {"logprobs": 2, "repetition_penalty": 1.3}, {}]


def test_answers_have_the_digest_of_the_command_line(command, llm, model, tmp_path):
    lines = [{kind: prompt, "max_tokens": 9, **settings} for (kind, prompt), settings in zip(PROMPTS, SETTINGS, strict=True)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = command(1, ["run", model, "--prompts", "p.jsonl", "--output", "r.h5"], cwd=tmp_path)
    assert job.returncode == 0, job.stderr
    params = [SamplingParams(max_tokens=9, **settings) for settings in SETTINGS]
    with read_results(tmp_path / "r.h5") as results:
        expected = list(results.outputs())
        # Again on the same model, after other calls.
        for _ in range(3):
            outputs = llm.generate([prompt for _, prompt in PROMPTS], params)
            assert digest(["0", "1", "2", "3"], outputs) == results.digest
            llm.generate([list(range(3, 60))], SamplingParams(max_tokens=40))
        for output, other in zip(outputs, expected, strict=True):
            assert (output.request, output.sample, output.text, output.finish_reason) == (
                other.request, other.sample, other.text, other.finish_reason)
            assert output.top_tokens.tolist() == other.top_tokens.tolist()
    assert [output.request for output in outputs] == [0, 1, 1, 1, 2, 3]


def test_prompts_of_every_kind_and_one_setting_for_all(llm):
    a, b, c = llm.generate(["hello world", np.array([3, 4]), (3, 4)], GREEDY)
    assert a.tokens.tolist() == b.tokens.tolist() == c.tokens.tolist() and len(a.tokens) == len(a.logprobs) == 6
    assert a.tokens.dtype == np.int32 and a.logprobs.dtype == np.float32 and a.finish_reason == "length"
    assert llm.generate([]) == [] and len(llm.generate([[3]])) == 1


@pytest.mark.parametrize(("prompts", "params", "message"), [
    ("hello", GREEDY, "prompts must be a list"), (["a", ""], GREEDY, "prompt 1: the prompt is empty"),
    ([[]], GREEDY, "prompt 0: token_ids must be a list of at least one"), ([3], GREEDY, "prompt 0: token_ids must be"),
    ([[515]], GREEDY, "request '0': token id 515"), ([[3]], [GREEDY, GREEDY], "1 prompts, but 2 SamplingParams"),
    ([[3]], [{"n": 1}], "prompt 0: its settings must be SamplingParams"), ([[3] * 300], GREEDY, "300 tokens")])
def test_bad_prompts(llm, prompts, params, message):
    with pytest.raises(UsageError, match=message):
        llm.generate(prompts, params)
    assert len(llm.generate([[3]], GREEDY)) == 1


@pytest.mark.parametrize(("options", "message"), [
    ({"weights": "q5"}, "weights must be one of"), ({"reduce": "x"}, "reduce must be one of"), ({"threads": 0}, "at least 1"),
    ({"parallel": "1x1x1"}, "a ParallelConfig"), ({"parallel": ParallelConfig(tensor=2)}, "start 2 ranks"),
    ({"max_seqs": 0}, "max_seqs"), ({"max_seq_len": 999}, "longer than the model's context"),
    ({"kv_memory": 1.5}, "kv_memory must be"),
    ({"max_seq": 3}, "no option 'max_seq'"), ({"max_seq_len": 1}, "at least 2")])
def test_bad_settings(model, options, message):
    with pytest.raises(UsageError, match=message):
        LLM(model, **options)


def test_logits_are_those_of_the_model(llm, local):
    ids = [3, 500, 17, *range(200)]
    logits = llm.forward(ids)
    assert logits.dtype == np.float32 and np.array_equal(bits(logits), bits(local.forward(ids)))
    assert np.array_equal(bits(llm.forward(ids[:5])), bits(logits[:5]))


def test_states_go_on_step_by_step_beside_other_calls(llm, local):
    ids = np.arange(30) * 7 % 515
    expected, other = local.forward(ids.tolist()), local.forward([4, 5])
    first, second = llm.state(40), llm.state()
    found = [first.forward(ids[:17])]
    assert np.array_equal(bits(second.forward([4, 5])), bits(other))
    llm.generate([[3, 4]], GREEDY)
    llm.forward([9, 9, 9])
    found += [first.forward([token]) for token in ids[17:]]
    assert first.length == 30 and np.array_equal(bits(np.concatenate(found)), bits(expected))
    with pytest.raises(UsageError, match="30 of 40 tokens, 11 more do not fit"):
        first.forward([1] * 11)
    first.rewind(20)
    assert np.array_equal(bits(first.forward(ids[20:])), bits(expected[20:]))
    first.close()
    second.close()
    with pytest.raises(UsageError, match="closed"):
        first.forward([1])


def test_scores_are_those_of_the_command_line(command, llm, model, tmp_path):
    texts = ["hello world " * 20, [3, 4, 5, 9, 300], [7, 8]]
    lines = [{"text": text} if isinstance(text, str) else {"token_ids": text} for text in texts]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = command(1, ["score", model, "--texts", "t.jsonl", "--output", "s.h5", "--window", 12], cwd=tmp_path)
    assert job.returncode == 0, job.stderr
    found = llm.score(texts, window=12)
    with read_scores(tmp_path / "s.h5") as scores:
        for own, other in zip(found, scores.documents(), strict=True):
            assert own.tokens.tolist() == other.tokens.tolist() and np.array_equal(bits(own.logprobs), bits(other.logprobs))
            assert own.perplexity == other.perplexity > 1
    assert llm.score([]) == []


def test_a_model_can_be_used_after_a_numeric_fault(model):
    with Transformer.load(model, weights="f32", threads=1) as transformer:
        head = transformer.session.held.head.weights.data
        kept = head.copy()
        before = transformer.forward([3, 4])
        head[:] = 1e30
        with pytest.raises(NumericsError, match="head"):
            transformer.forward([3, 4])
        head[:] = kept
        assert np.array_equal(bits(transformer.forward([3, 4])), bits(before))
    with pytest.raises(UsageError, match="closed"):
        transformer.forward([3, 4])


SCRIPT = """
import sys
from llama_hpc import LLM
from llama_hpc.errors import CheckpointError
llm = LLM({model!r}, threads=1)
if llm.grid.world.rank == 1:
    {failure}
llm.generate([[3, 4]])
"""


@pytest.mark.parametrize(("failure", "expected"), [
    ("raise CheckpointError('no such thing')", "llama-hpc: error: no such thing [rank 1"), ("[][1]", "IndexError: list index")])
def test_an_exception_on_one_rank_ends_the_job(mpirun, model, failure, expected):
    job = mpirun(3, ["-c", SCRIPT.format(model=str(model), failure=failure)], timeout=90)
    assert job.returncode != 0 and expected in job.stderr


def test_an_error_of_all_ranks_can_be_caught(mpirun, model):
    script = SCRIPT.format(model=str(model), failure="pass").replace("llm.generate([[3, 4]])", """
try:
    llm.generate([[9999]])
except Exception as error:
    print("caught", error)
print(len(llm.generate([[3, 4]])[0].tokens) > 0)""")
    job = mpirun(3, ["-c", script], timeout=90)
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("outside the vocabulary") == job.stdout.count("True") == 3
