"""Measured runs of one worker against a real broker and the simulator; what they found is in docs/reliability.md."""
