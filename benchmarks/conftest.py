"""Options and fixtures of the timing suite, which also serve a plugin's own CI."""

from tdabench.testing.timing import pytest_addoption, pytest_generate_tests, timed

__all__ = ["pytest_addoption", "pytest_generate_tests", "timed"]
