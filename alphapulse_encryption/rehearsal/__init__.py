"""Rehearsals on staging: the whole migration on a clone of the staging database, measured, and what it tells.

Belongs here: the clone, the traffic and the faults during the rehearsal, its measurements, the prediction and the
report. Does not belong here: any step of the migration itself (``migration``, and what the assets share).
"""
