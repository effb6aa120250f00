"""A FastAPI application that reads through the caches; reader/FRAMEWORKS.md shows what is ours in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from cdc_invalidator.reader.commit import acommit_lsn
from cdc_invalidator.reader.fastapi import AppCaches, OwnWrites, lifespan
from cdc_invalidator.reader.own_writes import only_read, wrote

RULES = Path(__file__).with_name("rules.yaml")

engine = create_async_engine(os.environ["DATABASE_URL"])
Session = async_sessionmaker(engine)
app = FastAPI(lifespan=lifespan(RULES, os.environ["REDIS_URL"]))
app.add_middleware(OwnWrites, secret=os.environ["SECRET_KEY"], lsn=lambda: acommit_lsn(engine))


async def load_user(id: int) -> dict[str, Any] | None:  # noqa: A002
    async with Session() as session:
        found = await session.execute(text("SELECT id, name FROM users WHERE id = :id"), {"id": id})
        row = found.mappings().first()
        return dict(row) if row else None


@app.get("/users/{id}")
async def user(id: int, caches: AppCaches) -> Any:  # noqa: A002
    return await caches.user.get(id=id, load=load_user)


@app.post("/users/{id}")
async def rename(id: int, name: str) -> Any:  # noqa: A002
    await _rename(id, name)
    return await load_user(id)


async def _rename(number: int, name: str) -> None:
    async with Session.begin() as session:
        await session.execute(text("UPDATE users SET name = :name WHERE id = :id"), {"id": number, "name": name})


@app.get("/users/{id}/touch")
async def touch(id: int, caches: AppCaches) -> Any:  # noqa: A002
    await _rename(id, "touched")
    wrote(await acommit_lsn(engine))
    return await caches.user.get(id=id, load=load_user)


@app.post("/search")
async def search(caches: AppCaches) -> Any:
    only_read()
    return await caches.user.get(id=1, load=load_user)
