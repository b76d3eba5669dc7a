"""How the vectors in a tensor relate to the vector x they were computed from, and what operations make of that.

    linear     W x + b, a part of it, a multiple, or the sum of two (as adapters of the first maps make)
    activated  s: a nonlinear function, applied element by element, of one linear image of x
    product    h: s times another linear image of the same x, or s times an activated one (dReLU), and what
               element-wise functions make of h, such as thresholds and masks

A threshold or a Top-k mask of a linear image, of s or of h belongs to what it is applied to.

`flow.py` keeps one tag, `Vectors`, per tensor of a running model and asks here for the tag of each result.
"""

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import Tensor

# Names of primitive operations (torch.ops.aten, without overload).
COPIES = ("clone", "_to_copy", "alias", "detach", "lift_fresh")
RESHAPES = ("view", "_unsafe_view", "_reshape_alias", "reshape")
GATHERS = ("index", "index_select", "repeat")
SHIFTS, SCALINGS, BOUNDS = ("add", "sub", "rsub"), ("mul", "div", "neg"), ("clamp", "clamp_min", "clamp_max")
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")

Entry = TypeVar("Entry")
Frames = tuple[str, ...]  # names of the modules that are running, outermost first


class Role(Enum):
    """How a vector relates to the x it was computed from; see the top of this file."""

    LINEAR = "linear"
    ACTIVATED = "activated"
    PRODUCT = "product"


@dataclass(frozen=True)
class Matrix:
    """Where a module keeps W of a linear map; `size` and `stride` describe W as (out, in)."""

    parameter: str
    offset: int  # elements from the first of the parameter
    size: tuple[int, int]
    stride: tuple[int, int]

    def rows(self, chosen: slice) -> "Matrix":
        """Those rows of W that make the chosen outputs of the map."""
        size = (len(range(*chosen.indices(self.size[0]))), self.size[1])
        offset = self.offset + chosen.start * self.stride[0]
        return Matrix(self.parameter, offset, size, (self.stride[0] * chosen.step, self.stride[1]))

    def of(self, parameter: Tensor) -> Tensor:
        """W itself, (out, in), without gradient: a view."""
        whole = parameter.detach()
        return whole.as_strided(self.size, self.stride, whole.storage_offset() + self.offset)


@dataclass(frozen=True, eq=False)
class Map:
    """One application of a linear map to vectors; each is equal to itself alone."""

    matrix: Matrix | None  # W, where it is one matrix and kept in a parameter


@dataclass(frozen=True)
class Source:
    """Which vectors x are."""

    tensor: object  # `Vectors.source`
    part: tuple  # which of its columns
    width: int


@dataclass(frozen=True, eq=False)
class Image:
    """One vector's relation to x."""

    role: Role
    xs: tuple["Source", ...]  # x, innermost first: where x is a linear image itself, also what that is computed from
    map: Map  # of a product: the one that s is computed from
    frames: Frames  # modules that ran it
    s: Tensor | None = None  # of a product
    activation: str | None = None  # the module whose output s is, where a module applies the activation function
    factors: tuple[tuple[Map, tuple], ...] = ()  # of s times a linear image: the map of each, and which part of it


@dataclass(frozen=True, eq=False)
class Vectors:
    """The tag of one tensor, whose last dimension holds (except in passing) the components of vectors."""

    source: object  # the same for all views, copies and gathered rows of one tensor
    rows: Tensor  # the token of every element, int64, the tensor's shape; strides are 0 where they can be
    columns: Tensor  # the column of every element; a meta tensor, of which offset and strides are all that is read
    image: Image | None = None
    gathered: Frames | None = None  # modules that last chose among its rows

    @property
    def part(self) -> tuple:
        """Which columns of the source these are."""
        return self.columns.storage_offset(), self.columns.stride(-1), self.columns.shape[-1]

    def row_tokens(self) -> Tensor | None:
        """The token of each vector, the shape without its last dimension; None where vectors lie otherwise."""
        return self.rows.select(-1, 0) if self.rows.stride(-1) == 0 or self.rows.shape[-1] == 1 else None


