"""What the command line answers before a command does anything."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from cdc_invalidator import cli, settings
from cdc_invalidator.commands import healthcheck


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["rum"], "No such command 'rum'"),
        (["run", "--slots", "a"], "No such option '--slots'"),
        (["run", "--slot"], "Option '--slot' requires an argument"),
        (["run", "extra"], "unexpected extra argument"),
        (["check", "--format", "text"], "'text' is not one of 'table', 'json'"),
        (["bust"], "Missing argument 'CACHE'"),
        (["demo", "--seconds", "0"], "not in the range x>=1"),
        (["healthcheck", "--http-port", "x"], "'x' is not a valid integer"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_the_reason(words: list[str], reason: str) -> None:
    ended = CliRunner().invoke(cli.app, words)
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert reason in ended.stderr


@pytest.mark.parametrize("address", ["postgresql://u:Zq9xW7@h/db", "redis://u:Zq9 xW7@h", "user=u password=Zq9xW7"])
def test_an_address_in_the_wrong_place_is_not_repeated(address: str) -> None:
    for words in (["run", address], [address], ["setup", "--format", address], ["check", "--format", address]):
        ended = CliRunner().invoke(cli.app, words)
        assert ended.exit_code == 2
        assert "Zq9" not in ended.output
        assert "xW7" not in ended.output


def test_the_help_of_a_command_names_type_variable_and_default_of_each_setting() -> None:
    shown = CliRunner().invoke(cli.app, ["run", "--help"]).stdout
    flags = {each.split()[0]: " ".join(each.split()) for each in shown.split("\n  --")[1:]}
    for name, setting in settings.fields(settings.Settings).items():
        flag = settings.flag(name).removeprefix("--")
        if name in settings.RENAMED:
            assert flag not in flags
            continue
        assert "|".join(setting.variants) in flags[flag]
        assert f"[env: {settings.variable(name)}" in flags[flag]
        assert flags[flag].endswith("required]" if setting.required else f"{setting.shown_default}]")


def test_control_c_ends_a_command_with_130_and_no_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_port: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(healthcheck, "check", interrupted)
    ended = CliRunner().invoke(cli.app, ["healthcheck"])
    assert (ended.exit_code, ended.output) == (130, "")
