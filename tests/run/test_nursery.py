"""What a nursery has imported when it forks."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("before", ["enable", "disable"])
def test_collections_never_visit_what_was_imported(before: str) -> None:
    code = (
        f"import gc; gc.{before}()\n"
        "from tdabench.run.nursery import preload\n"
        "preload(None)\n"
        "import scipy.sparse\n"
        f"assert gc.isenabled() is {before == 'enable'}\n"
        "left = {id(x) for x in gc.get_objects()}\n"  # without what is frozen
        "assert id(vars(scipy.sparse)) not in left\n"
        "assert gc.get_freeze_count() > 10_000\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
