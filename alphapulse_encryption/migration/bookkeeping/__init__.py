"""The only SQL on our own tables: state, progress, keys, settings, evidence, audit; none on a user's table."""
