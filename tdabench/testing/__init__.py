"""The conformance kit: laws that every method must keep, executable on a tiny offline model.

    from tdabench.testing import parametrize_with_laws

    @parametrize_with_laws([MyMethod()])
    def test_laws(method, law):
        law(method)

`tdabench check NAME` runs the same laws and prints a table. `tiny_world()` returns the model,
corpus and queries that they run on, for your own tests.
"""

from tdabench.testing.kit import (
    LawResult,
    check_law,
    check_method,
    find_law,
    parametrize_with_laws,
    run_benchmark,
)
from tdabench.testing.laws import LAWS, Case, DoesNotApply, Law, LawBroken
from tdabench.testing.tiny import TinyWorld, tiny_corpus, tiny_suite, tiny_target, tiny_world

__all__ = [
    "LAWS",
    "Case",
    "DoesNotApply",
    "Law",
    "LawBroken",
    "LawResult",
    "TinyWorld",
    "check_law",
    "check_method",
    "find_law",
    "parametrize_with_laws",
    "run_benchmark",
    "tiny_corpus",
    "tiny_suite",
    "tiny_target",
    "tiny_world",
]
