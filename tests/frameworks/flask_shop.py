"""A Flask application that reads through the caches; reader/FRAMEWORKS.md shows what is ours in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flask import Blueprint, Flask, jsonify, request
from flask.typing import ResponseReturnValue
from sqlalchemy import create_engine, text
from sqlalchemy.orm import sessionmaker

from cdc_invalidator.reader.commit import commit_lsn
from cdc_invalidator.reader.flask import FlaskCaches
from cdc_invalidator.reader.own_writes import only_read, wrote

RULES = Path(__file__).with_name("rules.yaml")

engine = create_engine(os.environ["DATABASE_URL"])
Session = sessionmaker(engine)
caches = FlaskCaches(lsn=lambda: commit_lsn(engine))
shop = Blueprint("shop", __name__)


def create_app() -> Flask:
    app = Flask(__name__)
    app.secret_key = os.environ["SECRET_KEY"]
    app.config.update(CDC_RULES=RULES, CDC_REDIS=os.environ["REDIS_URL"])
    caches.init_app(app)
    app.register_blueprint(shop)
    return app


def load_user(id: int) -> dict[str, Any] | None:  # noqa: A002
    with Session() as session:
        row = session.execute(text("SELECT id, name FROM users WHERE id = :id"), {"id": id}).mappings().first()
        return dict(row) if row else None


@shop.get("/users/<int:id>")
def user(id: int) -> ResponseReturnValue:  # noqa: A002
    return jsonify(caches.user.get(id=id, load=load_user))


@shop.post("/users/<int:id>")
def rename(id: int) -> ResponseReturnValue:  # noqa: A002
    _rename(id, request.args["name"])
    return jsonify(load_user(id))


def _rename(number: int, name: str) -> None:
    with Session.begin() as session:
        session.execute(text("UPDATE users SET name = :name WHERE id = :id"), {"id": number, "name": name})


@shop.get("/users/<int:id>/touch")
def touch(id: int) -> ResponseReturnValue:  # noqa: A002
    _rename(id, "touched")
    wrote(commit_lsn(engine))
    return jsonify(caches.user.get(id=id, load=load_user))


@shop.post("/search")
def search() -> ResponseReturnValue:
    only_read()
    return jsonify(caches.user.get(id=1, load=load_user))
