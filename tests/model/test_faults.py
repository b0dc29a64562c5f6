"""A numeric fault keeps its layer, tensor and reason on its way to every rank."""

import pytest

from llama_hpc.errors import NumericsError
from llama_hpc.kernels.numerics import NOT_FINITE, OK, OUT_OF_RANGE
from llama_hpc.model.faults import TENSORS, Faults, error_of

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


def test_every_fault_is_positive_as_an_integer_of_64_bits():
    """Tensor ranks agree by a maximum, and 0 stands for none."""
    for tensor in TENSORS:
        faults = Faults()
        faults.note(NOT_FINITE, tensor, 9999)
        assert 0 < faults.code < 2**63
