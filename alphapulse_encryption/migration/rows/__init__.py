"""Every read and write of a user's rows: ranges, batches, throttle, quarantine, and the operations on them.

No DDL belongs here.
"""
