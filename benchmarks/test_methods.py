"""Build and query times of every registered method: `pytest benchmarks/ --methods trak,airrep`."""

from tdabench.testing.time_methods import test_build, test_query

__all__ = ["test_build", "test_query"]
