"""What a decorated function is: it reads through its cache, and has a few more ways. Types only.

At run time it is a plain function with attributes, so that frameworks and `functools.wraps` find what they look for.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from typing import Any, Concatenate, ParamSpec, Protocol, Self, TypeVar, final, overload

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
S = TypeVar("S")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
V_contra = TypeVar("V_contra", contravariant=True)


@final
class Untyped:
    """Stands for the values of a cache without a type: only there, functions keep whatever they return."""


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


class CachedFunctionIgnoring(CachedFunction[P, T_co], Protocol[P, T_co]):
    """A function with arguments that are no parameters."""

    def invalidate(self, *args: Any, **kwargs: Any) -> bool:
        """Delete the entry; arguments that are no parameters may be left out. False if Redis failed."""
        ...


class Decorator(Protocol[V_contra]):
    """Decorates a function that returns values of the cache, or None."""

    @overload
    def __call__(
        self,
        function: None = None,
        /,
        *,
        params: Mapping[str, str] | None = None,
        primary: Callable[..., Any] | None = None,
    ) -> Decorator[V_contra]: ...

    @overload
    def __call__(
        self,
        function: None = None,
        /,
        *,
        ignore: Collection[str],
        params: Mapping[str, str] | None = None,
        primary: Callable[..., Any] | None = None,
    ) -> DecoratorIgnoring[V_contra]: ...

    @overload
    def __call__(self: Decorator[Untyped], function: Callable[P, R], /) -> CachedFunction[P, R]: ...

    @overload
    def __call__(self, function: Callable[P, V_contra], /) -> CachedFunction[P, V_contra]: ...

    @overload
    def __call__(self, function: Callable[P, V_contra | None], /) -> CachedFunction[P, V_contra | None]: ...


class DecoratorIgnoring(Protocol[V_contra]):
    """Decorates a function with arguments that are no parameters."""

    @overload
    def __call__(self: DecoratorIgnoring[Untyped], function: Callable[P, R], /) -> CachedFunctionIgnoring[P, R]: ...

    @overload
    def __call__(self, function: Callable[P, V_contra], /) -> CachedFunctionIgnoring[P, V_contra]: ...

    @overload
    def __call__(self, function: Callable[P, V_contra | None], /) -> CachedFunctionIgnoring[P, V_contra | None]: ...


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


class AsyncCachedFunctionIgnoring(AsyncCachedFunction[P, T_co], Protocol[P, T_co]):
    """A coroutine function with arguments that are no parameters."""

    def invalidate(self, *args: Any, **kwargs: Any) -> Coroutine[Any, Any, bool]:
        """Delete the entry; arguments that are no parameters may be left out. False if Redis failed."""
        ...


class AsyncDecorator(Protocol[V_contra]):
    """Decorates a coroutine function that returns values of the cache, or None."""

    @overload
    def __call__(
        self,
        function: None = None,
        /,
        *,
        params: Mapping[str, str] | None = None,
        primary: Callable[..., Any] | None = None,
    ) -> AsyncDecorator[V_contra]: ...

    @overload
    def __call__(
        self,
        function: None = None,
        /,
        *,
        ignore: Collection[str],
        params: Mapping[str, str] | None = None,
        primary: Callable[..., Any] | None = None,
    ) -> AsyncDecoratorIgnoring[V_contra]: ...

    @overload
    def __call__(
        self: AsyncDecorator[Untyped], function: Callable[P, Awaitable[R]], /
    ) -> AsyncCachedFunction[P, R]: ...

    @overload
    def __call__(self, function: Callable[P, Awaitable[V_contra]], /) -> AsyncCachedFunction[P, V_contra]: ...

    @overload
    def __call__(
        self, function: Callable[P, Awaitable[V_contra | None]], /
    ) -> AsyncCachedFunction[P, V_contra | None]: ...


class AsyncDecoratorIgnoring(Protocol[V_contra]):
    """Decorates a coroutine function with arguments that are no parameters."""

    @overload
    def __call__(
        self: AsyncDecoratorIgnoring[Untyped], function: Callable[P, Awaitable[R]], /
    ) -> AsyncCachedFunctionIgnoring[P, R]: ...

    @overload
    def __call__(self, function: Callable[P, Awaitable[V_contra]], /) -> AsyncCachedFunctionIgnoring[P, V_contra]: ...

    @overload
    def __call__(
        self, function: Callable[P, Awaitable[V_contra | None]], /
    ) -> AsyncCachedFunctionIgnoring[P, V_contra | None]: ...
