"""Weight files of every kind behind one seam: names, shapes, and tensors in Hugging Face's layout.

`SafetensorsFolder` (in `model.checkpoint`), `GGUFFile` and `Fp8Checkpoint` are `Checkpoint`s;
`parameter_views` and the loader need nothing else, and read only the slices that a device needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Checkpoint(Protocol):
    """The tensors of one model.

    Attributes:
        shapes: name (Hugging Face's) and shape of every tensor.
    """

    shapes: Mapping[str, tuple[int, ...]]

    def tensor(self, name: str) -> Any:
        """A NumPy array (memory-mapped) or a `LazyMatrix`: read slice by slice."""
