"""Dagster's UI: its processes, and which of a browser's requests reach it; not what it shows."""
