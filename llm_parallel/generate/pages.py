"""Who uses which page of the key/value cache. A page holds ``page_tokens`` consecutive tokens of a sequence.

Sequences whose first tokens are the same share the pages that these fill: a full page is known by a digest of all
tokens up to its end. A page that nobody uses any longer keeps its content, and can be shared again, until another
sequence needs the room.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np


def digest_of(before: bytes, tokens: Sequence[int]) -> bytes:
    """Digest of a full page: that of the page before it, then its own tokens."""
    return blake2b(before + np.asarray(tokens, dtype=np.int64).tobytes(), digest_size=16).digest()


class PagePool:
    """Pages 0 to ``num_pages - 1``. Each is in one of three states: free; used by at least one sequence; or kept, which
    is unused with a content that is known by its digest."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        assert num_pages > 0 and page_tokens > 0
        self.num_pages, self.page_tokens = num_pages, page_tokens
        self._users = [0] * num_pages
        self._free = np.ones(num_pages, dtype=bool)
        self._num_free = num_pages
        self._kept: OrderedDict[int, None] = OrderedDict()  # the one unused for longest first
        self._by_digest: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return self._num_free + len(self._kept)

    @property
    def used(self) -> int:
        """Pages that sequences use."""
        return self.num_pages - self.available

    def is_used(self, page: int) -> bool:
        """Whether a sequence uses the page."""
        return self._users[page] > 0

    def take(self, after: int | None = None) -> int:
        """A page for one user, whose content is lost. The one that follows ``after`` in memory if it is free, so that a
        sequence is one stretch of memory that attention can read without a copy; else one with free room behind it."""
        assert self.available, "the caller asks first whether pages are available"
        if not self._num_free:
            page, _ = self._kept.popitem(last=False)
            self._forget(page)
        else:
            page = after + 1 if after is not None else self.num_pages
            if page >= self.num_pages or not self._free[page]:
                page = self._roomy()
            self._free[page] = False
            self._num_free -= 1
        self._users[page] = 1
        return page

    def _roomy(self) -> int:
        """The middle of the longest stretch of free pages, or its start if no sequence grows towards it."""
        edges = np.flatnonzero(np.diff(self._free.astype(np.int8), prepend=0, append=0))
        starts, lengths = edges[::2], edges[1::2] - edges[::2]
        longest = int(lengths.argmax())
        start, length = int(starts[longest]), int(lengths[longest])
        return start + (length // 2 if start and self._users[start - 1] else 0)

    def share(self, pages: Sequence[int]) -> None:
        """Adds a user to pages that ``find`` returned."""
        for page in pages:
            self._kept.pop(page, None)
            self._users[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Takes a user away. The last pages are given up first when room is needed, since without the pages before them
        they are of no use."""
        for page in reversed(pages):
            assert self._users[page] > 0, f"page {page} is released by someone who does not use it"
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._digests:
                self._kept[page] = None
            else:
                self._give_back(page)

    def record(self, page: int, digest: bytes) -> None:
        """Makes a full page known. Where another page with this content is known already, that one stays the known
        one."""
        if digest not in self._by_digest:
            self._by_digest[digest] = page
            self._digests[page] = digest

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The pages with these contents, up to the first that is not there."""
        found = []
        for digest in digests:
            page = self._by_digest.get(digest)
            if page is None:
                break
            found.append(page)
        return found

    def forget(self) -> None:
        """Makes all contents unknown, as a change of the weights does."""
        for page in list(self._kept):
            self._give_back(page)
        self._kept.clear()
        self._by_digest.clear()
        self._digests.clear()

    def _give_back(self, page: int) -> None:
        self._free[page] = True
        self._num_free += 1

    def _forget(self, page: int) -> None:
        del self._by_digest[self._digests.pop(page)]
