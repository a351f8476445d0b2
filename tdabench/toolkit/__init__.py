"""Shared machinery for method authors; what is public is listed in `tdabench.api`."""
