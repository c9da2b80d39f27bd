"""What a rehearsal tells: prediction, comparison, verdict, runbook and pages; no database."""
