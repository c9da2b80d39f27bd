"""What may be done and why not: preflight, backup, approvals, roles; no change of a user's table."""
