"""deploy/README.md: what it names is there, and its commands do what it says, as far as no cluster is needed."""

from __future__ import annotations

import json
import re
import shlex
from typing import TYPE_CHECKING, Any

import charts
import pytest
import yaml
from manifests import DEPLOY, kustomize, schema_problems
from running import RunningDaemon, command, eventually, execute, settled

from cdc_invalidator import __version__
from cdc_invalidator.embedded import shop
from cdc_invalidator.embedded.process import free_port

if TYPE_CHECKING:
    from pathlib import Path

    import redis

ROOT = DEPLOY.parent
TEXT = (DEPLOY / "README.md").read_text()


def commands() -> list[list[str]]:
    """Give the words of each command of the fenced shell blocks."""
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", TEXT, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def begin_with(*words: str) -> list[list[str]]:
    found = [one for one in commands() if one[: len(words)] == list(words)]
    assert found, words
    return found


def test_it_and_the_manifests_name_the_image_of_this_version() -> None:
    assert f"--tag registry.example.com/cdc-invalidator:{__version__} " in TEXT
    for file in ("kustomize/sidecar/sidecar.yaml", "kustomize/standalone/deployment.yaml"):
        assert f"image: cdc-invalidator:{__version__}\n" in (DEPLOY / file).read_text()
    assert f"--tag cdc-invalidator:{__version__} " in (DEPLOY / "image/Dockerfile").read_text()


def test_the_files_that_its_commands_name_are_there() -> None:
    named = [
        re.sub(r".*?(?=deploy/)", "", word).partition(":")[0] for one in commands() for word in one if "deploy/" in word
    ]
    assert len(named) > 8
    for path in named:
        assert (ROOT / path).exists(), path


def test_what_it_applies_can_be_built_and_is_valid() -> None:
    applied = [one[-1] for one in begin_with("kubectl", "apply", "-k")]
    assert len(applied) == 2
    for folder in applied:
        assert list(schema_problems(kustomize(ROOT / folder))) == []


def test_its_helm_command_renders_with_the_secret_that_it_makes() -> None:
    ((*_, first, second),) = begin_with("kubectl", "--namespace", "shop", "create", "secret")
    secret = dict(word.removeprefix("--from-literal=").split("=", 1) for word in (first, second))
    ((_, _, _, release, chart, *words),) = begin_with("helm", "upgrade", "--install")
    assert release == "cdc-invalidator"
    assert (ROOT / chart).samefile(charts.CHART)
    options = dict(zip(words[::2], words[1::2], strict=True))
    assert options.keys() == {"--namespace", "--set", "--set-file"}
    name, _, path = options["--set-file"].partition("=")
    place, _, repository = options["--set"].partition("=")
    assert place == "image.repository"
    values = {
        "image": {"repository": repository},
        "rules": {name.removeprefix("rules.").replace("\\.", "."): (ROOT / path).read_text()},
    }
    assert list(schema_problems(charts.render(values, secret, namespace=options["--namespace"]))) == []


def test_its_rules_pass_the_check_and_the_tests_that_it_runs() -> None:
    runs = begin_with("docker", "run")
    assert [words[6] for words in runs] == ["check", "test"]
    for _, _, _, _, volume, _, *words in runs:
        outside, inside, _ = volume.removeprefix("$PWD/").split(":")
        ran = command(*[str(ROOT / outside) if word == inside else word for word in words])
        assert ran.returncode == 0, ran.stdout + ran.stderr


def test_what_it_shows_of_the_sidecars_kustomization_is_what_the_example_has() -> None:
    (shown,) = re.findall(r"^ *```yaml\n( *components:.*?)^ *```", TEXT, re.MULTILINE | re.DOTALL)
    example = yaml.safe_load((DEPLOY / "kustomize/example/sidecar/kustomization.yaml").read_text())
    assert yaml.safe_load(shown).items() <= example.items()


# Adopt it on your application


ADOPT = TEXT.split("\n## Adopt it on your application\n")[1].split("\n## ")[0]


def step(number: int) -> str:
    return ADOPT.split(f"\n### {number}. ")[1].split("\n### ")[0]


def blocks(number: int, kind: str) -> list[str]:
    """Give the fenced blocks of a kind that a step shows."""
    return re.findall(rf"^```{kind}\n(.*?)^```", step(number), re.MULTILINE | re.DOTALL)


def typed(number: int) -> list[tuple[dict[str, Any], list[str]]]:
    """Give the settings and the words of each command of ours in a step."""
    found = []
    for line in "".join(blocks(number, "sh")).splitlines():
        before, ours, after = line.partition("cdc-invalidator ")
        if ours:
            settings = dict(word.removeprefix("CDC_").lower().split("=", 1) for word in before.split())
            found.append((settings, shlex.split(after)))
    return found


