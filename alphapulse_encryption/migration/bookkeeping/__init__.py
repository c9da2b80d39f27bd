"""The engine's own tables: ranges, progress, keys, settings, evidence and audit.

No statement on a user's table belongs here.
"""
