"""The steps of the guide that change a table, one module each; no rule that two of them need."""
