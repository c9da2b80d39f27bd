"""Every read and write of a user's rows: ranges, batches, throttle, operations; no DDL."""
