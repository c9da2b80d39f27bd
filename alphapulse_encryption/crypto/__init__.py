"""Keys, envelopes and search tokens: text to ciphertext and back; no database, and not where keys come from."""
