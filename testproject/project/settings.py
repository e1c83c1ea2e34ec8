"""The shop's settings. The environment may set DATABASE_URL, PAYMENTS_URL, SHOP_VAR, DEBUG, SECRET_KEY, ALLOWED_HOSTS.

`make demo` and `make serve` set or remove these by themselves: see environment() in backstage/children.py.
"""

from pathlib import Path
from urllib.parse import quote

import django
import environ

BASE_DIR = Path(__file__).resolve().parent.parent
env = environ.Env()

# All that the shop writes: its database, its mails, and the payment service's ledger beside them.
VAR = Path(env.str("SHOP_VAR", default=str(BASE_DIR / "var")))
VAR.mkdir(parents=True, exist_ok=True)

DEBUG = env.bool("DEBUG", default=True)
SECRET_KEY = env.str("SECRET_KEY", default="a-demo-on-this-machine-alone-has-no-secret")
ALLOWED_HOSTS = env.list("ALLOWED_HOSTS", default=["127.0.0.1", "localhost"])

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "django_durable",
    "shop",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
ROOT_URLCONF = "project.urls"
WSGI_APPLICATION = "project.wsgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]

DATABASES = {"default": env.db_url("DATABASE_URL", default=f"sqlite:///{quote(str(VAR / 'shop.sqlite3'))}")}
# An order and the run of its checkout are stored by one commit, or not at all.
DATABASES["default"]["ATOMIC_REQUESTS"] = True
if DATABASES["default"]["ENGINE"] == "django.db.backends.sqlite3":
    DATABASES["default"]["OPTIONS"] = {
        # A transaction that reads first and writes later fails at once if another process wrote in between, whatever
        # the timeout; one that begins as a writer waits for its turn.
        "transaction_mode": "IMMEDIATE",
        "timeout": 20,
        "init_command": "PRAGMA journal_mode=WAL",
    }
    DATABASES["default"]["TEST"] = {"NAME": VAR / "test.sqlite3"}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

USE_TZ = True
TIME_ZONE = "UTC"
LANGUAGE_CODE = "en"
STATIC_URL = "static/"
LOGIN_URL = "admin:login"
LOGIN_REDIRECT_URL = "/"

# Mails are files, to be read and counted.
MAIL_FOLDER = VAR / "mail"
if django.VERSION >= (6, 1):
    MAILERS = {
        "default": {
            "BACKEND": "django.core.mail.backends.filebased.EmailBackend",
            "OPTIONS": {"file_path": MAIL_FOLDER},
        }
    }
else:
    EMAIL_BACKEND = "django.core.mail.backends.filebased.EmailBackend"
    EMAIL_FILE_PATH = MAIL_FOLDER
DEFAULT_FROM_EMAIL = "Box office <tickets@shop.example>"

# The payment service is a process of its own: see payments/.
PAYMENTS_URL = env.str("PAYMENTS_URL", default="http://127.0.0.1:8001")

# For the demo only, see shop/story.py: print what happens to each run, and a folder of pipes that hold steps back.
STORY = env.bool("SHOP_STORY", default=False)
STORY_HOLD = Path(env.str("SHOP_STORY_HOLD", default=str(VAR / "hold")))
