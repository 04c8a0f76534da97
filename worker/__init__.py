"""The worker: takes speech commands from RabbitMQ and speaks them through the Avatar API.

Start with `core.lane` (the rules of one conversation), then `flow.runner` (who carries them out), then `app` (who
builds everything).
"""
