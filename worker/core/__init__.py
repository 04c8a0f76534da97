"""The rules, pure: values in, values out. No await, no clock, no chance, no log, no vendor.

`lane` is the state machine of one conversation; the other modules are its vocabulary.
All times are epoch seconds, handed in by the caller.
"""
