"""An application's load on the clone, and what it measured; no stage of the migration."""
