"""Decoder layers that run as one call each while single tokens are decoded, on a CPU in float32.

A module is taken for a layer of the form that `kernels.layer` computes where it is made of two RMSNorms, the maps of
attention and a FFN, and where one call then gives what the module gives on a tiny text. Prompts run module by module,
and so do padded texts, caches of another kind, and layers inside which somebody has put a hook.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kernels import SparseFFN
from kernels.ffn import BACKENDS, forked, kernels_of
from kernels.layer import DecoderLayer
from kernels.linear import SparseInputFFN, SparseLinear
from sparsity_utils.console import InputError
from sparsity_utils.decoding.input_kernels import Stored, whole_kernel
from sparsity_utils.models.context import context_length
from sparsity_utils.neurons.find import FFN
from sparsity_utils.neurons.linears import LinearMap, find_linears
from sparsity_utils.neurons.modes import evaluating, forward_replaced, unchanged
from sparsity_utils.neurons.trace import Inputs, tiny_inputs

MOST = 3  # sequences decoded side by side: torch's own products are faster for more (`kernels.cpu_linear.FEW`)
ROOM = 64  # tokens that a cache is given room for, at least
CLOSE = 1e-4  # relative RMS error of what a layer adds to its input
ROLES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True, eq=False)
class WholeLayer:
    """A module that computes a decoder layer."""

    module: nn.Module
    index: int  # of the layer in a cache
    norms: tuple[Any, Any]  # modules, before attention and before the FFN
    head_size: int
    scale: float  # what attention scores are multiplied by
    attention: list[list[LinearMap]]  # its maps q, k and v, and its map o
    hooks: tuple[dict, ...]  # of the modules inside it, which one call leaves out

    def kernel(self, qkv: SparseLinear, o: SparseLinear, ffn: SparseFFN | SparseInputFFN) -> DecoderLayer:
        """The layer in one call, of kernels of its maps. Raises `ValueError` where they make no such layer."""
        gains = torch.stack([norm.weight.detach() for norm in self.norms])
        eps = _eps(self.norms[0]), _eps(self.norms[1])
        residual = getattr(self.module, "residual_multiplier", 1.0)
        return DecoderLayer(gains, eps, qkv, o, ffn, self.head_size, self.scale, residual)


def whole_layers(
    model: nn.Module, ffns: Sequence[FFN], ffn_kernel: Callable[[FFN, None], SparseFFN], inputs: Inputs | None = None
) -> list[WholeLayer]:
    """The decoder layers of `model`, in order, if each can run as one call; none if one cannot.

    ffn_kernel: makes the kernel of a FFN that skips nothing. inputs: as `find_ffns` takes them.
    """
    if forked() or {(one.dtype, one.device.type) for one in model.parameters()} != {(torch.float32, "cpu")}:
        return []
    if kernels_of("FFNs", "cpu", BACKENDS["cpu"]) is None:  # no numba
        return []
    try:
        ids, maps = tiny_inputs(model)["input_ids"], find_linears(model, inputs)
    except (InputError, KeyError):  # a model of images, or one whose maps are not found
        return []
    blocks = dict.fromkeys(linear.block for linear in maps)
    layers = [_whole_layer(model, [linear for linear in maps if linear.block == block]) for block in blocks]
    found = [layer for layer in layers if layer is not None]
    same = len(found) == len(blocks) == len(ffns) and _same(model, found, [ffn_kernel(ffn, None) for ffn in ffns], ids)
    return found if same else []


def _whole_layer(model: nn.Module, maps: Sequence[LinearMap]) -> WholeLayer | None:
    """The layer that has these maps, or None where its modules are others than two norms and the maps."""
    module, of_maps = model.get_submodule(maps[0].block), {linear.module for linear in maps}
    inner = tuple(module.modules())[1:]
    norms = [part for part in inner if part not in of_maps and any(True for _ in part.parameters(recurse=False))]
    attention: list[Any] = [part for part in inner if hasattr(part, "head_dim") and hasattr(part, "scaling")]
    roles = tuple(linear.role for linear in maps)
    if roles != ROLES or len(norms) != 2 or None in map(_eps, norms) or len(attention) != 1:
        return None
    if getattr(attention[0], "attn_logit_softcapping", None) is not None:
        return None  # small scores would not show it
    hooks = [one for part in inner for one in (part._forward_hooks, part._forward_pre_hooks)]
    numbers = attention[0].head_dim, attention[0].scaling
    own = [list(maps[:3]), [maps[3]]]
    return WholeLayer(module, maps[0].layer, (norms[0], norms[1]), *numbers, own, tuple(hooks))


def _same(model: nn.Module, layers: list[WholeLayer], ffns: Sequence[SparseFFN], ids: Tensor) -> bool:
    """Whether one call gives what each layer gives for two tokens after a prompt, the second one far away from it."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    errors, stored = list[float](), Stored()  # of this comparison: the kernels to come may be in 8 bits
    far = torch.full_like(ids[:, :1], (context_length(model) or ids.shape[1]) - 1)  # some scale queries by position
    with evaluating(model), unchanged(model), ExitStack() as stack:
        for layer, ffn in zip(layers, ffns, strict=True):
            qkv, o = (whole_kernel(readers, stored) for readers in layer.attention)
            try:
                kernel = layer.kernel(qkv, o, ffn)
            except ValueError:  # heads of another form, or FFNs of other numbers
                return False
            compare = partial(_compared, layer, kernel, errors, layer.module.forward)
            stack.enter_context(forward_replaced(layer.module, compare))
        cache = getattr(model(input_ids=ids[:, :-2], use_cache=True), "past_key_values", None)
        for place, given in ((-2, {}), (-1, {"position_ids": far})) if type(cache) is DynamicCache else ():
            model(input_ids=ids[:, place, None], past_key_values=cache, use_cache=True, **given)
    return len(errors) == 2 * len(layers) and all(error <= CLOSE for error in errors)


