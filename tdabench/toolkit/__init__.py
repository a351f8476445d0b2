"""Shared components for method authors; `tdabench.api` lists the public ones."""
