"""Token ids to text as they come: whole characters only, cut at a stop string."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """The text of one sequence's output. Never gives a part of a character; special tokens have no text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._shown: list[int] = []  # the tokens of the last piece of text: what follows may depend on them
        self._pending: list[int] = []

    def feed(self, token_id: int) -> str:
        """The text that `token_id` completes; empty where a character is still open."""
        self._pending.append(token_id)
        text = self._stream.step(self._tokenizer, token_id)
        if text is None:
            return ""
        self._shown, self._pending = self._pending, []
        return str(text)

    def flush(self) -> str:
        """What is left when no more tokens come: a character that stayed open becomes a replacement character."""
        shown = self._decode(self._shown)
        rest = self._decode(self._shown + self._pending)[len(shown) :]
        self._pending = []
        return rest

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))


class StopMatcher:
    """Finds the first stop string in text that comes in pieces, and holds back what might be the beginning of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.is_stopped = False

    def feed(self, text: str) -> str:
        """The text that is safe to show. After a stop string: what precedes it, then nothing more."""
        if not self._stops or self.is_stopped:
            return "" if self.is_stopped else text
        self._held += text
        found = [at for at in map(self._held.find, self._stops) if at >= 0]
        if found:
            self.is_stopped = True
            safe, self._held = self._held[: min(found)], ""
            return safe
        keep = len(self._held) - self._longest_open_prefix()
        safe, self._held = self._held[:keep], self._held[keep:]
        return safe

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        safe, self._held = self._held, ""
        return safe

    def _longest_open_prefix(self) -> int:
        longest_stop = max(map(len, self._stops))
        for length in range(min(len(self._held), longest_stop - 1), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
