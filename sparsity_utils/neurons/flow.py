"""Follow the vectors of a running model, operation by operation, to where an FFN's product enters its down projection.

`Flow` is a dispatch mode: torch shows it each primitive operation of a forward pass, whoever wrote the model. It tags
every tensor with what its vectors are to the vector x they were computed from (`vectors.py`): a linear image of x,
s = act(linear image), or h = s * (linear image of the same x). A linear map that takes s (plain FFN) or h (gated FFN)
back to the size of x is a down projection. An attention output, a state-space gate or a pooler is not one, because
what it maps is not computed from x in this way. Tags also tell which token each row is of, through every view, gather
and copy, so that routed experts can be followed.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from sparsity_utils.neurons.vectors import (
    COPIES,
    GATHERS,
    RESHAPES,
    Frames,
    Image,
    Map,
    Matrix,
    Role,
    Source,
    Vectors,
    activated,
    common,
    fresh,
    image_of,
    moved_places,
)
from sparsity_utils.neurons.weights import Constant, Weights, is_one_matrix, moved_constant, operation

# Names of primitive operations (torch.ops.aten, without overload).
LINEAR_MAPS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "_grouped_mm": 0, "grouped_mm_fallback": 0}  # first factor
GROUPED = ("_grouped_mm", "grouped_mm_fallback")  # (rows, in) x (experts, in, out), rows sorted by expert
POINTWISE = ("rsub", "hardswish", "hardsigmoid", "_prelu_kernel", "masked_fill_")  # those without torch's pointwise tag
CREATED = ("zeros_like", "ones_like", "full_like", "zeros", "ones", "full", "new_zeros", "new_ones", "new_full")
ORDERS, SUMMARIES = ("topk", "sort"), ("kthvalue", "argmax", "any", "all", "count_nonzero", "std", "var")


@dataclass(frozen=True, eq=False)
class Down:
    """A down projection about to be computed."""

    s: Tensor  # (rows, d_ff)
    h: Tensor  # (rows, d_ff)
    tokens: Tensor  # (rows,)
    blocks: list[tuple[Matrix, Any]]  # each W_out used, and the rows (a slice or their numbers) it is applied to
    vectors: Vectors  # the tag of h


@dataclass(frozen=True, eq=False)
class Stray:
    """An operation that reads s or h and is neither a step towards a down projection nor one itself."""

    source: object  # `Vectors.source` of what it reads
    frames: Frames  # the modules that were running
    maps_back: bool  # whether it gives vectors of the size of x, by a weight that is no parameter


class Flow(TorchDispatchMode):
    """Inside the `with` block, `visit` is called just before each down projection whose weights are in `module`.

    A tensor that `visit` returns, (rows, d_ff), takes the place of h, below autograd: no gradient flows through it.
    No other bit of what the model computes changes. Rows that an expert was given times a factor of zero have the token
    `-1 - token`: they are not routed to it.
    """

    supports_higher_order_operators = True  # they run, unfollowed
    _local = threading.local()

    def __init__(self, module: nn.Module, visit: Callable[[Down], Tensor | None]) -> None:
        super().__init__()
        torch.clear_autocast_cache()  # of casts of weights that were made before anybody watched
        self.visit, self.weights = visit, Weights(module)
        self.tags: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor -> Vectors
        self.constants: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor -> Constant
        self.created: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor -> True: it began with equal values
        self.ordered: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # largest values, their places -> Vectors
        self.strays: list[Stray] = []
        self.frames: Frames = ()  # kept by whoever knows which modules are running

    @classmethod
    @contextmanager
    def paused(cls) -> Iterator[None]:
        """Inside the block, no flow follows what runs."""
        before = getattr(cls._local, "paused", False)
        cls._local.paused = True
        try:
            yield
        finally:
            cls._local.paused = before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(self._local, "paused", False) or not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        with self:  # in inference mode torch shows compound operations too
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        name = operation(func)
        if name in LINEAR_MAPS:
            return self._linear_map(func, args, kwargs)
        if func.is_view or name in COPIES or name in RESHAPES or name in GATHERS:
            out = func(*args, **kwargs)
            for part, one in enumerate(out) if isinstance(out, (list, tuple)) else [(None, out)]:
                self._moved(func, args, kwargs, one, part)
            return out
        if func._schema.is_mutable and args and self._role(args[0]) is Role.ACTIVATED:  # s is about to be overwritten
            kept = args[0].clone()
            self.tags[kept] = self.tags[args[0]]
            out, args = func(*args, **kwargs), (kept, *args[1:])
        else:
            out = func(*args, **kwargs)
        if torch.Tag.pointwise in func.tags or name in POINTWISE:
            self._pointwise(name.removesuffix("_"), args, kwargs, out)
        elif is_masked_fill(name, args):
            self._pointwise("masked_fill", (args[0], args[1][0], args[2]), {}, out)
        elif name in ("scatter", "scatter_") and isinstance(args[2], Tensor) and args[2] in self.ordered:
            self._scattered(args, out)
        else:
            self._other(func, args, out)
        return out

    def tag(self, x: Any) -> Vectors | None:
        """The tag of `x`, a new one where it has none; None for what holds no vectors."""
        if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[-1] == 0:
            return None
        known = self.tags.get(x)
        if known is None or known.rows.shape != x.shape:
            known = self.tags[x] = fresh(x)
        return known

    def _role(self, x: Any) -> Role | None:
        known = self.tags.get(x) if isinstance(x, Tensor) else None
        return known.image.role if known is not None and known.image is not None else None

    def _constant(self, x: Tensor) -> Constant | None:
        return self.constants.get(x) if self.weights.find(x) is None else Constant(x)

    # Data movement: views, copies, gathered rows.

    def _moved(self, func: Any, args: tuple, kwargs: dict, out: Any, part: int | None) -> None:
        if not args or not isinstance(args[0], Tensor) or not isinstance(out, Tensor):
            return
        if args[0] in self.ordered:
            self.ordered[out] = self.ordered[args[0]]
        constant = self._constant(args[0])
        if constant is not None:
            if self.weights.find(out) is None:
                self.constants[out] = moved_constant(constant, func, args, kwargs, out)
            return
        if out is args[0] or (tag := self.tag(args[0])) is None:
            return
        name = operation(func)
        rows, columns = moved_places(tag, name, func, args, kwargs, out, part)
        if rows is None:
            self._stray(tag)
            return
        image, gathered = tag.image, tag.gathered
        if image is not None and image.s is not None and name not in COPIES:
            s = func(image.s, *args[1:], **kwargs)
            image = replace(image, s=s if part is None else s[part])
        whole = name in COPIES or (name in RESHAPES and out.shape[-1] == args[0].shape[-1])
        if image is not None and not whole:
            image = replace(image, activation=None)  # s is no longer what that module returned
        if name in GATHERS:
            gathered = self.frames if gathered is None else common(gathered, self.frames)
        self.tags[out] = Vectors(tag.source, rows, columns, image, gathered)

    # Element-wise functions.

    def _pointwise(self, name: str, args: tuple, kwargs: dict, out: Any) -> None:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        data = [x for x in tensors if x.numel() > 1 and self._constant(x) is None and not self._uniform(x)]
        if not data:
            if any(self._constant(x) is not None for x in tensors):
                self.constants[out] = Constant()
            return
        tags = [self.tag(x) for x in data]
        lead = next((tag for x, tag in zip(data, tags, strict=True) if tag and x.shape == out.shape), None)
        self.tags.pop(out, None)  # an operation in place
        if lead is None:
            return
        per_row = [x.shape[-1] == 1 != out.shape[-1] for x in data]  # one number per vector
        image, source, rows = None, object(), lead.rows
        if None not in tags:
            image = image_of(name, args, data, tags, per_row)
        if image is None:
            for tag in tags:
                self._stray(tag)
            if name == "mul" and len(data) == 2 and any(per_row):  # x up to one factor per token
                source, rows = lead.source, fed(lead, data[per_row.index(True)], out)
        self.tags[out] = Vectors(source, rows, lead.columns, image, lead.gathered)

    def _uniform(self, x: Tensor) -> bool:
        """Whether `x` was created with equal values and still has them."""
        with self.paused():
            return x in self.created and bool((x == x.flatten()[0]).all())

    def _scattered(self, args: tuple, out: Tensor) -> None:
        """A scatter to the places of the largest values of s or h: a mask of it, or what the mask leaves of it."""
        tag = self.ordered[args[2]]
        base, values = self.tags.get(args[0]), args[3]
        same = base is not None and base.image is not None and base.image.map is tag.image.map and base.part == tag.part
        plain = not isinstance(values, Tensor) or values in self.ordered or self._uniform(values)
        self.tags.pop(out, None)
        if plain and out.shape == tag.rows.shape and (same or args[0] in self.created):
            image = tag.image if tag.image.role is Role.PRODUCT else activated(tag.image)
            self.tags[out] = replace(tag, source=object(), image=image)
            self.created.pop(out, None)

    def _other(self, func: Any, args: tuple, out: Any) -> None:
        """Any other operation makes new vectors; they keep the tokens of an argument whose rows were gathered."""
        name = operation(func)
        read = [tag for x in args if isinstance(x, Tensor) and (tag := self.tags.get(x)) is not None]
        if name in ORDERS and read and read[0].image is not None:
            for one in out:
                self.ordered[one] = read[0]
        elif name not in SUMMARIES and torch.Tag.reduction not in func.tags:
            for tag in read:
                self._stray(tag, func.namespace != "aten" and maps_back(tag, out))
        if not isinstance(out, Tensor):
            return
        self.tags.pop(out, None)
        if name in CREATED:
            self.created[out] = True
        for x in args:
            tag = self.tags.get(x) if isinstance(x, Tensor) else None
            tokens = tag.row_tokens() if tag is not None and tag.gathered is not None else None
            if tokens is not None and out.dim() > 1 and out.shape[:-1] == x.shape[:-1] and out.shape[-1]:
                rows = tokens.unsqueeze(-1).expand(out.shape)
                self.tags[out] = replace(fresh(out), rows=rows, gathered=tag.gathered)
                return

    def _stray(self, tag: Vectors | None, maps_back: bool = False) -> None:
        if tag is not None and tag.image is not None and tag.image.role is not Role.LINEAR:
            self.strays.append(Stray(tag.source, self.frames, maps_back))

    # Linear maps.

    def _linear_map(self, func: Any, args: tuple, kwargs: dict) -> Tensor:
        """Run a linear map and tag its output: x W for x (..., in) and W (..., in, out) or, `flipped`, W.T x.T."""
        first = LINEAR_MAPS[operation(func)]
        constants = [self._constant(args[first]), self._constant(args[first + 1])]
        flipped = constants[1] is None
        at = first + 1 if flipped else first
        tag = self.tag(args[at])
        if tag is None or (constants[0] is None) == flipped:  # two activations, or two weights
            out = func(*args, **kwargs)
            for factor in args[first : first + 2]:
                if (read := self.tags.get(factor)) is not None:
                    is_product = read.image is not None and read.image.role is Role.PRODUCT
                    self._stray(read, is_product and factor.dim() == 2 and maps_back(read, out))
            self._other(func, (), out)
            return out
        x, weight = args[at], args[first if flipped else first + 1]
        constant = constants[0 if flipped else 1]
        if flipped:
            x, weight = x.mT, weight.mT
            if constant.base is not None:
                constant = replace(constant, base=constant.base.mT)
            tag = replace(tag, rows=tag.rows.mT, columns=tag.columns.mT)
        role = tag.image.role if tag.image is not None else None
        if role in (Role.ACTIVATED, Role.PRODUCT) and weight.shape[-1] in widths(tag):
            replacement = self._down(func, args, kwargs, x, constant, tag, flipped)
            if replacement is not None:
                args = (*args[:at], replacement.mT if flipped else replacement, *args[at + 1 :])
        else:
            self._stray(tag)
        out = func(*args, **kwargs)
        self._mapped(out.mT if flipped else out, x, constant, tag, out, flipped)
        return out

    def _mapped(self, vectors: Tensor, x: Tensor, constant: Constant, tag: Vectors, out: Tensor, flipped: bool) -> None:
        new, tokens = fresh(vectors), tag.row_tokens()
        rows = new.rows if tokens is None else tokens.unsqueeze(-1).expand(vectors.shape)
        columns = new.columns
        if flipped:
            rows, columns = rows.mT, columns.mT
        applied = Map(self._matrix(constant.base) if is_one_matrix(constant) else None)
        further = tag.image.xs if tag.image is not None and tag.image.role is Role.LINEAR else ()
        xs = (Source(tag.source, tag.part, x.shape[-1]), *further)
        image = Image(Role.LINEAR, xs, applied, self.frames)
        self.tags[out] = Vectors(new.source, rows, columns, image, tag.gathered)

    def _down(
        self, func: Any, args: tuple, kwargs: dict, x: Tensor, constant: Constant, tag: Vectors, flipped: bool
    ) -> Tensor | None:
        """Show a down projection to `visit`; return the h that takes the place of `x`, in its layout, or None."""
        s = x if tag.image.role is Role.ACTIVATED else tag.image.s.mT if flipped else tag.image.s
        tokens = tag.row_tokens()
        with self.paused():
            blocks = self._blocks(func, args, kwargs, x, constant)
            if tokens is None or blocks is None or s.shape != x.shape:
                self._stray(tag, True)
                return None
            flat = Down(s.flatten(0, -2), x.flatten(0, -2), tokens.flatten(), blocks, tag)
            h = self.visit(flat)
        if h is None:
            return None
        # A copy, of the same strides, that other flows see as one of x, filled where they do not look.
        new = x.mT.clone().mT if flipped else x.clone()
        with self.paused():
            new.copy_(h.view(x.shape))
        return new

    def _blocks(
        self, func: Any, args: tuple, kwargs: dict, x: Tensor, constant: Constant
    ) -> list[tuple[Matrix, Any]] | None:
        """Which matrix each row of `x`, flattened, is multiplied by; None where it is kept in no parameter."""
        base = constant.base
        first = None if base is None else self._matrix(base)
        if first is None:
            return None

        def matrix(entry: int) -> Matrix:
            return replace(first, offset=first.offset + entry * base.stride(0)) if base.dim() == 3 else first

        if operation(func) in GROUPED:
            ends = (kwargs["offs"] if "offs" in kwargs else args[2]).tolist()
            spans = zip([0, *ends[:-1]], ends, strict=True)
            return [(matrix(entry), slice(a, b)) for entry, (a, b) in enumerate(spans) if b > a]
        if constant.chosen is not None:
            entries = constant.chosen.repeat_interleave(x.shape[1])  # of each row of x (batch, rows, in)
            return [(matrix(e), (entries == e).nonzero().squeeze(1)) for e in entries.unique().tolist()]
        if is_one_matrix(constant):
            return [(first, slice(None))]
        n = x.shape[1]
        return [(matrix(entry), slice(entry * n, (entry + 1) * n)) for entry in range(base.shape[0])]

    def _matrix(self, base: Tensor) -> Matrix | None:
        """W of a linear map with the weight `base`, (in, out), or the first of a stack; None outside all parameters."""
        found = self.weights.find(base)
        return found and Matrix(*found, (base.shape[-1], base.shape[-2]), (base.stride(-1), base.stride(-2)))


def widths(tag: Vectors) -> list[int]:
    """The sizes of the vectors that s or h was computed from."""
    return [x.width for x in tag.image.xs]


def maps_back(tag: Vectors, out: Any) -> bool:
    """Whether what an operation gave for s or h may be vectors of the size of x."""
    is_activated = tag.image is not None and tag.image.role is not Role.LINEAR
    return is_activated and isinstance(out, Tensor) and out.dim() > 1 and out.shape[-1] in widths(tag)


def fed(tag: Vectors, factor: Tensor, out: Tensor) -> Tensor:
    """`tag.rows` of vectors times one factor each, (..., 1): `-1 - token` where it is zero."""
    tokens = tag.row_tokens()
    if tokens is None:
        return tag.rows
    with Flow.paused():
        dropped = (factor == 0).squeeze(-1).expand(tokens.shape) & (tokens >= 0)
        return torch.where(dropped, -1 - tokens, tokens).unsqueeze(-1).expand(out.shape)


def is_masked_fill(name: str, args: tuple) -> bool:
    """Whether an operation is `x[mask] = number`."""
    if name not in ("index_put", "index_put_") or len(args) != 3 or len(args[1]) != 1:
        return False
    mask = args[1][0]
    return mask is not None and mask.dtype is torch.bool and mask.shape == args[0].shape and args[2].numel() == 1
