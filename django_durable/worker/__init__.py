"""The processes that execute runs: `manage.py durable_worker`."""
