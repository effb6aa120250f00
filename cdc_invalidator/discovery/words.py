"""Words of names, so that `user-orders`, `userOrders` and the table `user_orders` compare as equal. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

_PARTS = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|[0-9]+")

# Words that programs, and not people, put into the names of keys: shown even where a single key has them. Whatever else
# occurs in few keys is taken for data.
TECHNICAL = frozenset(
    """
    a active admin agg aggregate aggregates all allowed and api app apps archived auth available banner banners blocked
    by cache cached calendar cart catalog categories category channel channels checkout code codes comments config count
    counter counters counts current daily dash dashboard data day days default defaults denied detail details disabled
    dict digest domain email enabled entries exist exists external feed feeds fields filter filters first flag flags for
    footer free from front frontpage full global group groups guest hash header health history home hour hourly html
    http id ids in index info internal invalid ips is item items job jobs json key keys kind last latest limit limits
    list lists local locale locales lock login logo main map maps master me member members menu menus meta metadata
    month monthly my name names nav navigation new next no none not notification notifications now null of off offers on
    online open options order orders page pages paid parent pending permission permissions ping plan plans policy
    popular posts price prices private prod production products profile profiles promo promotions public queue rank
    ranking rate rates recent remote report reports result results robots role roles root rss rule rules schedule scope
    search sent session sessions set setting settings shop short site sitemap sites slug slugs sort staging stale start
    stat state states static stats status stock sub summary system tag tags temp tenant test timeline to today token
    tokens top total totals translations tree trending type types unavailable unread url urls user username users v
    value values ver version versions view views visits week weekly year yearly
    """.split()  # noqa: SIM905  a list of two hundred would fill a page
)


def words(name: str) -> tuple[str, ...]:
    """Return the words of a name, in lower case and singular: ``("user", "order")`` of ``userOrders``."""
    return tuple(singular(part.lower()) for part in _PARTS.findall(name))


def singular(word: str) -> str:
    """Return a word without the ending of its plural; roughly, and the same for both sides of a comparison."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("sses", "shes", "ches", "xes", "uses")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "sis", "xis", "tis")):
        return word[:-1]
    return word


class Vocabulary:
    """The words that are no data: of caching in general, and of the names in a schema.

    Args:
        names: names of tables and columns.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._of_schema = {word for name in names for word in words(name)}
        self._words = self._of_schema | {singular(word) for word in TECHNICAL}

    def __contains__(self, text: object) -> bool:
        found = words(text) if isinstance(text, str) else ()
        return bool(found) and not found[0].isdigit() and all(word.isdigit() or self._knows(word) for word in found)

    def names(self, text: str) -> bool:
        """Whether a text is made of words of the schema."""
        found = words(text)
        return bool(found) and self._of_schema.issuperset(found)

    def _knows(self, word: str) -> bool:
        """Whether a word is known, or is two known ones in a row: of `tenantProfilesdefault`."""
        return word in self._words or any(
            singular(word[:at]) in self._words and word[at:] in self._words for at in range(4, len(word) - 3)
        )
