"""Methods of one object that are replaced until they have run once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_ABSENT = object()


class ReplacedMethods:
    """What stands in for methods in an object's own dictionary, and what takes it back.

    Attributes:
        pending: The names of those that were not called yet.
    """

    def __init__(self) -> None:
        self.pending: set[str] = set()
        self._restore: list[Callable[[], None]] = []

    def replace(self, owner: Any, name: str, run: Callable[[Callable[[], Any]], Any]) -> None:
        """Have the next call of a method, which takes no arguments, run something else.

        Args:
            owner: The object.
            name: The method's name.
            run: What is called instead, with the method.
        """
        previous = owner.__dict__.get(name, _ABSENT)

        def restore() -> None:
            self.pending.discard(name)
            if owner.__dict__.get(name) is not once:
                return
            if previous is _ABSENT:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = previous

        def once() -> Any:  # no functools.wraps: Lightning looks through __wrapped__ and would not call it
            restore()
            self._restore.remove(restore)
            return run(getattr(owner, name))

        owner.__dict__[name] = once
        self.pending.add(name)
        self._restore.append(restore)

    def restore_all(self) -> None:
        """Take back what has not run."""
        while self._restore:
            self._restore.pop()()
