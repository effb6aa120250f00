"""The pages: each can be found from another, and each link leads somewhere."""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING

import pytest
from paths import PACKAGE, ROOT

from cdc_invalidator import settings
from cdc_invalidator.cli import app

if TYPE_CHECKING:
    from pathlib import Path

FOLDERS = ("cdc_invalidator", "deploy", "rules", "tests")
PAGES = [ROOT / "README.md", *sorted(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]


def links(page: Path) -> set[str]:
    without_code = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {link for link in re.findall(r"\]\(([^)]+)\)", without_code) if "://" not in link}


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    for link in links(page):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_each_page_is_linked_from_another() -> None:
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in PAGES
        for link in links(page)
        if not link.startswith("#")
    }
    assert {page for page in PAGES[1:] if page.resolve() not in linked} == set()


def test_the_front_page_stays_a_front_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def rows(page: Path, section: str) -> list[list[str]]:
    """Give the cells of the first table of a section."""
    text = page.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    table = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_table_of_settings_has_each_with_its_default() -> None:
    shown: dict[str, str] = {}
    for names, defaults, _ in rows(ROOT / "deploy" / "README.md", "Settings"):
        values = code(defaults) or [defaults] * len(code(names))
        shown |= dict(zip(code(names), values, strict=True))
    fields = {
        settings.PREFIX + name.upper(): field
        for name, field in settings.fields(settings.Settings).items()
        if name not in settings.RENAMED
    }
    assert shown.keys() == fields.keys()
    for name, field in fields.items():
        if shown[name] == "(required)":
            assert field.required, name
        elif shown[name] in {"(none)", "(random)"}:
            assert not field.default, name
        else:
            assert field.shown_default == shown[name], name


def test_the_table_of_commands_has_each() -> None:
    shown = [name.split()[0] for cells in rows(ROOT / "README.md", "Commands") for name in code(cells[0])]
    assert set(shown) == app.commands.keys()


def test_the_figures_of_the_front_page_are_those_that_were_measured() -> None:
    measured = " ".join((ROOT / "tests" / name / "README.md").read_text() for name in ("bench", "consistency"))
    for what, figure, than in rows(ROOT / "README.md", "Speed and consistency"):
        for number in re.findall(r"\d[\d.,]*\d", f"{what} {figure} {than}"):
            assert number in measured, number


def test_what_the_maintainers_page_names_is_in_the_file_that_it_names() -> None:
    page = PACKAGE / "README.md"
    named = re.findall(r"`(\w+)` in \[[^]]+\]\(([^)]+)\)", page.read_text())
    assert len(named) >= 4
    for name, file in named:
        assert re.search(rf"\b{name}\b", (page.parent / file).read_text()), name


def test_the_layers_on_the_maintainers_page_are_those_that_are_checked() -> None:
    shown = (PACKAGE / "README.md").read_text().split("Imports go down only:\n\n```\n")[1].split("```")[0].splitlines()
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["id"] == "layers")
    assert [line.split() for line in shown] == [layer.split(" | ") for layer in layers if layer != "__main__"]
