"""One table that is there already."""

from __future__ import annotations

from django.db import models


class User(models.Model):
    name = models.TextField()

    class Meta:
        app_label, db_table, managed = "django_shop", "users", False

    def __str__(self) -> str:
        return str(self.name)
