"""Which device holds which heads, where keys and values have fewer heads than queries.

A device holds whole *slots*: a key/value head and the query heads that use it. With fewer
key/value heads than devices a head is copied to several slots, its query heads dealt out over the
copies; slots left over are padding (zero weights). Pure arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

PADDING = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSlots:
    """The heads of every slot, device after device.

    Attributes:
        kv: the key/value head of each slot, -1 for a padding slot.
        query: the query heads of each slot back to back, -1 for padding; `group` a slot.
    """

    kv: tuple[int, ...]
    query: tuple[int, ...]

    @property
    def group(self) -> int:
        """Query heads of a slot, padding included."""
        return len(self.query) // len(self.kv)

    @property
    def copies(self) -> tuple[int, ...]:
        """In how many slots each slot's key/value head is held (1 for padding)."""
        return tuple(1 if head == PADDING else self.kv.count(head) for head in self.kv)


def head_slots(num_heads: int, num_kv_heads: int, devices: int) -> HeadSlots:
    """Spread heads over devices with as few slots a device as possible.

    Args:
        num_heads: query heads, a multiple of `num_kv_heads`.
        devices: how many share them; the number of slots is a multiple of it.
    """
    per_kv = num_heads // num_kv_heads
    most_copies = max(1, devices // num_kv_heads)
    group = -(-per_kv // most_copies)
    copies = -(-per_kv // group)
    kv = [head for head in range(num_kv_heads) for _ in range(copies)]
    query = [
        head * per_kv + i if i < per_kv else PADDING
        for head in range(num_kv_heads)
        for i in range(copies * group)
    ]
    slots = -(-len(kv) // devices) * devices
    kv += [PADDING] * (slots - len(kv))
    query += [PADDING] * (slots * group - len(query))
    return HeadSlots(kv=tuple(kv), query=tuple(query))
