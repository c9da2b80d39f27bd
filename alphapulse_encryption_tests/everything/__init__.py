"""Preflight on a database with one of everything."""
