"""What the UI shows red or green beside an asset; not how values are compared."""
