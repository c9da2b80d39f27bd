"""Runs on several machines: workers, and the launcher that feeds them; not what a run does."""
