"""The views: one reads through the cache, one writes, and two do what their methods don't say."""

from __future__ import annotations

from typing import Any

from django.db import connection
from django.http import HttpRequest, JsonResponse
from frameworks.django_shop.models import User

from cdc_invalidator.reader.commit import commit_lsn
from cdc_invalidator.reader.django import caches
from cdc_invalidator.reader.own_writes import only_read, wrote


@caches.user.cached
def load_user(id: int) -> dict[str, Any] | None:  # noqa: A002
    return User.objects.filter(pk=id).values("id", "name").first()  # type: ignore[no-any-return]


def user(request: HttpRequest, id: int) -> JsonResponse:  # noqa: A002
    if request.method == "POST":
        User.objects.filter(pk=id).update(name=request.GET["name"])
    return JsonResponse(load_user(id), safe=False)


def touch(request: HttpRequest, id: int) -> JsonResponse:  # noqa: A002
    User.objects.filter(pk=id).update(name="touched")
    wrote(commit_lsn(connection))
    return JsonResponse(load_user(id), safe=False)


def search(request: HttpRequest) -> JsonResponse:
    only_read()
    return JsonResponse(load_user(1), safe=False)
