"""A small AlphaPulse, an HTTP API on the sample's tables, to be read and copied; not a part of the tool.

    ALPHAPULSE_ENCRYPTION_PHASE=dual python -m alphapulse_encryption.sample.application

What is encrypted is declared once, in `models`; nothing else knows of it. An instance is brought from one phase to the
next by starting it again with another `ALPHAPULSE_ENCRYPTION_PHASE`, and by nothing else.

It needs `pip install 'alphapulse-encryption[application]'`.
"""
