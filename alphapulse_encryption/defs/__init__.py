"""Dagster, thin: assets, checks, jobs, sensors, resources, partitions; not what a step does to a database."""