def common(*frames: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """What all of `frames` begin with: the modules, or the calls, that are running in all of them."""
    shortest = min(map(len, frames))
    same = next((i for i in range(shortest) if len({f[i] for f in frames}) > 1), shortest)
    return frames[0][:same]


def fresh(x: Tensor) -> Vectors:
    """The tag of vectors that are computed from no other ones, numbered in order."""
    rows = torch.arange(x.shape[:-1].numel(), device=x.device).view(*x.shape[:-1], 1).expand(x.shape)
    columns = torch.empty(x.shape[-1], dtype=torch.uint8, device="meta").expand(x.shape)
    return Vectors(object(), rows, columns)


def moved_places(
    tag: Vectors, name: str, func: Any, args: tuple, kwargs: dict, out: Tensor, part: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """`rows` and `columns` after an operation that only moves elements; None for both where it mixes them."""
    if name in COPIES:
        return tag.rows, tag.columns
    tokens = tag.row_tokens()
    moves_rows = tokens is not None and out.shape[-1] == tag.rows.shape[-1]
    if moves_rows and (name in RESHAPES or (name in GATHERS and leaves_columns(name, args))):
        if name in RESHAPES:
            tokens = tokens.reshape(out.shape[:-1])
        else:
            tokens = func(tokens.unsqueeze(-1), *args[1:], **kwargs).squeeze(-1)
        line = tag.columns.as_strided((out.shape[-1],), (tag.columns.stride(-1),), tag.columns.storage_offset())
        return tokens.unsqueeze(-1).expand(out.shape), line.expand(out.shape)
    if name in GATHERS or name == "as_strided":
        return None, None

    def move(places: Tensor) -> Tensor:
        if name in RESHAPES:
            return places.view(out.shape)
        moved = func(places, *args[1:], **kwargs)
        return moved if part is None else moved[part]

    try:
        return move(tag.rows), move(tag.columns)
    except RuntimeError:  # a reshape that mixes tokens and columns, such as of attention heads
        return None, None


def leaves_columns(name: str, args: tuple) -> bool:
    """Whether a gather chooses among rows alone."""
    last = args[0].dim() - 1
    if name == "index":
        return len(args[1]) <= last or args[1][last] is None
    if name == "index_select":
        return args[1] % (last + 1) != last
    return args[1][-1] == 1 and len(args[1]) == last + 1


def image_of(name: str, args: tuple, data: list[Tensor], tags: list[Vectors], per_row: list[bool]) -> Image | None:
    """How an element-wise function of `data` (and of constants) relates to the x they were computed from."""
    wide = [at for at, narrow in enumerate(per_row) if not narrow]
    if len(wide) == 1:
        return transformed(name, args, data[wide[0]], tags[wide[0]].image, any(per_row))
    images = [tag.image for tag in tags]
    if None in images or any(per_row):
        return None
    shared = tuple(x for x in images[0].xs if all(x in image.xs for image in images))
    products = [image for image in images if image.role is Role.PRODUCT]
    factors = [(image.map, tag.part) for image, tag in zip(images, tags, strict=True)]
    if products:
        h = products[0]
        of_h = (
            h.factors == image.factors if image in products else factor in h.factors
            for image, factor in zip(images, factors, strict=True)
        )
        return h if h.factors and all(of_h) else None
    if len(set(factors)) == 1:
        is_linear = name in SHIFTS and all(image.role is Role.LINEAR for image in images)
        return images[0] if is_linear else activated(images[0])
    if len(images) != 2 or not shared:
        return None
    frames, roles = common(images[0].frames, images[1].frames), [image.role for image in images]
    if name in SHIFTS and roles == [Role.LINEAR, Role.LINEAR]:
        return Image(Role.LINEAR, shared, Map(None), frames)
    if name == "mul" and Role.ACTIVATED in roles:
        at = roles.index(Role.ACTIVATED)
        s_first = (factors[at], factors[1 - at])
        return replace(images[at], role=Role.PRODUCT, xs=shared, s=data[at], frames=frames, factors=s_first)
    return None


def transformed(name: str, args: tuple, x: Tensor, image: Image | None, per_row: bool) -> Image | None:
    """`image` after a function of itself and constants or, if `per_row`, one more number per vector."""
    if image is None or image.role is Role.PRODUCT:
        return image
    scaled = name in SCALINGS and (name != "div" or args[0] is x)
    if image.role is Role.ACTIVATED:
        return replace(image, role=Role.PRODUCT, s=x) if per_row and scaled else activated(image)
    if name in SHIFTS or (not per_row and (scaled or is_bound(name, args))):
        return image
    return activated(image) if not per_row or name in COMPARISONS else None


def activated(image: Image) -> Image:
    return replace(image, role=Role.ACTIVATED, activation=None)


def is_bound(name: str, args: tuple) -> bool:
    """Whether a clamp leaves small numbers as they are: then it only bounds, and is no activation function."""
    if name not in BOUNDS or any(isinstance(bound, Tensor) for bound in args[1:]):
        return False
    low, high = {"clamp": (*args[1:], None, None)[:2], "clamp_min": (args[1], None), "clamp_max": (None, args[1])}[name]
    return (low is None or low < 0) and (high is None or high > 0)
