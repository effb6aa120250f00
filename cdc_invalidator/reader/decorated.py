"""What a decorated function is: it reads through its cache, and has a few more ways. Types only.

At run time it is a plain function with attributes, so that frameworks and `functools.wraps` find what they look for.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, Self, TypeVar, overload

P = ParamSpec("P")
Q = ParamSpec("Q")
S = TypeVar("S")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class CachedFunction(Protocol[P, T_co]):
    """A function that waits.

    ``load``: the function itself, beside the cache. ``cache``: what it reads through.
    """

    cache: Any
    __name__: str

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T_co:
        """Read through the cache."""
        ...

    def load(self, *args: P.args, **kwargs: P.kwargs) -> T_co:
        """Load, beside the cache."""
        ...

    def invalidate(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Delete the entry; arguments that are no parameters may be left out. False if Redis failed."""
        ...

    def refresh(self, *args: P.args, **kwargs: P.kwargs) -> T_co:
        """Load now, and store the value in place of what is there."""
        ...

    @overload
    def __get__(self, instance: None, owner: Any, /) -> Self: ...

    @overload
    def __get__(
        self: CachedFunction[Concatenate[S, Q], T],
        instance: S,
        owner: Any,
        /,
    ) -> Callable[Q, T]: ...


class AsyncCachedFunction(Protocol[P, T_co]):
    """A coroutine function.

    ``load``: the function itself, beside the cache. ``cache``: what it reads through.
    """

    cache: Any
    __name__: str

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T_co]:
        """Read through the cache."""
        ...

    def load(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T_co]:
        """Load, beside the cache."""
        ...

    def invalidate(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, bool]:
        """Delete the entry; arguments that are no parameters may be left out. False if Redis failed."""
        ...

    def refresh(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T_co]:
        """Load now, and store the value in place of what is there."""
        ...

    @overload
    def __get__(self, instance: None, owner: Any, /) -> Self: ...

    @overload
    def __get__(
        self: AsyncCachedFunction[Concatenate[S, Q], T],
        instance: S,
        owner: Any,
        /,
    ) -> Callable[Q, Coroutine[Any, Any, T]]: ...
