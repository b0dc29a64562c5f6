"""A numeric fault keeps its layer, tensor and reason on its way to every rank."""

import pytest

from llama_hpc.errors import NumericsError
from llama_hpc.kernels.numerics import NOT_FINITE, OK, OUT_OF_RANGE
from llama_hpc.model.faults import NONE, TENSORS, Faults, error_of

REASONS = {NOT_FINITE: "NaN or infinity", OUT_OF_RANGE: "beyond the range of exact sums"}


@pytest.mark.parametrize("status", REASONS)
@pytest.mark.parametrize("tensor", TENSORS)
def test_the_error_names_layer_and_tensor(tensor, status):
    for layer in (0, 7, 9999):
        faults = Faults()
        faults.note(status, tensor, layer)
        error = error_of(faults.code)
        assert isinstance(error, NumericsError) and error.exit_code == 1
        place = tensor if tensor in ("embedding", "final_norm", "head") else f"layer {layer}, {tensor}"
        assert str(error).startswith(f"{place}: ") and REASONS[status] in str(error) and "\n" not in str(error)


def test_the_first_fault_counts():
    """What follows a fault is its consequence."""
    faults = Faults()
    faults.note(OK, "q", 1)
    assert faults.code == 0
    faults.note(OUT_OF_RANGE, "down", 2)
    first = faults.code
    faults.note(NOT_FINITE, "q", 3)
    faults.note(OK, "k", 3)
    faults.merge(0)
    assert faults.code == first and str(error_of(first)).startswith("layer 2, down")


def test_a_fault_of_an_earlier_stage_is_taken_over():
    earlier, later = Faults(), Faults()
    earlier.note(NOT_FINITE, "o", 4)
    later.merge(earlier.code)
    later.note(OUT_OF_RANGE, "q", 9)
    assert later.code == earlier.code
    later.clear()
    assert later.code == 0


def test_the_minimum_over_tensor_ranks_is_the_first_fault():
    codes = []
    for tensor, layer in (("embedding", 0), ("down", 3), ("q", 10), ("up", 10), ("final_norm", 0), ("head", 0)):
        faults = Faults()
        faults.note(NOT_FINITE, tensor, layer)
        codes.append(faults.code)
    assert codes == sorted(codes) and codes[0] > 0 and codes[-1] < NONE
