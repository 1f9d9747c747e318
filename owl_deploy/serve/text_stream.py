"""Text of a sequence while its tokens arrive: whole characters only, and nothing at or behind a stop string."""

from __future__ import annotations

from tokenizers import Tokenizer

__all__ = ["TextStream"]

# A character has at most four bytes, so that up to three wait for others, each shown as a replacement character or not.
_MOST_WAITING = 3
_REPLACEMENT = "\ufffd"
# Tokens that are decoded again with each new one: what a token's text is depends on those before it.
_LONGEST_WINDOW = 16


class TextStream:
    """The text of one sequence."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        """Start a text. `stop` holds strings, none of them empty, before which it ends."""
        self._tokenizer, self._stop = tokenizer, stop
        self._window: list[int] = []
        """The last tokens."""
        self._n_told = 0
        """Characters of the window's text that are certain."""
        self._held = ""
        self.is_stopped = False
        """Whether a stop string was met."""

    def push(self, token: int) -> str:
        """Add a token; returns the text that is certain now and was not told before."""
        self._window.append(token)
        return self._take(is_last=False)

    def finish(self) -> str:
        """Return what was held back, when no token follows."""
        return "" if self.is_stopped else self._take(is_last=True)

    def _take(self, *, is_last: bool) -> str:
        text = self._decode()
        n_certain = len(text) if is_last else len(text) - _n_waiting(text)
        self._held += text[self._n_told : n_certain]
        self._n_told = max(self._n_told, n_certain)
        if len(self._window) == _LONGEST_WINDOW:
            del self._window[: _LONGEST_WINDOW // 2]
            text = self._decode()
            self._n_told = len(text) - _n_waiting(text)
        return self._before_stop(is_last)

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._window, skip_special_tokens=True)
        return text

    def _before_stop(self, is_last: bool) -> str:
        """Return the held text up to a stop string, or up to what may become one."""
        places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if places:
            self.is_stopped = True
            text, self._held = self._held[: min(places)], ""
            return text
        n_held = 0 if is_last else max((self._n_begun(stop) for stop in self._stop), default=0)
        cut = len(self._held) - n_held
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def _n_begun(self, stop: str) -> int:
        """Return the length of the longest end of the held text with which `stop` begins."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


def _n_waiting(text: str) -> int:
    """Return how many replacement characters at the end of a text the next tokens may turn into others."""
    return min(_MOST_WAITING, len(text) - len(text.rstrip(_REPLACEMENT)))
