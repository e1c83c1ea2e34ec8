"""Django's settings for a measured process: the tests' database, and DURABLE's defaults."""

from tests.settings import DATABASES as TEST_DATABASES
from tests.settings import DEFAULT_AUTO_FIELD, SECRET_KEY, USE_TZ

__all__ = ["DATABASES", "DEFAULT_AUTO_FIELD", "INSTALLED_APPS", "SECRET_KEY", "USE_TZ"]

DATABASES = {"default": TEST_DATABASES["default"]}
INSTALLED_APPS = ["django_durable", "benchmarks"]
