"""What a process of `test_faults.py` does: a build that writes down which units it trains."""

from __future__ import annotations

import time

from tdabench.truth import build
from tdabench.truth.engines import UnitTrainer


def run(plan, parts, folder, log, pause):
    """Builds; each retraining is logged when it begins, and waits `pause` seconds."""
    train = UnitTrainer.losses

    def logged(self, unit, *rest):
        with open(log, "a") as f:
            f.write(f"{unit.name}\n")
        time.sleep(pause)
        return train(self, unit, *rest)

    UnitTrainer.losses = logged
    build(plan, *parts, folder)
