"""The engine: all that speaks SQL to the target database; no Dagster, no key source, no command line."""
