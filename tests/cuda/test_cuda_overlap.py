"""Steps that begin before the one before them is finished give the bits of steps one by one."""

import numpy as np
import pytest
from overlapping import run, stage_of, steps_of

from llama_hpc.model.config import ModelConfig, RopeConfig
from llama_hpc.model.wanted import NOTHING, Wanted

CONFIG = ModelConfig("llama", 64, 96, 2, 4, 2, 16, 128, 64, rope=RopeConfig(1e4))
# A first, a middle and a last stage.
ENDS = (True, False), (False, False), (False, True)


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("ahead", [1, 2])
def test_steps_beside_each_other(device, ends, ahead):
    rows, wanted, found = 3, Wanted(rows=[0, 2], tokens=np.array([5, 127, 0])), []
    for each in (0, ahead):
        stage = stage_of(device, CONFIG, ends, "q8", 2 * rows, rows)

        def keep(stage=stage):
            if not stage.stage.last:
                return stage.residual[:rows].tobytes()
            return (stage.best.tobytes(), stage.totals.tobytes(), stage.logits[[0, 2]].tobytes(),
                    stage.picked(wanted.tokens).tobytes(), stage.faults.code)
        found.append(run(stage, steps_of(CONFIG, 2, rows, 4), each, keep, wanted if stage.stage.last else NOTHING))
        assert stage.steps_beside == (7 if each else 0)
    assert len(set(found[0])) == 8 and found[0] == found[1]
