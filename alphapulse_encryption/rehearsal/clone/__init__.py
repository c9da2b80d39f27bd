"""The database that a rehearsal works on, from its source to its removal; no stage of the migration."""
