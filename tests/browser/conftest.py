"""A real browser on users' own pages; as in tests/admin, whose fixtures these are."""

from tests.admin.conftest import CHROMIUM, REQUIRED, page

__all__ = ["page"]

collect_ignore = [] if CHROMIUM or REQUIRED else ["test_progress.py"]
