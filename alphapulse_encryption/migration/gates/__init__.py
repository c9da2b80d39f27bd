"""What may be done, and why not: preflight, backup and its drill, approvals, roles.

Nothing here changes a user's table.
"""