def shown_json(number: int) -> list[dict[str, Any]]:
    return [json.loads(line) for block in blocks(number, "json") for line in re.split(r"\n(?=\{)", block)]


@pytest.fixture
def adopted(database: str, redis_url: str, redis_client: redis.Redis, slot_name: str, tmp_path: Path) -> dict[str, Any]:
    """The settings of commands, after the first step of the guide on the demo's shop."""
    shop.create(database)
    keys = [f"shop:prod:user:{number}{more}" for number in range(1, 240) for more in ("", ":orders")]
    keys += [f"shop:prod:product:{number}{more}" for number in range(1, 60) for more in ("", ":reviews")]
    for key in keys:
        redis_client.set(key, "old", ex=300)
    given = {"postgres_dsn": database, "redis_url": redis_url, "publication": slot_name}
    ((_, words),) = typed(1)
    path = tmp_path / "rules.yaml"
    done = command(*[str(path) if word == path.name else word for word in words], **given)
    assert (done.returncode, done.stderr) == (0, "")
    return {**given, "slot": slot_name, "rules": path}


def test_adoption_writes_the_rules_that_it_shows_and_check_and_explain_say_what_it_shows(
    adopted: dict[str, Any],
) -> None:
    (shown,) = blocks(1, "yaml")
    made = adopted["rules"].read_text().splitlines()
    for line in shown.splitlines():
        assert line in made or re.match(r"\s*# \d+ keys|#   |\s*# .*identity", line), line
    _, changes = blocks(2, "text")
    ends = [command(*words, **{**adopted, **settings}) for settings, words in typed(2)]
    assert [ended.returncode for ended in ends] == [0, 0, 0]
    assert re.search(r"^\d+ notes$", ends[0].stdout, re.MULTILINE)
    assert ends[2].stdout.replace(f"{adopted['rules'].parent}/", "") == changes


def test_adoption_shows_what_observing_and_busting_daemons_tell(
    adopted: dict[str, Any], database: str, redis_client: redis.Redis
) -> None:
    status, stale = shown_json(3)
    (checking, [checked]), (observing, [run]), (_, reporting) = typed(3)
    assert reporting[:-1] == ["observe", "--for"]
    assert (checked, run) == ("check", "run")
    assert checking == observing
    assert command("check", **adopted, **checking).returncode == 0
    reported = command(*reporting[:-1], "1s", **adopted, http_port=free_port())
    assert (reported.returncode, reported.stdout[:12]) == (0, "observed for")
    adopted["dsn"], adopted["slot"] = adopted.pop("postgres_dsn"), adopted.pop("publication")
    with RunningDaemon(**adopted, **observing, observe_grace="0.2") as daemon:
        # All keys are there; whoever is told late of a write could not tell it from one behind the commit.
        daemon.seen("redis_connected")
        execute(database, "UPDATE users SET plan = 'paid' WHERE id = 1")
        assert daemon.seen("stale", cache="user").keys() == stale.keys()
        found = daemon.status()["observed"]
        assert found.keys() == status.keys()
        assert found["worst"][0].keys() == status["worst"][0].keys()
        named = {name for cache in status["caches"] for name in cache}
        assert found["caches"][0].keys() <= named
        assert named - {"absent", "mended", "skipped"} <= found["caches"][0].keys()
        assert daemon.terminate() == 0
    # As in the guide, without the second bust, so that what it would mend is seen.
    text = adopted["rules"].read_text()
    adopted["rules"].write_text(re.sub(r"  again_after.*\n", "", text))
    (_, [checked]), (busting, [run]) = typed(4)
    assert (checked, run) == ("check", "run")
    assert not busting
    (gap,) = shown_json(4)
    verify, overtaken = shown_json(5)
    with RunningDaemon(**adopted, verify_sample="1", observe_grace="0.3") as daemon:
        assert daemon.seen("gap").keys() == gap.keys()
        daemon.ready()
        # The sweep of the start is over; it would delete what is stored below.
        settled(database, redis_client, adopted["slot"])
        redis_client.set("shop:prod:user:2", "old", ex=300)
        execute(database, "UPDATE users SET plan = 'paid' WHERE id = 2")
        eventually(lambda: redis_client.set("shop:prod:user:2", "old", ex=300, nx=True), "a reader stores the old row")
        eventually(lambda: redis_client.set("shop:prod:user:2", "new", ex=300, nx=True), "it is busted once more")
        assert daemon.seen("overtaken", cache="user").keys() == overtaken.keys()
        found = daemon.status()["verify"]
        assert found.keys() == verify.keys()
        assert found["results"]["user"].keys() <= {name for each in verify["results"].values() for name in each}
        assert daemon.terminate() == 0
