"""Commands of `make`."""
