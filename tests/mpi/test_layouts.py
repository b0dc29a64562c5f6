"""The same bits on every layout: digests and packed weights of runs of the command line.

A covering subset of what ``make test-layouts`` (campaign.py) runs: a random model on every grid in every format, the others on
every grid in one of them, with other settings varied along the way, each in one format.
"""

import pytest
from layouts import ALONE, GRIDS, WEIGHTS, Layout, Run, fresh, make_models, perform, perform_all

# For the small models: the grids as they are, and for the smallest one or two settings more.
PLAIN = tuple(Layout(grid) for grid in GRIDS)
VARIED = (
    Layout(options="--max-seqs 1"), Layout(options="--max-seqs 3 --prefill-micro-batch 1"), Layout(options="--token-budget 7"),
    Layout(threads=2), Layout("1x1x2", threads=2), Layout("2x2x2", options="--max-seqs 3"), Layout("1x2x2", mpi="mpich"),
    Layout("2x2x2", options="--max-seqs 1 --prefill-micro-batch 7"), Layout(options="--no-prefix-sharing"),
    Layout("1x5x1", options="--micro-batches 7 --decode-micro-batch 2"), Layout("1x1x3", options="--reduce mpi"),
    Layout("1x1x3", options="--reduce one-sided"), Layout("1x1x5", options="--sequence-parallel 2"),
    Layout("2x2x2", options="--sequence-parallel 1"), Layout("1x1x3", options="--sequence-parallel 20 --reduce mpi"),
    Layout("1x1x2", options="--reduce mpi --overlap 1"), Layout("2x2x2", options="--reduce mpi --overlap 4 --max-seqs 3"),
    Layout("1x1x3", options="--reduce mpi --overlap 2 --token-budget 7"),
    Layout("1x1x2", options="--reduce one-sided --overlap 2"), Layout("1x1x2", options="--reduce mpi --overlap 2", mpi="mpich"),
)  # fmt: skip
SMALL = {"random": PLAIN + VARIED, "stories260K": PLAIN + VARIED, "stories15M": PLAIN}


def formats_of(name, layout):
    """The random model is run in every format on the plain grids, all else in one of them, in turn."""
    every = layout == ALONE or (name == "random" and layout in PLAIN)
    return WEIGHTS if every else (WEIGHTS[SMALL[name].index(layout) % len(WEIGHTS)],)


# For SmolLM2, where a run takes seconds.
SMOLLM2 = (
    ("q8", Layout("1x1x2", threads=2)), ("q3_5", Layout("1x1x3", options="--max-seqs 3")), ("f32", Layout("1x1x5")),
    ("q8", Layout("1x1x6", options="--token-budget 7")), ("f32", Layout("1x2x1", options="--max-seqs 3")),
    ("q8", Layout("1x5x1")), ("q8", Layout("2x1x1", options="--max-seqs 1")), ("f32", Layout("3x1x1", threads=2)),
    ("q8", Layout("1x2x2", mpi="mpich")),
    ("q8", Layout("2x2x1")), ("f32", Layout("2x1x3")), ("q3_5", Layout("2x2x2")),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def models(folder):
    return make_models(folder)


@pytest.fixture(scope="module")
def model(models):
    def find(name):
        return models.get(name) or pytest.skip(f"{name} is not here")
    return find


@pytest.fixture(scope="module")
def small_outcomes(command, models, folder):
    """Outcomes of all runs of the small models under one MPI."""
    known = {}
    def outcomes(mpi):
        if mpi not in known:
            runs = [Run(models[name], weights, layout) for name, layouts in SMALL.items() if name in models
                    for layout in layouts if layout.mpi == mpi for weights in formats_of(name, layout)]
            known[mpi] = perform_all(command, runs, folder)
        return known[mpi]
    return outcomes


@pytest.mark.parametrize(("name", "layout"), [(name, layout) for name, layouts in SMALL.items() for layout in layouts], ids=str)
def test_small_models(model, small_outcomes, name, layout):
    for weights in formats_of(name, layout):
        found = small_outcomes(layout.mpi)[Run(model(name), weights, layout)]
        expected = small_outcomes(ALONE.mpi)[Run(model(name), weights, ALONE)]
        assert found.digest == expected.digest, weights
        assert found.hashes == expected.hashes, weights
        check_mechanism(found, layout)


@pytest.fixture(scope="module")
def smollm2_alone(model, folder):
    """The outcome of one rank in a format."""
    known = {}
    def outcome(weights):
        if weights not in known:
            known[weights] = perform(fresh, Run(model("smollm2"), weights, ALONE), folder)
        return known[weights]
    return outcome


@pytest.mark.parametrize(("weights", "layout"), SMOLLM2, ids=str)
def test_smollm2(model, folder, smollm2_alone, weights, layout):
    expected = smollm2_alone(weights)
    found = perform(fresh, Run(model("smollm2"), weights, layout), folder)
    assert found.digest == expected.digest
    assert found.hashes == expected.hashes
    check_mechanism(found, layout)
    # The shared counter deals prompts to every replica: these runs take long enough for each to ask in time.
    assert all(answers_of_replicas(found))


def check_mechanism(outcome, layout):
    """The run was on the layout that it was asked for, and every part of it worked."""
    data, pipeline, tensor = map(int, layout.grid.split("x"))
    provenance = outcome.provenance
    assert provenance["grid"] == {"data": data, "pipeline": pipeline, "tensor": tensor}
    assert provenance["threads"] == layout.threads
    assert ("MPICH" in provenance["mpi_library"]) == (layout.mpi == "mpich")
    table = provenance["rank_table"]
    places = {(rank["data"], rank["stage"], rank["tensor"]) for rank in table}
    assert len(places) == len(table) == layout.ranks
    assert all((rank["reductions"] > 0) == (rank["reduce_seconds"] > 0) == (tensor > 1) for rank in table)
    spread = "--sequence-parallel" in layout.options and tensor > 1
    assert all((rank["sequence_parallel_steps"] > 0) == spread for rank in table if rank["steps"])
    halves = "--overlap" in layout.options
    assert not halves or all(rank["overlapped_steps"] > 0 and 0 < rank["overlapped_reductions"] < rank["reductions"]
                             for rank in table if rank["steps"])
    asked = layout.options.partition("--reduce ")[2].partition(" ")[0] or "shared"
    assert {rank["reduce"] for rank in table} == {asked if tensor > 1 else "mpi"}
    assert sum(rank["answers"] for rank in table) == sum(answers_of_replicas(outcome)) == 16


def answers_of_replicas(outcome):
    """How many prompts each replica answered, on its leader."""
    grid, table = outcome.provenance["grid"], outcome.provenance["rank_table"]
    return [rank["answers"] for rank in table if (rank["stage"], rank["tensor"]) == (grid["pipeline"] - 1, 0)]


def test_formats_differ(model, small_outcomes):
    """Equal digests mean something: other weights give others."""
    outcomes = [small_outcomes(ALONE.mpi)[Run(model("random"), weights, ALONE)] for weights in WEIGHTS]
    assert len({outcome.digest for outcome in outcomes}) == 3
    assert len(outcomes[0].hashes) == 5 * 7 + 2