def _eps(norm: nn.Module) -> Any:
    """The epsilon of a RMSNorm; None of another module."""
    if not type(norm).__name__.endswith("RMSNorm") or not isinstance(getattr(norm, "weight", None), Tensor):
        return None
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _compared(
    layer: WholeLayer, kernel: DecoderLayer, errors: list[float], own: Callable, x: Tensor, *args: Any, **given: Any
) -> Any:
    """What the module itself computes; of a single token the error of one call is appended to `errors`."""
    y = own(x, *args, **given)
    cached = _cached(layer, x, args, given)
    if cached is not None and isinstance(y, Tensor):
        before = DynamicLayer()
        before.update(cached.keys[:, :, :-1], cached.values[:, :, :-1])
        found = _run(kernel, Room(before), x, given["position_embeddings"])
        errors.append(float((found - y).square().mean().sqrt() / (y - x).square().mean().sqrt()))
    return y


def _cached(layer: WholeLayer, x: Tensor, args: tuple, given: dict[str, Any]) -> DynamicLayer | None:
    """The cache of a layer that is given one token of each of a few texts; None where one call cannot compute it."""
    cache, turn = given.get("past_key_values"), given.get("position_embeddings")
    if args or x.shape[1:-1] != (1,) or len(x) > MOST or turn is None:
        return None
    if type(cache) is not DynamicCache or cache.offloading or layer.index >= len(cache.layers):
        return None
    cached = cache.layers[layer.index]
    if type(cached) is not DynamicLayer or not cached.is_initialized or len(cached.keys) != len(x):
        return None
    if x.dtype != torch.float32 or turn[0].shape[-1] != layer.head_size or forked():
        return None
    mask = given.get("attention_mask")
    if mask is not None and not bool((mask if mask.dtype == torch.bool else mask == 0).all()):
        return None
    if layer.module.training or (torch.is_grad_enabled() and x.requires_grad):
        return None  # the kernels of its modules say what is wrong
    return None if any(layer.hooks) else cached


class Room:
    """Keys and values of one layer of a cache, kept where more tokens can be written after them."""

    def __init__(self, cached: DynamicLayer) -> None:
        shape, self.length = cached.keys.shape, cached.keys.shape[2]
        room = max(ROOM, 2 * self.length)
        self.keys, self.values = (cached.keys.new_empty(*shape[:2], room, shape[3]) for _ in range(2))
        self.keys[:, :, : self.length] = cached.keys
        self.values[:, :, : self.length] = cached.values
        self.given: tuple[Tensor, Tensor] | None = None  # what the cache has of it

    def serves(self, cached: DynamicLayer) -> bool:
        """Whether the cache still has what it was given, and one more token fits."""
        same = self.given is not None and cached.keys is self.given[0] and cached.values is self.given[1]
        return same and self.length < self.keys.shape[2]

    def give(self, cached: DynamicLayer) -> None:
        """Let the cache have the token that was written last."""
        self.length += 1
        cached.keys, cached.values = self.keys[:, :, : self.length], self.values[:, :, : self.length]
        self.given = cached.keys, cached.values


def _run(kernel: DecoderLayer, room: Room, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = turn
    return kernel(x[:, 0], cos[:, 0], sin[:, 0], room.keys, room.values, room.length)[:, None]


@contextmanager
def run_whole(layer: WholeLayer, kernel: DecoderLayer) -> Iterator[None]:
    """Inside the block the layer runs as one call where it can."""
    own, rooms = layer.module.forward, WeakKeyDictionary[DynamicLayer, Room]()

    def forward(x: Tensor, *args: Any, **given: Any) -> Any:
        cached = _cached(layer, x, args, given)
        if cached is None:
            return own(x, *args, **given)
        room = rooms.get(cached)
        if room is None or not room.serves(cached):
            room = rooms[cached] = Room(cached)
        y = _run(kernel, room, x, given["position_embeddings"])
        room.give(cached)
        return y

    with forward_replaced(layer.module, forward):
        yield


def with_kernels(
    layers: Sequence[WholeLayer], attention: Sequence[SparseLinear], ffns: Sequence[SparseFFN | SparseInputFFN]
) -> list[tuple[WholeLayer, DecoderLayer]]:
    """Each layer with its kernel; attention: kernels of q, k and v, and of o, of one layer after the other."""
    parts = zip(attention[::2], attention[1::2], ffns, strict=True) if layers else ()
    return [(layer, layer.kernel(*own)) for layer, own in zip(layers, parts, strict=True)]
