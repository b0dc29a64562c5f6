"""Where the text of an answer ends: stop strings, looked for at a cost per token that does not grow with the answer."""

from collections.abc import Sequence

_WINDOW = 16                    # tokens that stay pending when others are settled
_REPLACEMENT = "\ufffd"


class StopStrings:
    """Looks for ``stops`` in the text of one growing answer; ``decode`` turns token ids into text.

    Only the last tokens are decoded each time. Those before are settled where the text comes apart: a character may be spread
    over several tokens, and bytes that are not UTF-8 yet are shown as U+FFFD. What turns up is looked for in the whole text.
    """

    def __init__(self, stops: Sequence[str], decode, min_tokens: int = 0):
        self._stops, self._decode, self._min_tokens = stops, decode, min_tokens
        self._start = 0         # the first token that is pending
        self._before = ""       # the end of the text before it, one character short of the longest stop string

    def find(self, tokens: list[int]) -> int | None:
        """Where in the text of ``tokens`` the earliest stop string begins, or None; to be called after each token.

        A stop string that ends in the text of the first ``min_tokens`` does not count.
        """
        pending = tokens[self._start :]
        text = self._decode(pending)
        if len(tokens) > self._min_tokens and self._earliest(self._before + text, len(self._before)) is not None:
            first = self._decode(tokens[: self._min_tokens]).rstrip(_REPLACEMENT) if self._min_tokens else ""
            found = self._earliest(self._decode(tokens), len(first))
            if found is not None:
                return found
        if len(pending) >= 2 * _WINDOW:
            self._settle(pending, text)
        return None

    def _earliest(self, text: str, seen: int) -> int | None:
        """The first place of any stop string that ends behind the ``seen`` first characters."""
        places = [text.find(stop, max(0, seen - len(stop) + 1)) for stop in self._stops]
        return min((place for place in places if place >= 0), default=None)

    def _settle(self, pending: list[int], text: str) -> None:
        """Settles pending tokens but for a window; waits for a place between whole characters, though not for ever."""
        most = len(pending) - _WINDOW
        for count in range(most, most - 4, -1):                 # a character has four bytes at most
            settled = self._decode(pending[:count])
            beside = settled[-1:] + text[len(settled) : len(settled) + 1]
            if settled + self._decode(pending[count:]) == text and _REPLACEMENT not in beside:
                break
        else:
            if len(pending) < 4 * _WINDOW:
                return
        longest = max(map(len, self._stops))
        self._before += settled
        self._before = self._before[max(0, len(self._before) - longest + 1) :]
        self._start += count
