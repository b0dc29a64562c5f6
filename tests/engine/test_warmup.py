"""Compiled code: ``llama-hpc warmup`` compiles all that a run needs, and whoever comes after it on the node compiles nothing."""

import json
import shutil

import pytest
from reference_models import prompt, write_checkpoint

from llama_hpc.runtime import numba_setup

CASE = "llama_odd"
FORMATS = ("q3_5", "q4", "q8", "f16", "f32")

# Runs command lines, then says what this process compiled and loaded, how many passes Numba's own compiler made, and CPU seconds.
REPORT = """
import json, os, sys, time
from llama_hpc.runtime import numba_setup
numba_setup.configure(int(os.environ["OMP_NUM_THREADS"]))
from numba.core import event
passes = event.RecordingListener()
event.register("numba:run_pass", passes)
from llama_hpc.cli.main import main
for words in json.loads(sys.argv[1]):
    code = main(words)
    if code:
        sys.exit(code)
from llama_hpc.kernels.cpu.operation import compiled, loaded
print(json.dumps([compiled(), loaded(), len(passes.buffer), time.process_time()]))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder for compiled code, empty at first. In the end it serves the tests that follow, if nobody has compiled theirs."""
    folder, usual = tmp_path_factory.mktemp("cache"), numba_setup.cache_folder()
    yield folder
    if usual and not any(usual.glob("*/products.*_product-*.nbi")):
        shutil.copytree(folder / usual.name, usual, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def report(mpirun, cache):
    """A function that runs command lines in one process a rank and returns what each rank, and the log, said."""
    def run(*lines, n=1, threads=1):
        words = json.dumps([[str(word) for word in line] for line in lines])
        env = {"NUMBA_CACHE_DIR": cache, "OMP_NUM_THREADS": threads, "LLAMA_HPC_KERNELS": None}
        job = mpirun(n, ["-c", REPORT, words], env=env, timeout=400)
        assert job.returncode == 0, job.stderr
        return [json.loads(line) for line in job.stdout.splitlines()], job.stderr

    return run


@pytest.fixture(scope="module")
def warm(report, cache):
    """What warming up for one format, then for all, said and did, and the products in the cache in between."""
    ((first,), said) = report(["warmup", "--weights", "q8"])
    products = {path.name.split("-")[0] for path in cache.rglob("products.*_product-*.nbi")}
    ((second,), again) = report(["warmup"])
    return first, said, products, second, again


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint that takes text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    folder = write_checkpoint(CASE, tmp_path_factory.mktemp("model") / "model")
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3, "world": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [{"prompt": "hello world"}, {"token_ids": prompt(CASE).tolist(), "temperature": 0.9, "top_k": 20, "top_p": 0.9}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_first_compiles_and_the_next_loads(warm):
    (compiled, loaded, passes, seconds), said, products, (more, found, _, further), again = warm
    assert compiled > 50 and loaded == 0 and passes > 0
    assert more > 0 and found > 0 and seconds + further < 150
    assert f" {compiled} functions compiled" in said and f" {more} functions compiled" in again
    assert products == {"products._product", "products.halves_product"}


def test_what_is_compiled_already_is_not_compiled_again(warm, report):
    ((compiled, loaded, passes, _),), said = report(["warmup"])
    assert (compiled, passes) == (0, 0) and loaded > 0 and " 0 functions compiled" in said


@pytest.mark.parametrize("threads", [1, 2])
def test_runs_and_quantising_compile_nothing(warm, report, model, prompts, tmp_path, threads):
    lines = []
    for weights in FORMATS:
        store, common = tmp_path / f"{weights}.model.h5", ["--prompts", prompts, "--max-tokens", 3]
        lines += [["run", model, "--output", tmp_path / f"{weights}.h5", "--weights", weights, *common, "--hash-weights"],
                  ["quantize", model, store, "--weights", weights],
                  ["run", store, "--output", tmp_path / f"{weights}.stored.h5", *common]]
    for kv_cache in ("f16", "q8"):
        lines.append(["run", model, "--output", tmp_path / f"{kv_cache}.cache.h5", "--weights", "f32", *common,
                      "--kv-cache", kv_cache])
    ((compiled, loaded, passes, _),), _ = report(*lines, threads=threads)
    assert (compiled, passes) == (0, 0) and loaded > 0


def test_ranks_that_split_layers_compile_nothing(warm, report, model, prompts, tmp_path):
    lines = [["run", model, "--prompts", prompts, "--output", tmp_path / f"{weights}-{context}.h5", "--weights", weights,
              "--max-tokens", 3, "--grid", "1x1x2", "--context-parallel", context]
             for weights in ("q3_5", "f32") for context in (1, 2)]
    ranks, _ = report(*lines, n=2)
    assert len(ranks) == 2
    assert all((compiled, passes) == (0, 0) and loaded > 0 for compiled, loaded, passes, _ in ranks)
