"""The whole migration on a clone of staging, measured and told; no step of the migration itself."""
