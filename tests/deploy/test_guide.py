"""deploy/README.md: what it names is there, and its commands do what it says, as far as no cluster is needed."""

from __future__ import annotations

import re
import shlex

import charts
import yaml
from manifests import DEPLOY, kustomize, schema_problems
from running import command

from cdc_invalidator import __version__

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
