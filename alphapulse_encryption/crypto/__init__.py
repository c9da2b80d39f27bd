"""Keys, envelopes and search tokens.

Belongs here: what turns text into ciphertext and back. Does not belong here: where keys come
from (`keysources`), any database, any orchestration.
"""
