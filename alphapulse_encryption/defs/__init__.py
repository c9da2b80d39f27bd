"""Dagster, thin: assets, checks, jobs, sensors, schedules, resources and partitions.

What a step does to a database does not belong here.
"""
