"""Example scores kept with a record: the highest and lowest per query, and all if they are few.

Reports show the extremes, stored with every record. `tdabench verify` recomputes group scores from
the full scores, stored with the LDS record. Neither is part of a metric, and both are
computed outside the cost meter, since the harness needs them and not the method.
"""

from __future__ import annotations

import numpy as np

from tdabench.data.examples import Corpus
from tdabench.method import Index
from tdabench.rows import top_k_of

KEPT = 10
ALL = 1 << 20  # number of example scores up to which all are kept
BLOCK = 16 << 20  # number of scores held at a time
SECONDS = 600.0  # allowed even if the cell itself took less


def top_examples(index: Index, queries: Corpus) -> dict[str, np.ndarray]:
    """Returns `top_index`, `top_score`, `bottom_index`, `bottom_score`: [query, k], extremes first.

    With at most ALL scores also `example_scores`, float32 [query, train]. Empty if the method
    cannot score single examples: a display must not make a measurement fail.
    """
    n_train = int(index.n_train)
    if n_train == 0 or len(queries) == 0:
        return {}
    parts: dict[str, list[np.ndarray]] = {
        name: [] for name in ("top_index", "top_score", "bottom_index", "bottom_score")
    }
    whole: list[np.ndarray] = []
    step = max(1, BLOCK // n_train)
    try:
        for a in range(0, len(queries), step):
            scores = np.asarray(index.score(queries[a : a + step]), dtype=np.float32)
            if not np.isfinite(scores).all():
                return {}
            if len(queries) * n_train <= ALL:
                whole.append(scores)
            for side, sign in (("top", 1.0), ("bottom", -1.0)):
                values, ids = top_k_of(sign * scores, KEPT)
                parts[f"{side}_index"].append(ids.astype(np.int32))
                parts[f"{side}_score"].append(np.float32(sign) * values)
    except Exception:  # a method may offer group scores only
        return {}
    if whole:
        parts["example_scores"] = whole
    return {name: np.concatenate(blocks) for name, blocks in parts.items()}


def too_long(expected: float, cell: float, timeout: float) -> bool:
    """Tells whether scoring for `expected` seconds costs too much beside a cell of `cell` seconds.

    `timeout` (0: none) limits every phase of a cell: a display must not cost a measurement.
    """
    return expected > max(SECONDS, cell) or bool(timeout and expected > 0.9 * timeout)
