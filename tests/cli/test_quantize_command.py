"""llama-hpc quantize, and runs of what it made: one file on any number of ranks, the same answers as from the checkpoint."""

import json

import h5py
import pytest
from damaged_models import Models

from llama_hpc.cli.main import main
from llama_hpc.grid import GridShape
from llama_hpc.results import read_results

PROMPTS = [{"token_ids": [5, 17, 300, 2, 9], "max_tokens": 6}, {"token_ids": [8], "max_tokens": 9, "temperature": 1.0, "seed": 3}]
GRIDS = ("1x1x1", "1x1x2", "1x1x3", "1x3x1", "3x1x1")
LIMIT = 60                      # seconds that bad input may take, on a busy machine


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantize")
    (folder / "p.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    return folder


@pytest.fixture(scope="module")
def together(command, folder):
    def run(ranks, lines, **options):
        said = ""
        for line in lines:
            job = command(ranks, line, timeout=100, cwd=folder, **options)
            assert job.returncode == 0, job.stdout + job.stderr
            said += job.stderr
        return said
    return run


@pytest.fixture(scope="module")
def made(together, models):
    """Stores of one rank and of three (q3_5 on two threads as well), by file name, and what the commands said."""
    def commands(ranks, *options):
        return [["quantize", models["small"], f"{weights}-{ranks}.h5", "--weights", weights, *options]
                for weights in ("q3_5", "q8", "f32")]
    said = together(1, commands(1, "--threads", 1))
    together(3, commands(3, "--threads", 1))
    together(2, commands(2, "--threads", 2))
    return said


@pytest.mark.parametrize("weights", ["q3_5", "q8", "f32"])
def test_the_file_is_the_same_on_any_number_of_ranks_and_threads(made, folder, weights):
    expected = (folder / f"{weights}-1.h5").read_bytes()
    for ranks in (2, 3):
        assert (folder / f"{weights}-{ranks}.h5").read_bytes() == expected


def test_it_says_what_it_made(made, folder):
    line = next(line for line in made.splitlines() if "q3_5-1.h5" in line)
    with h5py.File(folder / "q3_5-1.h5") as file:
        assert f"{file.attrs['bits_per_weight'][1]:.2f} bits a weight all in" in line and file.attrs["content_sha256"] in line
    assert "quantising: 29/29 tensors (100 %)" in made
    assert not [path for path in folder.iterdir() if ".tmp" in path.name]


@pytest.fixture(scope="module")
def outcomes(together, made, models, folder):
    """Digest, hashes of weights and provenance by (weights, model, grid)."""
    def run(weights, model, grid):
        options = ["--weights", weights] if model == "checkpoint" else []
        name = models["small"] if model == "checkpoint" else f"{weights}-1.h5"
        return ["run", name, "--prompts", "p.jsonl", "--output", f"{weights}-{model}-{grid}.h5", "--grid", grid,
                "--hash-weights", "--threads", 1, *options]
    cases = [(weights, "store", grid) for weights in ("q3_5", "q8", "f32") for grid in GRIDS]
    cases += [(weights, "checkpoint", "1x1x1") for weights in ("q3_5", "q8", "f32")]
    for ranks in (1, 2, 3):
        together(ranks, [run(*case) for case in cases if GridShape.parse(case[2]).size == ranks])
    found = {}
    for case in cases:
        with read_results(folder / f"{'-'.join(case)}.h5") as results:
            found[case] = results.verify(), results.provenance["weights_sha256"], results.provenance
    return found


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("weights", ["q3_5", "q8", "f32"])
def test_answers_and_weights_are_those_of_the_checkpoint(outcomes, weights, grid):
    digest, hashes, provenance = outcomes[weights, "store", grid]
    expected, expected_hashes, of_checkpoint = outcomes[weights, "checkpoint", "1x1x1"]
    assert digest == expected
    assert hashes == expected_hashes
    assert provenance["weights"] == provenance["settings"]["weights"] == weights
    assert provenance["model"]["source_content_hash"] == of_checkpoint["model"]["content_hash"]
    assert provenance["model"]["source"] == "small"
    assert provenance["model"]["content_hash"] != of_checkpoint["model"]["content_hash"]


def test_formats_differ(outcomes):
    assert len({outcomes[weights, "store", "1x1x1"][0] for weights in ("q3_5", "q8", "f32")}) == 3


def test_info_shows_what_it_holds(capsys, made, folder):
    path = folder / "q3_5-1.h5"
    assert main(["info", str(path)]) == 0
    shown = capsys.readouterr().out
    with h5py.File(path) as file:
        layers, everything = file.attrs["bits_per_weight"]
        assert f"quantised from      small, content {file.attrs['source_content_hash']}" in shown
    assert f"q3_5: {layers:.2f} bits a weight all in (layers), {everything:.2f} (all matrices)" in shown
    assert "stored as           F32, q3_5, q8, " in shown


# Exit code, words of the line, arguments; {store} is a good one, {model} the checkpoint.
BAD = {
    "output exists": (2, ("model.h5 exists", "--overwrite"), "quantize {model} model.h5"),
    "output is a folder": (2, ("is a folder",), "quantize {model} ."),
    "missing folder": (1, ("output folder", "nowhere does not exist"), "quantize {model} nowhere/out.h5"),
    "not writable": (1, ("cannot write to the output folder /sys",), "quantize {model} /sys/out.h5"),
    "no model": (2, ("absent does not exist",), "quantize absent out.h5"),
    "unknown format": (2, ("invalid choice: 'q9'",), "quantize {model} out.h5 --weights q9"),
    "quantised already": (2, ("is quantised already, to q3_5", "small"), "quantize {store} out.h5"),
    "NaN": (1, ("NaN", "layers.1.gate, row 2046"), "quantize {nan} out.h5"),
    "other weights": (2, ("--weights q8", "holds q3_5 weights"), "run {store} --prompts p.jsonl --output out.h5 --weights q8"),
    "other weights in info": (2, ("--weights f32", "holds q3_5 weights"), "info {store} --weights f32"),
    "truncated": (1, ("model.h5: truncated or damaged",), "run model.h5 --prompts p.jsonl --output out.h5"),
    "a file of results": (1, ("r.h5: an HDF5 file, but not a model",), "run r.h5 --prompts p.jsonl --output out.h5"),
    "no HDF5": (1, ("p.h5: not an HDF5 file",), "run p.h5 --prompts p.jsonl --output out.h5"),
    "changed weights": (1, ("changed.h5: damaged: tensor layers.2.down",),
                        "run changed.h5 --prompts p.jsonl --output out.h5 --hash-weights --grid 1x1x{n}"),
    "changed norm": (1, ("changed.h5", "NaN", "layers.0.mlp_norm"), "run changed.h5 --prompts p.jsonl --output out.h5"),
}  # fmt: skip


@pytest.fixture
def scene(made, models, folder, tmp_path, monkeypatch):
    """The command line of a case, for ``n`` ranks, in a folder of files that are damaged in every way."""
    store = folder / "q3_5-1.h5"
    (tmp_path / "p.jsonl").write_text('{"token_ids": [1, 2]}\n')
    (tmp_path / "p.h5").write_text("text")
    (tmp_path / "model.h5").write_bytes(store.read_bytes()[:30_000])
    with h5py.File(tmp_path / "r.h5", "w") as file:
        file.attrs["format"] = "llama_hpc results"
    def command(name, n):
        (tmp_path / "changed.h5").write_bytes(store.read_bytes())
        with h5py.File(tmp_path / "changed.h5", "r+") as file:
            codes = file["tensors/layers.2.down/codes"]
            codes[-1] = ~codes[-1]
            if name == "changed norm":
                file["tensors/layers.0.mlp_norm/values"][3] = float("nan")
        return BAD[name][2].format(model=models["small"], store=store, nan=models["nan_column_parallel"], n=n).split()
    monkeypatch.chdir(tmp_path)
    return command


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check(name, text, code):
    (line,) = [line for line in text.splitlines() if "llama-hpc:" in line]
    assert line.startswith("llama-hpc: error: ") and code == BAD[name][0], text
    for words in BAD[name][1]:
        assert words in line
    assert "Traceback" not in text


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(scene, tmp_path, capsys, name):
    words = scene(name, 1)
    before = contents(tmp_path)
    code = main(words)
    check(name, capsys.readouterr().err, code)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_all_ranks(command, scene, tmp_path, name):
    words = scene(name, 3)
    before = contents(tmp_path)
    job = command(3, words, timeout=LIMIT, cwd=tmp_path)
    check(name, job.stdout + "\n" + job.stderr, job.returncode)
    assert contents(tmp_path) == before


_FULL_DISK = """
import errno, sys
from llama_hpc.runtime import numba_setup
numba_setup.configure(1)
from llama_hpc.cli.main import main
from llama_hpc.weights.store_writer import _Writer
def write(self, position, data, calls=[]):
    calls.append(position)
    if len(calls) > 20:
        raise OSError(errno.ENOSPC, "No space left on device")
_Writer.write = write
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("n", [1, 3])
def test_a_full_disk_ends_all_ranks(mpirun, models, tmp_path, n):
    """The others still send what they have quantised when the first cannot write it any more."""
    job = mpirun(n, ["-c", _FULL_DISK, "quantize", models["small"], "out.h5"], timeout=LIMIT, cwd=tmp_path)
    (line,) = [line for line in job.stderr.splitlines() if "llama-hpc:" in line]
    assert line.startswith("llama-hpc: error: cannot write the model to out.h5: No space left on device")
    assert job.returncode == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("n", [1, 3])
def test_an_existing_file_is_replaced_when_asked(together, made, models, folder, n):
    path = folder / f"replaced-{n}.h5"
    path.write_text("old")
    together(n, [["quantize", models["small"], path, "--overwrite", "--threads", 1]])
    assert path.read_bytes() == (folder / "q8-1.h5").read_bytes()
