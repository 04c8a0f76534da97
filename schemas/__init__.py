"""The contract in code: commands in, events out, and the names both travel under.

Imports pydantic and the standard library, nothing of ours, so that a producer or a listener may depend on it alone.
"""
