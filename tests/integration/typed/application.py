"""An application that reads through the caches, as a type checker sees it. It is never run.

Each line with a mistake ends in `# wrong`; nothing else may be found.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, assert_type

import redis
import redis.asyncio
from shop_caches import AsyncCaches, AsyncUserCache, Caches, UserCache

from cdc_invalidator import reader
from cdc_invalidator.reader import JSON, TEXT, Options, testing, unsafe_pickle
from cdc_invalidator.reader.commit import commit_lsn


@dataclass
class User:
    id: int
    name: str


caches = Caches.from_rules("rules.yaml", redis.Redis(), options=Options[Any](lease=5.0))
users = caches.user.of(User)
acaches = AsyncCaches.from_rules("rules.yaml", redis.asyncio.Redis())


def load_user(id: int) -> User | None:
    return User(id, "Ada")


def load_users(ids: Sequence[int]) -> dict[int, User]:
    return {id: User(id, "Ada") for id in ids}


def load_otherwise_named(number: int) -> User | None:
    return User(number, "Ada")


def load_by_text(id: str) -> User | None:
    return User(int(id), "Ada")


def load_text(id: int) -> str:
    return str(id)


async def aload_user(id: int) -> User | None:
    return User(id, "Ada")


async def aload_text(id: int) -> str:
    return str(id)


async def aload_by_text(id: str) -> User | None:
    return User(int(id), "Ada")


def load_of_session(session: object, id: int) -> User | None:
    return User(id, str(session))


def load_session(token: uuid.UUID, day: dt.date) -> User | None:
    return User(token.int, str(day))


# ── Right ────────────────────────────────────────────────────────────────────────────────────────────────────────────

assert_type(users, UserCache[User])
assert_type(users.get(id=42, load=load_user), User | None)
assert_type(users.get(id=42, load=lambda id: User(id, "Ada")), User | None)
assert_type(users.get_many([1, 2], load=load_users), list[User | None])
assert_type(users.get_many([1, 2], load=lambda ids: [User(each, "") for each in ids]), list[User | None])
assert_type(users.warm([1, 2], load=load_user, rate=5), int)
assert_type(users.invalidate(id=42), bool)
assert_type(users.using(lease=5.0), UserCache[User])
assert_type(caches.user.using(serializer=TEXT), UserCache[str])
assert_type(caches.user.using(serializer=unsafe_pickle(User), schema=2), UserCache[User])
assert_type(caches.user.of(dict[str, int]), UserCache[dict[str, int]])
assert_type(caches.at_least(7).user.of(User).get(id=42, load=load_user, max_staleness=5), User | None)
assert_type(caches["user"].of(User), UserCache[User])
with users.writing(id=42) as write, caches.local("user"):
    assert_type(write.set(User(42, "Ada")), bool)
assert_type(
    caches.session.of(User).get(token=uuid.uuid4(), day=dt.date(2026, 1, 1), load=load_session, connection=None),
    User | None,
)
caches.session.get_many([{"token": uuid.uuid4(), "day": dt.date(2026, 1, 1)}], load=lambda items: [None for _ in items])
caches.unknown.get(thing="text", load=lambda thing: thing)
caches.unknown.get(thing=uuid.uuid4(), load=lambda thing: thing)
caches.odd.get({"class": 7}, load=lambda **given: given)
caches.all.get(load=lambda: 7)
caches["team-members"].invalidate(team=7, kind="admin")
caches.team_members.invalidate(team=7, kind="admin")


@users.cached
def cached_user(id: int) -> User | None:
    return User(id, "Ada")


@caches.user.of(User).cached(ignore=["session"])
def user_of_session(session: object, id: int = 7) -> User:
    return User(id, str(session))


assert_type(cached_user(42), User | None)
assert_type(user_of_session(object()), User)
assert_type(users.cached(load_user).invalidate(42), bool)
assert_type(users.cached(load_user).refresh(id=42), User | None)
assert_type(users.cached(ignore=["session"])(load_of_session).invalidate(id=42), bool)
assert_type(users.cached(params={"id": "number"})(load_otherwise_named).invalidate(number=42), bool)
assert_type(user_of_session.invalidate(id=42), bool)
assert_type(user_of_session.refresh(object(), 42), User)
assert_type(caches.user.cached(load_text)(42), str)
assert_type(caches.user.cached(ignore=["session"])(load_of_session)(object(), id=42), User | None)
assert_type(caches.session.of(User).cached(load_session)(uuid.uuid4(), dt.date(2026, 1, 1)), User | None)
caches.unknown.cached(lambda thing: thing)
caches.odd.cached(load_user)
caches.all.cached(lambda: 7)


async def awaiting() -> None:
    assert_type(acaches.user.of(User), AsyncUserCache[User])
    assert_type(await acaches.user.of(User).get(id=42, load=aload_user), User | None)
    assert_type(await acaches.user.of(User).get(id=42, load=load_user), User | None)
    async with acaches.user.of(User).writing(id=42) as awrite:
        assert_type(await awrite.set(None), bool)

    @acaches.user.of(User).cached
    async def acached_user(id: int) -> User | None:
        return User(id, "Ada")

    assert_type(await acached_user(42), User | None)
    assert_type(await acached_user.invalidate(id=42), bool)
    assert_type(await acaches.user.cached(aload_text)(42), str)
    acaches.user.of(User).cached(aload_text)  # wrong
    acaches.user.cached(aload_by_text)  # wrong
    acaches.user.cached(load_user)  # wrong
    acaches.user.of(User).cached(ignore=["session"])(aload_text)  # wrong
    await acached_user("42")  # wrong
    await acaches.user.get(id="42", load=aload_user)  # wrong
    await acaches.user.of(str).get(id=42, load=aload_user)  # wrong
    acaches.usr  # wrong


# What takes the library's own classes takes these.
def of_the_library(some: reader.Caches, one: reader.Cache[Any]) -> None:
    testing.bust(one, id=42)
    testing.bust(one, {"id": 42})
    testing.clear(some)


of_the_library(caches, caches.user)
with testing.in_memory(caches) as in_memory:
    assert_type(in_memory.user, UserCache[Any])
    testing.bust(in_memory.user, id=42)
    testing.bust(acaches.user, id=42)
    testing.bust(in_memory.odd, {"class": 7})
    testing.bust(in_memory.user, idd=42)  # wrong
    testing.bust(acaches.user, id="42")  # wrong

# ── Wrong ────────────────────────────────────────────────────────────────────────────────────────────────────────────

caches.usr  # wrong
caches["usr"]  # wrong
caches.local("usr")  # wrong
caches.user.get(ids=42, load=load_user)  # wrong
caches.user.get(load=load_user)  # wrong
caches.user.get(id=42, more=1, load=load_user)  # wrong
caches.user.get(id="42", load=load_user)  # wrong
caches.user.get(id=None, load=load_user)  # wrong
caches.user.get(id=42)  # wrong
caches.user.get(id=42, load=load_otherwise_named)  # wrong
caches.user.get(id=42, load=load_by_text)  # wrong
caches.user.get(id=42, load=load_user, max_stalenes=5)  # wrong
caches.user.of(User).get(id=42, load=load_text)  # wrong
caches.user.get_many(["1"], load=load_users)  # wrong
caches.user.of(str).get_many([1], load=load_users)  # wrong
caches.user.invalidate(ids=42)  # wrong
caches.user.writing(id="42")  # wrong
caches.user.using(leas=5.0)  # wrong
caches.user.using(lease="5")  # wrong
caches.session.get(token="text", day=dt.date(2026, 1, 1), load=load_session)  # wrong
caches.session.invalidate(token=uuid.uuid4())  # wrong
caches.unknown.invalidate(thing=1.5)  # wrong
caches.odd.invalidate({"clas": 7})  # wrong
cached_user("42")  # wrong
cached_user(ids=42)  # wrong
user_of_session()  # wrong
users.cached(load_text)  # wrong
users.cached(load_otherwise_named)  # wrong
users.cached(load_by_text)  # wrong
users.cached(aload_user)  # wrong
caches.user.cached(load_otherwise_named)  # wrong
caches.user.cached(load_by_text)  # wrong
users.cached(load_of_session)  # wrong
caches.unknown.cached(load_user)  # wrong
caches.all.cached(load_user)  # wrong
users.cached(ignore=["session"])(load_text)  # wrong
users.cached(params={"id": "number"})(load_text)  # wrong
cached_user.invalidate()  # wrong
user_of_session.refresh(id=42)  # wrong
with users.writing(id=42) as wrong_write:
    wrong_write.set("Ada")  # wrong

# ── Without the module that `handles` writes ─────────────────────────────────────────────────────────────────────────

plain = reader.Caches.from_rules("rules.yaml", redis.Redis())
assert_type(plain.user, reader.Cache[Any])
assert_type(plain.user.of(User), reader.Cache[User])
assert_type(plain.user.of(User).get(id=42, load=load_user), User | None)
assert_type(plain.user.of(User).using(wait=1.0).get_many([42], load=load_users), list[User | None])
assert_type(plain.user.using(serializer=JSON), reader.Cache[Any])
assert_type(plain.at_least(commit_lsn(object())).user.get({"id": 42}, load=load_user), Any | None)


@plain.user.of(User).cached
def plainly(id: int) -> User | None:
    return User(id, "Ada")


assert_type(plainly(42), User | None)
assert_type(plain.user.cached(load_text)(42), str)
plain.user.of(User).cached(load_text)  # wrong
plainly("42")  # wrong
plain.user.of(User).get(id=42, load=load_text)  # wrong
plain.user.using(leas=5.0)  # wrong
plain.user.of(User).get_many([42], load=lambda ids: [load_text(each) for each in ids])  # wrong
