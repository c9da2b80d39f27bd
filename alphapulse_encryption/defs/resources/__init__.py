"""What assets and jobs are given: the target database, the catalogue, the keys.

Belongs here: finding out from the environment what a run works with, and what Dagster itself runs on. Does not
belong here: anything that a step of the guide does.
"""
