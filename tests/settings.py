"""Django's settings for the tests and the checks.

DATABASE_URL says which database. A process that a test starts gets DURABLE_TEST_DATABASE and
DURABLE_TEST_DATABASE_OTHER too (the fixture `process_env`): then it works on the test's own databases.
"""

import getpass
import hashlib
import tempfile
from pathlib import Path

import environ

env = environ.Env()

# Two checkouts may share one database server: each has its own test databases there.
CHECKOUT = hashlib.sha256(str(Path(__file__).resolve()).encode()).hexdigest()[:8]


def default_url() -> str:
    """A file for commands that are run by hand; pytest always says where (tests/dbplugin.py)."""
    folder = Path(tempfile.gettempdir()) / f"durable-{getpass.getuser()}-{CHECKOUT}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return f"sqlite:///{folder}/db.sqlite3"


def database(suffix: str = "") -> dict:
    """The settings of one database; `suffix` makes another one beside it, on the same server."""
    config = env.db_url_config(env.str("DATABASE_URL", default=None) or default_url())
    config["NAME"] = str(config["NAME"])
    if config["ENGINE"].endswith("sqlite3"):
        path = Path(config["NAME"])
        config["NAME"] = str(path.with_stem(path.stem + suffix))
        # A file, because threads and processes share it. IMMEDIATE, because a transaction that reads first and
        # writes later is refused at once when another has written meanwhile, whatever the timeout.
        config["TEST"] = {"NAME": str(path.with_stem(f"test_{path.stem}{suffix}"))}
        config["OPTIONS"] = {
            "transaction_mode": "IMMEDIATE",
            "timeout": 20,
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL",
        }
    else:
        config["NAME"] += suffix
        config["TEST"] = {"NAME": f"test_durable_{CHECKOUT}{suffix}"}
    if name := env.str(f"DURABLE_TEST_DATABASE{suffix.upper()}", default=None):
        config["NAME"] = name
    return config


DATABASES = {"default": database(), "other": database("_other")}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True

SECRET_KEY = "test"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]  # fast
ALLOWED_HOSTS = ["*"]

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "django_durable",
    "tests.app",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
ROOT_URLCONF = "tests.urls"
STATIC_URL = "static/"

# Quiet, but for a process that a test starts with DURABLE_TEST_LOG=INFO to see what it does.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"null": {"class": "logging.NullHandler"}, "console": {"class": "logging.StreamHandler"}},
    "root": (
        {"handlers": ["console"], "level": env.str("DURABLE_TEST_LOG", default="")}
        if "DURABLE_TEST_LOG" in env.ENVIRON
        else {"handlers": ["null"]}
    ),
}
