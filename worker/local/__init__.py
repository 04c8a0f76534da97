"""What lets a person try the worker on one machine: the simulated Avatar API, the private broker, the demo."""
