"""Runs on several machines: workers and the launcher that feeds them.

Nothing here knows what a run does.
"""
