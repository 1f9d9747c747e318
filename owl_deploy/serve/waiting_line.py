"""Sequences that wait for a place: clients take turns, and each client's own come in the order they arrived."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

__all__ = ["WaitingLine"]

Item = TypeVar("Item")


class WaitingLine(Generic[Item]):
    """A queue in which a client with a thousand requests delays another's first one by one of them. Not thread-safe."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, deque[Item]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def push(self, client: str, item: Item) -> None:
        """Let an item of a client wait."""
        self._clients.setdefault(client, deque()).append(item)

    def pop(self) -> Item:
        """Take the next item; its client then is last in turn. Raises KeyError when none waits."""
        client, items = self._clients.popitem(last=False)
        item = items.popleft()
        if items:
            self._clients[client] = items
        return item

    def remove(self, client: str, item: Item) -> bool:
        """Take an item out of turn; returns whether it was waiting."""
        items = self._clients.get(client)
        if items is None or item not in items:
            return False
        items.remove(item)
        if not items:
            del self._clients[client]
        return True

    def take_all(self) -> list[Item]:
        """Empty the line; returns what waited."""
        items = [item for waiting in self._clients.values() for item in waiting]
        self._clients.clear()
        return items
