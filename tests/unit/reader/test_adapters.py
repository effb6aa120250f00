"""The adapters of FastAPI and Flask without servers: whose caches they find, and what they tell a visitor."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import redis
from fastapi import FastAPI
from flask import Flask
from readers import USER_RULES, Rows, rules_file

from cdc_invalidator.reader import AsyncCaches, connect, testing
from cdc_invalidator.reader.fastapi import AppCaches, OwnWrites, lifespan
from cdc_invalidator.reader.flask import FlaskCaches
from cdc_invalidator.reader.own_writes import COOKIE, Visitors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    return rules_file(tmp_path, USER_RULES)


async def lsn() -> int:
    return 5


def with_fastapi(rows: Rows, **options: Any) -> FastAPI:
    app = FastAPI(**options)
    app.add_middleware(OwnWrites, secret="secret", lsn=lsn)

    @app.get("/")
    async def show(caches: AppCaches) -> Any:
        return await caches.user.get(id=1, load=rows)

    @app.post("/")
    async def change() -> None:
        return None

    return app


def with_flask(rows: Rows, rules: Path, *, secret: str = "secret", **options: Any) -> Flask:
    app = Flask(__name__)
    app.secret_key = secret
    app.config.update(CDC_RULES=rules, CDC_REDIS=connect.MEMORY)
    caches = FlaskCaches(app, lsn=lambda: 5, **options)

    @app.get("/")
    def show() -> Any:
        assert caches["user"] is caches.user
        assert not hasattr(caches, "team")
        return str(caches.user.get(id=1, load=rows))

    @app.post("/")
    def change() -> str:
        return ""

    return app


@asynccontextmanager
async def lived(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A visitor, while the application lives as under a server."""
    async with app.router.lifespan_context(app), visitor(app) as client:
        yield client


def visitor(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")


async def test_fastapi_reads_through_the_caches_of_its_life(rules: Path) -> None:
    rows = Rows()
    app = with_fastapi(rows, lifespan=lifespan(rules, connect.MEMORY))
    for loads in (1, 3):
        async with lived(app) as client:
            assert [(await client.get("/")).json() for _ in range(3)] == [loads] * 3
            await client.post("/")
            assert Visitors("secret").lsn(client.cookies[COOKIE]) == 5
            assert (await client.get("/")).json() == loads + 1, "no watermark has come so far"


async def test_fastapi_lives_with_the_caches_of_a_module(rules: Path) -> None:
    made, rows = AsyncCaches.in_memory(rules), Rows()

    @made.user.cached
    async def load(id: int) -> int:  # noqa: A002
        return rows(id=id)

    app = with_fastapi(rows, lifespan=lifespan(made))
    for loads in (1, 3):
        with testing.in_memory(made):
            async with lived(app) as client:
                assert app.state.cdc_invalidator is made
                assert (await client.get("/")).json() == await load(1) == loads
                testing.bust(made.user, id=1)
                assert (await client.get("/")).json() == await load(1) == loads + 1
    for wrong in ([rules], [made, connect.MEMORY]):
        with pytest.raises(TypeError, match="a lifespan is of rule files and a Redis, or of caches"):
            lifespan(*wrong)
    with pytest.raises(TypeError, match="and nothing else"):
        lifespan(made, slot="shop")


async def test_what_memory_made_is_busted_by_the_application(rules: Path) -> None:
    app = with_fastapi(Rows(), lifespan=lifespan(rules, connect.MEMORY))
    async with lived(app) as client:
        assert [(await client.get("/")).json() for _ in range(2)] == [1, 1]
        testing.bust(app.state.cdc_invalidator.user, id=1)
        assert (await client.get("/")).json() == 2


async def test_fastapi_s_own_lifespan_goes_round_it(rules: Path) -> None:
    @asynccontextmanager
    async def living(app: FastAPI) -> AsyncIterator[None]:
        async with lifespan(rules, connect.MEMORY)(app):
            yield

    async with lived(with_fastapi(Rows(), lifespan=living)) as client:
        assert [(await client.get("/")).json() for _ in range(2)] == [1, 1]


async def test_fastapi_without_the_lifespan_says_what_to_do() -> None:
    async with visitor(with_fastapi(Rows())) as client:
        with pytest.raises(LookupError, match=r"FastAPI\(lifespan=lifespan\(rules, redis\)\)"):
            await client.get("/")


def test_flask_reads_through_the_caches_of_its_application(rules: Path) -> None:
    rows = Rows()
    client = with_flask(rows, rules).test_client()
    assert [client.get("/").text for _ in range(3)] == ["1", "1", "1"]
    client.post("/")
    cookie = client.get_cookie(COOKIE)
    assert cookie is not None
    assert (Visitors("secret").lsn(cookie.value), cookie.http_only, cookie.secure) == (5, True, False)
    assert client.get("/").text == "2", "no watermark has come so far"
    assert with_flask(rows, rules).test_client().get("/").text == "3", "another application has caches of its own"
    client.post("/", base_url="https://localhost")
    cookie = client.get_cookie(COOKIE)
    assert cookie is not None
    assert cookie.secure


def test_flask_without_a_secret_says_what_to_do(rules: Path) -> None:
    with pytest.raises(ValueError, match="give a secret"):
        with_flask(Rows(), rules, secret="")


def test_a_url_of_many_servers_is_refused_with_the_remedy() -> None:
    for make in (connect.client, connect.async_client):
        for url in ("redis+sentinel://a:1,b:2/cache/0", "cache:6379"):
            with pytest.raises(ValueError, match="for Sentinel or a cluster, give a client"):
                make(url)
    given = redis.Redis()
    assert connect.client(given) is given
