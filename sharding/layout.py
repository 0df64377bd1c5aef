"""Which devices do what: the arithmetic of the mesh, without JAX.

`--tp W` is the whole group of devices, `--dp-size D` the number of attention groups (dp slices)
inside it, `--ep E` the number of expert groups over the same devices. The mesh has the three axes
`dp`, `ep`, `tp` whose sizes multiply to W; everything else speaks of four *roles*, each a tuple of
axes. Kept free of JAX so that flags are checked before a device is touched.
"""

from __future__ import annotations

from dataclasses import dataclass

Axes = tuple[str, ...]


class LayoutError(ValueError):
    """The flags ask for a layout that does not exist; the message says what is possible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A mesh (axis names and sizes, outermost first) and the four roles over its axes.

    Attributes:
        attn_dp: axes over which requests, pages and token batches differ (the dp slices).
        attn_tp: axes over which attention heads, dense MLPs and the vocabulary are cut.
        moe_ep: axes over which the routed experts are spread.
        moe_tp: axes over which one expert's intermediate dimension is cut.
    """

    axis_names: Axes
    axis_sizes: tuple[int, ...]
    attn_dp: Axes
    attn_tp: Axes
    moe_ep: Axes
    moe_tp: Axes

    def size(self, axes: Axes) -> int:
        """Number of devices along a role."""
        sizes = dict(zip(self.axis_names, self.axis_sizes, strict=True))
        product = 1
        for axis in axes:
            product *= sizes[axis]
        return product

    @property
    def split(self) -> Axes:
        """Axes over which tokens are equal before the experts and distinct among them."""
        return tuple(axis for axis in self.attn_tp if axis in self.moe_ep)

    @property
    def gather(self) -> Axes:
        """Axes over which tokens are distinct before the experts and equal among them."""
        return tuple(axis for axis in self.attn_dp if axis in self.moe_tp)

    @property
    def num_devices(self) -> int:
        return self.size(self.axis_names)

    @property
    def num_slices(self) -> int:
        """Number of dp slices, each with its own batch and its own KV pool."""
        return self.size(self.attn_dp)

    def __str__(self) -> str:
        mesh = " ".join(f"{n}{s}" for n, s in zip(self.axis_names, self.axis_sizes, strict=True))
        roles = ", ".join(
            f"{name} {self.size(getattr(self, name))}"
            for name in ("attn_dp", "attn_tp", "moe_ep", "moe_tp")
        )
        return f"mesh {mesh} ({roles})"


def divisors(n: int) -> list[int]:
    """All positive divisors of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def make_layout(tp_size: int, dp_size: int = 1, ep_size: int = 1) -> Layout:
    """The mesh and roles for W = tp_size devices, D = dp_size slices, E = ep_size expert groups.

    Raises:
        LayoutError: D or E does not divide W, or neither of D and E divides the other.
    """
    for name, value in (("--tp", tp_size), ("--dp-size", dp_size), ("--ep", ep_size)):
        if value < 1:
            raise LayoutError(f"{name} must be at least 1, got {value}.")
    valid = divisors(tp_size)
    if tp_size % dp_size:
        raise LayoutError(
            f"Constraint tp_size % dp_size == 0 not satisfied: --tp {tp_size} with --dp-size "
            f"{dp_size}. With --tp {tp_size}, --dp-size can be one of {valid}."
        )
    if tp_size % ep_size:
        raise LayoutError(
            f"Constraint tp_size % ep_size == 0 not satisfied: --tp {tp_size} with --ep "
            f"{ep_size}. With --tp {tp_size}, --ep can be one of {valid}."
        )
    if ep_size % dp_size == 0:
        return Layout(
            axis_names=("dp", "ep", "tp"),
            axis_sizes=(dp_size, ep_size // dp_size, tp_size // ep_size),
            attn_dp=("dp",),
            attn_tp=("ep", "tp"),
            moe_ep=("dp", "ep"),
            moe_tp=("tp",),
        )
    if dp_size % ep_size == 0:
        return Layout(
            axis_names=("ep", "dp", "tp"),
            axis_sizes=(ep_size, dp_size // ep_size, tp_size // dp_size),
            attn_dp=("ep", "dp"),
            attn_tp=("tp",),
            moe_ep=("ep",),
            moe_tp=("dp", "tp"),
        )
    possible = [e for e in valid if e % dp_size == 0 or dp_size % e == 0]
    raise LayoutError(
        f"--dp-size {dp_size} with --ep {ep_size} is not possible: one of the two must divide the "
        f"other. With --tp {tp_size} --dp-size {dp_size}, --ep can be one of {possible}."
    )
