"""What a model writes, as text for a terminal."""

import codecs
from collections.abc import Sequence


class TextStream:
    """Bytes as they come, valid UTF-8 as they can be shown.

    A character of which bytes are missing waits for them; what is no UTF-8 becomes U+FFFD. The text ends before that
    of `stops`, byte strings, which is whole first; what may be the beginning of one waits until it is known.

    Raises ValueError for an empty stop.
    """

    def __init__(self, stops: Sequence[bytes] = ()) -> None:
        if not all(stops):
            raise ValueError("a stop must have at least one byte: every text ends before an empty one")
        self.stopped = False
        self._stops = stops
        self._held = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes) -> bytes:
        """What can be shown now that `data` has come; nothing once the text has stopped."""
        if self.stopped:
            return b""
        self._held += data
        found = [(place + len(stop), place) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            # The one that is whole first, so that nothing depends on how the bytes were cut.
            shown, self._held = self._held[: min(found)[1]], b""
            return self._decoder.decode(shown, final=True).encode()
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return self._decoder.decode(shown).encode()

    def close(self) -> bytes:
        """What was held back, where no more bytes come."""
        shown, self._held = self._held, b""
        return self._decoder.decode(shown, final=True).encode()


def _overlap(text: bytes, stop: bytes) -> int:
    """How many bytes at the end of `text` could be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
