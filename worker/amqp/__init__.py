"""RabbitMQ: the only room that imports aio_pika.

`topology` declares what the contract names; `inbox` receives, `outbox` publishes, each over a `link` of its own, since
a broker that blocks publishers would otherwise hold up acknowledgements too; `parked` is what was given up.
"""
