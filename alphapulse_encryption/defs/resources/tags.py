"""Tags of runs that Dagster acts on, as its documentation and its UI name them."""

# How often the daemon runs a run again that failed.
MAX_RETRIES = "dagster/max_retries"
# "true" on a failed run that the daemon runs again.
WILL_RETRY = "dagster/will_retry"
# The run that a run is a re-execution of, and the first of them.
PARENT_RUN = "dagster/parent_run_id"
ROOT_RUN = "dagster/root_run_id"
# The first and the last partition that a run over a range of them materializes.
FIRST_PARTITION = "dagster/asset_partition_range_start"
LAST_PARTITION = "dagster/asset_partition_range_end"
