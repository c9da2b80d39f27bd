"""What a run is given (database, catalogue, keys) and what Dagster runs on; no step of the guide."""
