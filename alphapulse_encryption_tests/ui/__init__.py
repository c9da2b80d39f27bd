"""Dagster's UI: what reaches it, and what its processes are given."""
