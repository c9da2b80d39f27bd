"""What a person may want to know: status, plan, drift, slow queries, live check.

Nothing here changes what it looks at.
"""
