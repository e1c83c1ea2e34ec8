"""An app of async workflows, for tests/scenarios/test_async.py."""
