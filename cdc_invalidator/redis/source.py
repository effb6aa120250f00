"""Where the address of Redis is read: again for each connection, since passwords are rotated, and tokens expire."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from cdc_invalidator import errors
from cdc_invalidator.redis.endpoint import Endpoint
from cdc_invalidator.redis.node import Node


class EndpointSource:
    """Gives the endpoint of now to each connection that is opened.

    Args:
        read: returns what CDC_REDIS_URL says.

    Raises:
        errors.WrongSettings: it can't be used.
    """

    def __init__(self, read: Callable[[], str]) -> None:
        self._read = read
        endpoint = self._checked()
        self.kind = endpoint.kind
        # Where it led when it was last read, for people.
        self.place = endpoint.place

    @classmethod
    def fixed(cls, url: str) -> Self:
        """Return one that always gives the same."""
        return cls(lambda: url)

    def now(self) -> Endpoint:
        """Return the endpoint.

        Raises:
            errors.RedisUnavailable: it was right at the start, and is not any more.
        """
        try:
            endpoint = self._checked()
        except errors.WrongSettings as error:
            raise errors.RedisUnavailable(str(error), code="SETTING", report=True) from None
        if endpoint.kind != self.kind:
            sentence = "CDC_REDIS_URL names another kind of Redis than at the start; restart the daemon."
            raise errors.RedisUnavailable(sentence, code="SETTING", report=True)
        self.place = endpoint.place
        return endpoint

    def _checked(self) -> Endpoint:
        endpoint = Endpoint.parse(self._read())
        # The driver reads its options when it is made.
        Node(endpoint.url if endpoint.kind == "server" else endpoint.at(endpoint.addresses[0]))
        return endpoint
