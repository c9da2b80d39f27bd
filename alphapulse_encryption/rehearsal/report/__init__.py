"""What a rehearsal tells: comparison, prediction, verdict, runbook, and the pages that show them.

Nothing here touches a database.
"""
