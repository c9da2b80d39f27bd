"""What the command line tells without a run of Dagster's: plan, status, discovery, and reports as JSON.

Belongs here: reading them with what the environment says, and how a person sees them. What is in them comes from
``migration``.
"""
