"""The settings of a Django project that reads through the caches: reader/FRAMEWORKS.md shows what is ours in them."""

from __future__ import annotations

import os
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict

BASE_DIR = Path(__file__).parents[1]
_GIVEN = conninfo_to_dict(os.environ["DSN"])

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": _GIVEN["host"],
        "PORT": _GIVEN["port"],
        "NAME": _GIVEN["dbname"],
        "USER": _GIVEN["user"],
        "PASSWORD": _GIVEN.get("password"),
        "ATOMIC_REQUESTS": True,
    }
}
SECRET_KEY = os.environ["SECRET_KEY"]
ALLOWED_HOSTS = ["127.0.0.1"]
ROOT_URLCONF = "frameworks.django_shop.urls"
INSTALLED_APPS = [
    "frameworks.django_shop",
    "cdc_invalidator.reader.django",
]
MIDDLEWARE = [
    "cdc_invalidator.reader.django.OwnWrites",
    "django.middleware.common.CommonMiddleware",
]
CDC_INVALIDATOR = {"RULES": BASE_DIR / "rules.yaml", "REDIS": os.environ["REDIS_URL"]}
