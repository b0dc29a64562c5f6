"""The shape of a grid: what the command line may say, and what a wrong one is told."""

import pytest

from llama_hpc.errors import UsageError
from llama_hpc.grid import GridShape


@pytest.mark.parametrize(("text", "shape"), [
    ("1x1x1", (1, 1, 1)), ("2x1x4", (2, 1, 4)), ("3x5x7", (3, 5, 7)), (" 2X3x1\n", (2, 3, 1)), ("04x1x1", (4, 1, 1)),
    ("999999x1x1", (999999, 1, 1)),
])
def test_parse(text, shape):
    parsed = GridShape.parse(text)
    assert (parsed.data, parsed.pipeline, parsed.tensor) == shape
    assert parsed.size == shape[0] * shape[1] * shape[2]
    assert GridShape.parse(str(parsed)) == parsed


@pytest.mark.parametrize("text", [
    "", "2", "2x2", "2x2x2x2", "2*2*2", "axbxc", "-1x1x1", "1.0x1x1", "2 x 1 x 1", "1x1x", "1x1x1;", "1000000x1x1", "autox1x1",
])
def test_what_is_no_grid_is_refused_with_an_example(text):
    with pytest.raises(UsageError) as caught:
        GridShape.parse(text)
    message = str(caught.value)
    assert repr(text) in message and "DxPxT" in message and "2x1x4" in message and "\n" not in message


@pytest.mark.parametrize(("text", "name"), [("0x1x1", "data"), ("1x0x1", "pipeline"), ("1x1x0", "tensor")])
def test_a_dimension_is_at_least_one(text, name):
    with pytest.raises(UsageError, match=f"{name} dimension is 0; it must be at least 1"):
        GridShape.parse(text)


def test_a_grid_fills_the_job_exactly():
    GridShape(2, 3, 1).check_size(6)
    for ranks in (1, 5, 7, 12):
        with pytest.raises(UsageError, match=rf"2x3x1 .*= 6 ranks, but the job has {ranks}"):
            GridShape(2, 3, 1).check_size(ranks)
