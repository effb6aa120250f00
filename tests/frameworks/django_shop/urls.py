"""Where the views are."""

from __future__ import annotations

from django.db.transaction import non_atomic_requests
from django.urls import path
from frameworks.django_shop import views

urlpatterns = [
    path("users/<int:id>", views.user),
    path("users/<int:id>/touch", non_atomic_requests(views.touch)),
    path("search", views.search),
]
