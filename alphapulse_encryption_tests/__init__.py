"""Tests; the packages mirror those of `alphapulse_encryption`."""
