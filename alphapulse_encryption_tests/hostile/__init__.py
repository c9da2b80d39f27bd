"""Tests of names that are meant to break what shows or runs them."""
