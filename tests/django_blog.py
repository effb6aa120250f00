"""A Django project in one file, as a process of its own: a blog that caches with `get_or_set` and never deletes a key.

    python django_blog.py DSN REDIS_URL BACKEND KEY_PREFIX VERSION

It does what each line of its standard input names, and answers with a line of JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import django
import psycopg
from django.apps import AppConfig
from django.conf import settings
from django.core.cache import cache
from django.db import connection, models, transaction


class Blog(AppConfig):
    name = "__main__"
    label = "blog"


if __name__ == "__main__":
    dsn, redis_url, backend, prefix, version = sys.argv[1:]
    given = psycopg.conninfo.conninfo_to_dict(dsn)
    settings.configure(
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.postgresql",
                "HOST": given["host"],
                "PORT": given["port"],
                "NAME": given["dbname"],
                "USER": given["user"],
                "PASSWORD": given.get("password"),
            }
        },
        CACHES={
            "default": {"BACKEND": backend, "LOCATION": redis_url, "KEY_PREFIX": prefix, "VERSION": int(version)},
        },
        INSTALLED_APPS=["__main__.Blog"],
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        USE_TZ=True,
    )
    django.setup()


class Author(models.Model):
    name = models.CharField(max_length=100)

    class Meta:
        app_label = "blog"

    def __str__(self) -> str:
        return str(self.name)


class Tag(models.Model):
    slug = models.SlugField(unique=True)

    class Meta:
        app_label = "blog"

    def __str__(self) -> str:
        return str(self.slug)


class Article(models.Model):
    # The database deletes an author's articles, not Django.
    author = models.ForeignKey(Author, models.DO_NOTHING)
    title = models.CharField(max_length=100)
    tags = models.ManyToManyField(Tag)

    class Meta:
        app_label = "blog"

    def __str__(self) -> str:
        return str(self.title)


def create() -> None:
    """What migrations would do; RunSQL has the identities and the cascades."""
    with connection.schema_editor() as editor:
        for model in (Author, Tag, Article):
            editor.create_model(model)
    with connection.cursor() as cursor:
        for table, column, other in (
            ("blog_article", "author_id", "blog_author"),
            ("blog_article_tags", "article_id", "blog_article"),
            ("blog_article_tags", "tag_id", "blog_tag"),
        ):
            cursor.execute(
                "SELECT conname FROM pg_constraint WHERE conrelid = %s::regclass AND confrelid = %s::regclass",
                [table, other],
            )
            (constraint,) = cursor.fetchone()
            cursor.execute(f'ALTER TABLE {table} DROP CONSTRAINT "{constraint}"')
            cursor.execute(f"ALTER TABLE {table} ADD FOREIGN KEY ({column}) REFERENCES {other} ON DELETE CASCADE")
            cursor.execute(f"ALTER TABLE {table} REPLICA IDENTITY FULL")
        cursor.execute("ALTER TABLE blog_tag REPLICA IDENTITY FULL")
    ada, barbara = Author.objects.create(name="Ada"), Author.objects.create(name="Barbara")
    python, redis = Tag.objects.create(slug="python"), Tag.objects.create(slug="redis")
    for number in range(6):
        article = Article.objects.create(author=(ada, barbara)[number % 2], title=f"Article {number}")
        article.tags.add((python, redis)[number // 3])


# What its views show, from the cache.


def shown_article(number: int) -> list[str] | None:
    article = Article.objects.select_related("author").filter(pk=number).first()
    return article and [article.title, article.author.name, *sorted(tag.slug for tag in article.tags.all())]


def shown_author(number: int) -> list[str]:
    return list(Article.objects.filter(author=number).order_by("pk").values_list("title", flat=True))


def shown_tag(slug: str) -> list[str]:
    return list(Article.objects.filter(tags__slug=slug).order_by("pk").values_list("title", flat=True))


def views() -> dict[str, Any]:
    """What is shown under each key, if it must be loaded."""
    loads: dict[str, Any] = {f"article:{number}": (shown_article, number) for number in range(1, 7)}
    loads |= {f"author:{number}:articles": (shown_author, number) for number in (1, 2)}
    return loads | {f"tag:{slug}:articles": (shown_tag, slug) for slug in ("python", "py", "redis")}


def read() -> dict[str, Any]:
    return {key: cache.get_or_set(key, lambda load=load, of=of: load(of), 300) for key, (load, of) in views().items()}


def truth() -> dict[str, Any]:
    return {key: load(of) for key, (load, of) in views().items()}


# What changes rows; none of it knows of the cache.


def save() -> None:
    article = Article.objects.get(pk=1)
    article.title = "Saved"
    article.save()


def update() -> None:
    Article.objects.filter(author=2).update(title="Updated")


def give_away() -> None:
    Article.objects.filter(pk=1).update(author=2)


def tag() -> None:
    Article.objects.get(pk=1).tags.set([Tag.objects.get(slug="redis")])


def rename_author() -> None:
    with transaction.atomic():
        Author.objects.filter(pk=1).update(name="Grace")


def rename_tag() -> None:
    Tag.objects.filter(slug="python").update(slug="py")


def drop_article() -> None:
    """Django deletes the links itself, before the article."""
    Article.objects.get(pk=4).delete()


def drop_tag() -> None:
    """Django deletes the links itself, before the tag."""
    Tag.objects.get(slug="redis").delete()


def undo() -> None:
    with transaction.atomic():
        Article.objects.all().update(title="Never")
        transaction.set_rollback(True)


def sql() -> None:
    with connection.cursor() as cursor:
        cursor.execute("UPDATE blog_article SET title = title || '!' WHERE id < 4")


def cascade() -> None:
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM blog_author WHERE id = 1")


def cascade_of_tag() -> None:
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM blog_tag WHERE slug = 'py'")


if __name__ == "__main__":
    asked = (create, read, truth)
    orm = (save, update, give_away, tag, rename_author, rename_tag, undo, drop_article, drop_tag)
    commands = {each.__name__: each for each in (*asked, *orm, sql, cascade, cascade_of_tag)}
    for line in sys.stdin:
        print(json.dumps(commands[line.strip()]()), flush=True)
