"""Who holds which block of the KV pool: users counted, finished prefixes findable, the unused ones evicted in turn.

A block is free, or has users, or has none and is kept: it holds a prefix that somebody may ask for again, until its
memory is needed. No tensors here; ``kv_cache.py`` has those.
"""

from __future__ import annotations

from collections import OrderedDict


class BlockPool:
    """``num_blocks`` blocks by number. Never gives out more than there are; everything is O(1)."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._users = [0] * num_blocks
        self._key: list[bytes | None] = [None] * num_blocks
        self._block: dict[bytes, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # findable blocks without users, the next to go first

    @property
    def available(self) -> int:
        """Blocks without users."""
        return len(self._free) + len(self._kept)

    def users(self, block: int) -> int:
        return self._users[block]

    def take(self) -> int:
        """A block with one user and no key; evicts the prefix nobody has used for longest if none is free.

        Free ones go first, also those never used, whose memory the system has yet to give: prefixes are worth it.
        Raises IndexError if every block has users: the caller looks at ``available`` first.
        """
        if self._free:
            block = self._free.pop()
        elif self._kept:
            block, _ = self._kept.popitem(last=False)
            self._forget(block)
        else:
            raise IndexError(f"take: all {self.num_blocks} blocks have users")
        self._users[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more user of a block that has some, or is kept."""
        if self._users[block] == 0:
            del self._kept[block]
        self._users[block] += 1

    def release(self, block: int) -> None:
        """One user fewer. Without any, the block is kept if it can be found, else free."""
        if self._users[block] < 1:
            raise ValueError(f"release: block {block} has no users")
        self._users[block] -= 1
        if self._users[block] == 0:
            if self._key[block] is None:
                self._free.append(block)
            else:
                self._kept[block] = None

    def find(self, key: bytes) -> int | None:
        return self._block.get(key)

    def publish(self, block: int, key: bytes) -> bool:
        """Let ``block`` be found by ``key``. False, and nothing changes, where another block has it already."""
        if self._key[block] is not None or key in self._block:
            return False
        self._key[block], self._block[key] = key, block
        return True

    def retract(self, block: int) -> None:
        """Let it not be found any more: what it was to hold did not get there."""
        self._forget(block)
        if block in self._kept:
            del self._kept[block]
            self._free.append(block)

    def _forget(self, block: int) -> None:
        key = self._key[block]
        if key is not None:
            del self._block[key]
            self._key[block] = None
