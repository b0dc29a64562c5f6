"""The pipeline's schedule: steps come out in their order, after all stages, and no more are under way than may be."""

import pytest

from llama_hpc.engine.pipeline import PipelineConfig, PipelineState
from llama_hpc.errors import UsageError


def test_steps_come_out_in_order_after_all_stages():
    state, out = PipelineState(stages=3, max_depth=4), []
    for step in range(10):
        while not state.can_accept():
            assert state.has_output()
            out.append(state.pop())
        state.push(step)
        state.advance()
    assert out == list(range(6)) and len(state) == 4
    while len(state):
        while not state.has_output():
            state.advance()
        out.append(state.pop())
    assert out == list(range(10))


def test_the_wrong_order_is_refused():
    state = PipelineState(2, 1)
    assert not state.has_output() and state.can_accept()
    with pytest.raises(RuntimeError, match="no step has passed all 2 stages"):
        state.pop()
    state.push("a")
    with pytest.raises(RuntimeError, match="1 steps are under way, no more than 1 may be"):
        state.push("b")
    state.advance()
    assert not state.has_output()
    state.advance()
    assert state.pop() == "a"


def test_what_suits_a_model():
    assert PipelineConfig.for_model(32, 4096, stages=4) == PipelineConfig(6, 256)
    assert PipelineConfig.for_model(32, 4096, stages=1).micro_batches == 1
    assert PipelineConfig.for_model(2, 64, stages=5).micro_batches == 4
    # Residuals of all micro-batches fit the budget.
    small = PipelineConfig.for_model(80, 8192, memory_budget=8 << 20, stages=2)
    assert small.prefill_micro_batch == 64 and small.micro_batches * small.prefill_micro_batch * 8192 * 4 <= 8 << 20
    assert PipelineConfig.for_model(80, 8192, memory_budget=1).prefill_micro_batch == 1


@pytest.mark.parametrize(("name", "value"), [
    ("micro_batches", 0), ("prefill_micro_batch", 0), ("decode_micro_batch", -1), ("memory_budget", 0)])
def test_numbers_that_make_no_pipeline(name, value):
    with pytest.raises(UsageError, match=f"{name} is {value}; it must be at least"):
        PipelineConfig(**{name: value})
