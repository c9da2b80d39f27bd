"""The groups of the graph, numbered so that they read in the guide's order; what comes after the migration is last."""

PREPARE = "step_1_prepare"
COLUMNS = "step_2_columns"
MIGRATE = "step_3_migrate"
VERIFY = "step_4_verify"
VIEWS = "step_6_views"
MONITOR = "step_7_monitor"
DROP = "step_8_drop"
UPKEEP = "upkeep"

# Bounds how many steps work on the target database at once, over all runs.
TARGET_POOL = "target_database"
