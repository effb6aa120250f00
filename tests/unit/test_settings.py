"""The settings: names that were replaced, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdc_invalidator import errors, settings

GIVEN = {"postgres_dsn": "postgresql://db/shop", "redis_url": "redis://cache", "rules": "rules.yaml"}


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def load(**flags: str) -> settings.Settings:
    return settings.load(settings.Settings, GIVEN | flags)


def test_a_setting_is_also_taken_by_its_old_name_from_the_environment_and_from_a_flag(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CDC_POSTGRES_REPLICAS", "postgresql://db2/shop")
    given = load(replica_limit="5")
    assert given.postgres_standbys() == "postgresql://db2/shop"
    assert given.standby_limit == 5
    names, limit = settings.renamed(given)
    assert "CDC_POSTGRES_REPLICAS" in names
    assert "CDC_POSTGRES_STANDBYS" in names
    assert "--replica-limit" in limit
    assert "--standby-limit" in limit


def test_new_names_are_not_worth_a_word() -> None:
    assert settings.renamed(load(postgres_standbys="postgresql://db2/shop", standby_limit="5")) == []


def test_both_names_may_be_given_with_one_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDC_REPLICA_LIMIT", "5")
    assert load(standby_limit="5.0").standby_limit == 5


def test_both_names_with_different_values_are_refused_without_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDC_POSTGRES_REPLICAS", "postgresql://app:topsecret@db2/shop")
    with pytest.raises(errors.WrongSettings, match=r"^CDC_POSTGRES_REPLICAS is the old name of CDC_POSTGRES_STANDBYS"):
        load(postgres_standbys="")
    with pytest.raises(errors.WrongSettings, match=r"^(?!.*secret)"):
        load(postgres_standbys="")


def test_a_wrong_value_is_told_under_the_name_that_was_given() -> None:
    with pytest.raises(errors.WrongSettings, match="CDC_REPLICA_LIMIT is wrong"):
        load(replica_limit="0")


@pytest.mark.parametrize("read", ["tcp://10.0.0.1:9479", "tcp://[fd00::1]:9479", "udp://10.96.7.1:80"])
def test_a_port_that_a_service_of_kubernetes_set_is_told_with_what_was_read(read: str) -> None:
    with pytest.raises(errors.WrongSettings) as caught:
        load(http_port=read)
    assert f"CDC_HTTP_PORT is {read}, which Kubernetes sets" in str(caught.value)
    assert "enableServiceLinks: false" in str(caught.value)


def test_no_other_value_is_shown() -> None:
    with pytest.raises(errors.WrongSettings, match=r"^(?!.*hunter2)"):
        load(http_port="hunter2", standby_limit="tcp://hunter2")


def test_the_password_of_the_example_is_refused_wherever_it_comes_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    example = Path(__file__).parents[2] / "deploy/kustomize/example/standalone/secret"
    monkeypatch.setenv("CDC_SECRETS_DIR", str(example))
    monkeypatch.setenv("CDC_RULES", str(tmp_path))
    for name in ("CDC_POSTGRES_DSN", "CDC_REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(errors.WrongSettings, match="CDC_POSTGRES_DSN has the password of the example"):
        settings.load(settings.Settings, {})
    monkeypatch.setenv("CDC_POSTGRES_DSN", "postgresql://cdc_invalidator:chosen@host/shop")
    with pytest.raises(errors.WrongSettings, match="CDC_REDIS_URL has the password of the example"):
        settings.load(settings.Settings, {})
