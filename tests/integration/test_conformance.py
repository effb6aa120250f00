"""The vectors of the fill contract: the library passes, so do clients that share nothing with it, a wrong one fails."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conformance.runner import VECTORS, Broken, Runner, names

from cdc_invalidator import reader
from cdc_invalidator.embedded.servers import Valkey
from cdc_invalidator.reader import scripts
from cdc_invalidator.reader.keys import Keys
from cdc_invalidator.reader.spelling import NoKey, maker
from cdc_invalidator.rules.load import parse_rules

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(__file__).parents[1] / "conformance"
CONTRACT = Path(reader.__file__).with_name("CONTRACT.md")
CLIENTS = {
    "the library": [sys.executable, FOLDER / "library.py"],
    "a client of its own": [sys.executable, FOLDER / "independent.py"],
    "a client in JavaScript": ["node", FOLDER / "independent.js"],
    "a client without the fence": [sys.executable, FOLDER / "unfenced.py"],
}


@pytest.fixture(scope="module")
def server() -> Iterator[Valkey]:
    with Valkey() as valkey:
        yield valkey


def runner(client: str, server: Valkey, folder: Path) -> Runner:
    program, path = CLIENTS[client]
    if shutil.which(str(program)) is None:
        pytest.skip(f"no {program} on this machine")
    return Runner([str(program), str(path)], server.port, folder)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("client", ["the library", "a client of its own", "a client in JavaScript"])
def test_who_keeps_the_contract_passes(client: str, name: str, server: Valkey, tmp_path: Path) -> None:
    runner(client, server, tmp_path).run(name)


@pytest.mark.parametrize(
    "name",
    [
        "a bust that overtakes a fill drops it",
        "wherever commit and bust come, what is read afterwards is new",
        "a lease that ran out, and is somebody else's now, stores nothing and takes nothing away",
        "a command that the network delivers once more, after the bust, brings no old value back",
        "with both, so does a bump",
        "wherever a master that lags takes over, a read that asks for an LSN is served nothing older, of plain",
    ],
)
def test_who_stores_without_looking_at_the_lease_is_found_out(name: str, server: Valkey, tmp_path: Path) -> None:
    with pytest.raises(Broken):
        runner("a client without the fence", server, tmp_path).run(name)


@pytest.mark.parametrize("vector", json.loads(VECTORS.read_text())["spelling"], ids=json.dumps)
def test_the_library_writes_a_parameter_as_its_column_prints_it(vector: dict[str, Any]) -> None:
    make = maker("id", vector["type"], {"DateStyle": "ISO, MDY", "TimeZone": "UTC", "bytea_output": "hex"})
    if vector["gives"] is None:
        with pytest.raises(NoKey, match="spelling"):
            make(vector["value"])
    else:
        assert make(vector["value"]).decode() == vector["gives"]


@pytest.mark.parametrize("vector", json.loads(VECTORS.read_text())["keys"], ids=lambda vector: vector["key"])
def test_the_library_renders_the_keys_of_the_vectors(vector: dict[str, Any]) -> None:
    text = json.dumps({"version": 1, "caches": {"conf": {"key": vector["key"]}}})
    keys = Keys(parse_rules([("rules.yaml", text)], {}).caches["conf"])
    if vector["gives"] is None:
        with pytest.raises(NoKey):
            keys.of(vector["params"])
    else:
        assert keys.of(vector["params"])[0].decode() == vector["gives"]


def test_every_word_of_the_vectors_is_explained() -> None:
    book = json.loads(VECTORS.read_text())
    words = set()
    for vector in book["vectors"]:
        words |= vector.keys() - {"name", "cache"} | {*vector.get("interleave", ()), *vector.get("begin", ())}
        for step in vector.get("steps", ()):
            read = step.get("get", {})
            words |= read.keys() - {"then"}
            words |= {*step.get("do", ()), *step.get("check", ()), *read.get("meanwhile", ()), *read.get("then", ())}
    assert {"refuse" if word.startswith("refuse ") else word for word in words} == book["about"].keys()


def test_the_scripts_of_the_contract_are_those_of_the_library() -> None:
    told = dict(re.findall(r"```lua\n-- (\w+)(\n.*?)```", CONTRACT.read_text(), re.DOTALL))
    assert told
    assert told == {name: getattr(scripts, name) for name in told}


def test_the_contract_names_every_script_and_no_other() -> None:
    ours = {name for name, value in vars(scripts).items() if name.isupper() and isinstance(value, str)}
    named = set(re.findall(r"`([A-Z]{4,})`", CONTRACT.read_text())) & ours
    assert named == ours
