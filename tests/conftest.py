"""What the halves of the suite have apart: see tests/dbplugin.py."""

import os

# A test of the tests' own server, which needs no second round.
collect_ignore = ["test_postgres_helper.py"] if os.environ.get("DURABLE_EXPECT_VENDOR") == "sqlite" else []
