"""The load of an application on the clone while a stage is at work, and what it measured.

It knows no stage.
"""
