"""The only room that calls the Avatar API: `client` makes the calls, `faults` says what came of them."""
