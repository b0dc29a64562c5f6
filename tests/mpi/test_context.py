"""Context parallelism: the same bits with the cache's positions dealt out to tensor ranks, and less cache on each of them."""

import json

import numpy as np
import pytest
from layouts import RANDOM, Layout, Model, Run, perform_all
from reference_models import write_random_llama

from llama_hpc.results import read_scores

LAYERS, LENGTHS = 2, (700, 1300, 20, 300, 260, 900)      # of the prompts; blocks are of 256 positions
WINDOWED = "windowed"
# Bytes of a cache on a rank of 1x1x2: 1,340 positions on pages of 16, with two KV heads of 8 + 16 float16 numbers in each layer,
# are more; as part of a cache, with three KV heads, they are less.
TIGHT = 84 * 16 * 2 * (8 + 16) * 2 * LAYERS - 1

LAYOUTS = (
    *(Layout(grid, options=f"--context-parallel {context}") for grid, context in (
        ("1x1x2", 2), ("1x1x3", 3), ("1x1x4", 2), ("1x1x4", 4), ("1x1x6", 3), ("1x2x2", 2), ("2x1x2", 2))),
    *(Layout("1x1x2", options=f"--context-parallel 2 {more}") for more in (
        "--reduce mpi", "--reduce one-sided", "--sequence-parallel 1", "--no-prefix-sharing", "--max-seqs 1",
        "--prefill-micro-batch 100 --max-seqs 3", f"--kv-memory {TIGHT}", f"--kv-memory {TIGHT} --no-prefix-sharing")),
    Layout("1x1x4", options="--context-parallel 2 --reduce mpi"),
    Layout("1x1x3", options="--context-parallel 3 --reduce one-sided"),
    Layout("1x1x4", options="--context-parallel 4 --sequence-parallel 1 --reduce mpi"),
    Layout("1x1x2", threads=2, options="--context-parallel 2"), Layout("1x1x2", mpi="mpich", options="--context-parallel 2"),
)  # fmt: skip
INT8 = Layout(options="--kv-cache q8"), *(
    Layout(grid, options=f"--context-parallel {context} --kv-cache q8") for grid, context in (("1x1x2", 2), ("1x1x3", 3)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same weights without and with a sliding window, and long prompts of which some begin alike."""
    folder = tmp_path_factory.mktemp("context")
    rng = np.random.default_rng(5)
    common = rng.integers(0, 515, 1300)
    prompts = [[*common[: 290 * (i % 3)], *rng.integers(0, 515, 1300)][:n] for i, n in enumerate(LENGTHS)]
    (folder / "prompts.jsonl").write_text("".join(
        json.dumps({"token_ids": [int(token) for token in ids], "max_tokens": 40, "ignore_eos": True, "n": 1 + i % 2,
                    "temperature": 0.8 * (i % 2)}) + "\n" for i, ids in enumerate(prompts)))
    found = {}
    for name in ("plain", WINDOWED):
        path = write_random_llama(folder / name, **RANDOM | {"layers": LAYERS})
        found[name] = Model(name, str(path), folder / "prompts.jsonl")
    config = folder / WINDOWED / "config.json"
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 300}
    config.write_text(json.dumps(json.loads(config.read_text()) | mistral))
    return found


@pytest.fixture(scope="module")
def outcomes(command, models, tmp_path_factory):
    """Of all runs."""
    runs = [Run(models["plain"], weights, layout) for weights, layouts in (
        ("q8", (Layout(), *LAYOUTS, *INT8)), ("f32", (Layout(), LAYOUTS[0]))) for layout in layouts]
    runs += [Run(models[WINDOWED], "q8", layout) for layout in (Layout(), *LAYOUTS[:4])]
    return perform_all(command, runs, tmp_path_factory.mktemp("runs"))


def context_of(layout):
    return int(layout.options.partition("--context-parallel ")[2].partition(" ")[0] or 1)


def check(outcomes, model, weights, layout, alone):
    found, expected = (outcomes[Run(model, weights, each)] for each in (layout, alone))
    assert found.digest == expected.digest and found.hashes == expected.hashes
    assert not expected.provenance["rank_table"][0]["context_joins"]
    stages = int(layout.grid.split("x")[1])
    for rank in found.provenance["rank_table"]:
        assert rank["context_parallel"] == context_of(layout)
        # In each layer queries, maxima and sums.
        assert rank["context_joins"] == 3 * LAYERS // stages * rank["steps"] > 0
        assert rank["context_bytes"] > 0 and rank["context_seconds"] > 0
    return found.provenance["rank_table"]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_bits_of_one_rank(models, outcomes, layout):
    table = check(outcomes, models["plain"], "q8", layout, Layout())
    asked = layout.options.partition("--reduce ")[2].partition(" ")[0] or "shared"
    assert {rank["reduce"] for rank in table} == {asked}
    if "--kv-memory" in layout.options:
        assert all(rank["cache_bytes"] <= TIGHT and rank["pages_used"] > 0.9 * rank["pages"] for rank in table)
        assert "--no-prefix-sharing" not in layout.options or all(rank["setbacks"] > 0 for rank in table)
    if "--sequence-parallel" in layout.options:
        assert all(rank["sequence_parallel_steps"] > 0 for rank in table)
    assert all((rank["shared_tokens"] > 0) != ("--no-prefix-sharing" in layout.options) for rank in table)


@pytest.mark.parametrize("layout", INT8[1:], ids=str)
def test_with_an_int8_cache(models, outcomes, layout):
    check(outcomes, models["plain"], "q8", layout, INT8[0])


@pytest.mark.parametrize("layout", LAYOUTS[:4], ids=str)
def test_with_a_sliding_window(models, outcomes, layout):
    check(outcomes, models[WINDOWED], "q8", layout, Layout())
    digests = {outcomes[Run(models[name], "q8", layout)].digest for name in models}
    assert len(digests) == 2


def test_with_a_float32_cache(models, outcomes):
    check(outcomes, models["plain"], "f32", LAYOUTS[0], Layout())


def run(command, model, grid, options, output):
    return command(int(grid[-1]), ["run", model.path, "--prompts", model.prompts, "--output", output, "--grid", grid,
                                   *options.split()])


def test_a_prompt_that_one_rank_cannot_hold(command, models, outcomes, tmp_path):
    """What ``TIGHT`` means: tensor ranks that keep all positions have no room for it."""
    job = run(command, models["plain"], "1x1x2", f"--kv-memory {TIGHT}", tmp_path / "out.h5")
    assert job.returncode == 2 and "the KV cache holds 1328 tokens" in job.stderr and "--kv-memory" in job.stderr
    # 100 KiB a rank: 22 pages with three KV heads, so a block on each of two ranks, and 6 pages of a third block.
    job = run(command, models["plain"], "1x1x2", "--kv-memory 100K --context-parallel 2", tmp_path / "out.h5")
    assert job.returncode == 2 and f"the KV cache holds {2 * 256 + 6 * 16} tokens" in job.stderr


@pytest.mark.parametrize(("grid", "context", "said"), [
    ("1x1x3", 2, "--context-parallel is 2, which does not divide 3 tensor ranks; use --context-parallel 1, or a multiple of 2"),
    ("1x2x1", 2, "--context-parallel is 2, which does not divide 1 tensor ranks"),
    ("auto", 2, "no grid of 3 ranks has tensor ranks in groups of --context-parallel 2"),
])  # fmt: skip
def test_a_group_that_does_not_fit_the_grid(command, models, tmp_path, grid, context, said):
    model, ranks = models["plain"], 2 if grid == "1x2x1" else 3
    job = command(ranks, ["run", model.path, "--prompts", model.prompts, "--output", tmp_path / "out.h5", "--grid", grid,
                          "--context-parallel", context])
    assert job.returncode == 2 and said in job.stderr and job.stderr.count("llama-hpc: error: ") == 1
    assert not (tmp_path / "out.h5").exists()


def test_scores(command, models, tmp_path):
    """Of windows of several blocks."""
    model, texts = models["plain"], tmp_path / "texts.jsonl"
    rng = np.random.default_rng(6)
    texts.write_text("".join(json.dumps({"token_ids": rng.integers(0, 515, n).tolist()}) + "\n" for n in (1500, 30, 800, 3)))
    digests = set()
    for ranks, options in ((1, ""), (2, "--context-parallel 2"), (3, "--context-parallel 3"), (4, "--context-parallel 2")):
        job = command(ranks, ["score", model.path, "--texts", texts, "--output", tmp_path / f"{ranks}.h5", "--window", 1000,
                              "--grid", f"1x1x{ranks}", *options.split()])
        assert job.returncode == 0, job.stderr
        with read_scores(tmp_path / f"{ranks}.h5") as scores:
            digests.add(scores.verify())
            assert all((rank["context_joins"] > 0) == (ranks > 1) for rank in scores.provenance["rank_table"])
    assert len(digests) == 1
