"""Decoder layers that run as one call each while single tokens are decoded, on a CPU in float32.

A module is taken for a layer of the form that `kernels.layer` computes where it is made of two RMSNorms, the maps of
attention and a FFN, and where one call then gives what the module gives on a tiny text. Prompts run module by module,
and so do padded texts, caches of another kind, calls that need gradients, and layers inside which somebody has put
another module, forward or hook since the block began.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.utils import output_capturing

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
FAR = 2**20  # a position that rotary angles have; beyond their context some models scale queries
CLOSE = 1e-4  # relative RMS error of what a layer adds to its input
ATTENTION = "_attn_implementation_internal"  # the public property takes ten times as long
MIXER = ("head_dim", "scaling", "config")  # what transformers' modules of attention have
ROLES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True, eq=False)
class WholeLayer:
    """A module that computes a decoder layer."""

    module: nn.Module
    index: int  # of the layer in a cache
    norms: tuple[Any, Any]  # modules, before attention and before the FFN
    mixer: Any  # module that computes attention
    attention: list[list[LinearMap]]  # its maps q, k and v, and its map o

    @cached_property
    def cache_shape(self) -> tuple[int, int]:
        """Number of heads of keys, and size of a head."""
        return len(self.attention[0][1].outputs) // self.mixer.head_dim, self.mixer.head_dim

    def kernel(self, qkv: SparseLinear, o: SparseLinear, ffn: SparseFFN | SparseInputFFN) -> DecoderLayer:
        """The layer in one call, of kernels of its maps. Raises `ValueError` where they make no such layer."""
        gains = torch.stack([norm.weight.detach() for norm in self.norms])
        eps = _eps(self.norms[0]), _eps(self.norms[1])
        residual = getattr(self.module, "residual_multiplier", 1.0)
        return DecoderLayer(gains, eps, qkv, o, ffn, self.mixer.head_dim, self.mixer.scaling, residual)


def whole_layers(
    model: nn.Module, ffns: Sequence[FFN], ffn_kernel: Callable[[FFN, None], SparseFFN], inputs: Inputs | None = None
) -> list[WholeLayer]:
    """The decoder layers of `model`, in order, if each can run as one call; none if one cannot.

    Where the model fails while it is looked at, a warning says so: its modules may still run.

    ffn_kernel: makes the kernel of a FFN that skips nothing. inputs: as `find_ffns` takes them.
    """
    if forked() or {(one.dtype, one.device.type) for one in model.parameters()} != {(torch.float32, "cpu")}:
        return []
    if kernels_of("FFNs", "cpu", BACKENDS["cpu"]) is None:  # no numba
        return []
    try:
        return _same_layers(model, ffns, ffn_kernel, inputs)
    except InputError:  # one whose maps are not found
        return []
    except Exception as error:  # whatever a model of others raises
        warnings.warn(f"The layers of {type(model).__name__} run module by module: {error!r}", stacklevel=2)
        return []


def _same_layers(
    model: nn.Module, ffns: Sequence[FFN], ffn_kernel: Callable[[FFN, None], SparseFFN], inputs: Inputs | None
) -> list[WholeLayer]:
    ids, maps = tiny_inputs(model).get("input_ids"), find_linears(model, inputs)
    blocks = dict.fromkeys(linear.block for linear in maps)
    layers = [_whole_layer(model, [linear for linear in maps if linear.block == block]) for block in blocks]
    found = [layer for layer in layers if layer is not None]
    if ids is None or not len(found) == len(blocks) == len(ffns):
        return []
    return found if _same(model, found, [ffn_kernel(ffn, None) for ffn in ffns], ids) else []


def _whole_layer(model: nn.Module, maps: Sequence[LinearMap]) -> WholeLayer | None:
    """The layer that has these maps, or None where its modules are others than two norms and the maps."""
    module, of_maps = model.get_submodule(maps[0].block), {linear.module for linear in maps}
    inner = tuple(module.modules())[1:]
    norms = [part for part in inner if part not in of_maps and any(True for _ in part.parameters(recurse=False))]
    mixers: list[Any] = [part for part in inner if all(hasattr(part, name) for name in MIXER)]
    roles = tuple(linear.role for linear in maps)
    if roles != ROLES or len(norms) != 2 or None in map(_eps, norms) or len(mixers) != 1:
        return None
    if getattr(mixers[0], "attn_logit_softcapping", None) is not None:
        return None  # small scores would not show it
    return WholeLayer(module, maps[0].layer, (norms[0], norms[1]), mixers[0], [list(maps[:3]), [maps[3]]])


def _same(model: nn.Module, layers: list[WholeLayer], ffns: Sequence[SparseFFN], ids: Tensor) -> bool:
    """Whether one call gives what each layer gives for two tokens after a prompt, the second one far away from it."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    errors, stored = list[float](), Stored()  # of this comparison: the kernels to come may be in 8 bits
    far = torch.full_like(ids[:, :1], max(FAR, 8 * (context_length(model) or 0)))
    with evaluating(model), unchanged(model), ExitStack() as stack:
        for layer, ffn in zip(layers, ffns, strict=True):
            qkv, o = (whole_kernel(readers, stored) for readers in layer.attention)
            try:
                kernel = layer.kernel(qkv, o, ffn)
            except ValueError:  # heads of another form, or FFNs of other numbers
                return False
            compare = partial(_compared, layer, Inside(layer), kernel, errors, layer.module.forward)
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
    layer: WholeLayer,
    inside: "Inside",
    kernel: DecoderLayer,
    errors: list[float],
    own: Callable,
    hidden_states: Tensor,
    *args: Any,
    **given: Any,
) -> Any:
    """What the module itself computes; of a single token the error of one call is appended to `errors`."""
    x, y = hidden_states, own(hidden_states, *args, **given)
    cached = _cached(layer, inside, x, args, given)
    if cached is not None and isinstance(y, Tensor):
        before = DynamicLayer()
        before.update(cached.keys[:, :, :-1], cached.values[:, :, :-1])
        found = _run(kernel, Room(before), x, given["position_embeddings"])
        errors.append(float((found - y).square().mean().sqrt() / (y - x).square().mean().sqrt()))
    return y


class Inside:
    """The modules inside a layer as a block found them: one call leaves out what somebody puts in their place.

    It is asked at every token of every layer, which takes 1.2 us. Numbers and weights of modules it does not look at.
    """

    def __init__(self, layer: WholeLayer) -> None:
        modules = list(layer.module.modules())
        self._inner, self._parameters = modules[1:], list(layer.module.parameters())
        self._hooks = [every_module._global_forward_hooks, every_module._global_forward_pre_hooks]
        self._hooks += [own for one in self._inner for own in (one._forward_hooks, one._forward_pre_hooks)]
        self._children = [one._modules for one in modules]
        self._config = vars(layer.mixer.config)
        self._before = [dict(own) for own in self._children], self._forwards(), self._config.get(ATTENTION)

    def is_changed(self) -> bool:
        """Whether a module, a forward or the kind of attention is another one, or a hook would see something."""
        children, forwards, attention = self._before
        if self._children != children or self._config.get(ATTENTION) != attention or self._forwards() != forwards:
            return True
        return any(self._hooks) and not all(_is_idle(hook) for own in self._hooks for hook in own.values())

    def needs_gradient(self) -> bool:
        """Whether autograd would follow a parameter."""
        return torch.is_grad_enabled() and any(one.requires_grad for one in self._parameters)

    def _forwards(self) -> list[Callable]:
        return [one.forward for one in self._inner]


def _is_idle(hook: Callable) -> bool:
    """Whether a hook is one of those by which transformers captures outputs, and none is asked for.

    They stay in a model after the first call that asks for attentions or hidden states.
    """
    own = getattr(hook, "__module__", None) == output_capturing.__name__
    return own and not output_capturing._active_collector.get()


def _cached(layer: WholeLayer, inside: Inside, x: Tensor, args: tuple, given: dict[str, Any]) -> DynamicLayer | None:
    """The cache of a layer that is given one token of each of a few texts; None where one call cannot compute it."""
    cache, turn, mask = given.get("past_key_values"), given.get("position_embeddings"), given.get("attention_mask")
    if args or x.dim() != 3 or x.shape[1] != 1 or x.shape[0] > MOST or turn is None or forked():
        return None
    if type(cache) is not DynamicCache or cache.offloading or layer.index >= len(cache.layers):
        return None
    cached = cache.layers[layer.index]
    if type(cached) is not DynamicLayer or not cached.is_initialized or inside.is_changed():
        return None
    if layer.module.training or (torch.is_grad_enabled() and x.requires_grad) or inside.needs_gradient():
        return None  # the kernels of its modules say what is wrong
    if mask is not None and not _hides_nothing(mask):
        return None
    return cached if _fits(layer, x, turn[0], cached.keys, cached.values) else None


def _hides_nothing(mask: Any) -> bool:
    """Whether a mask is one of numbers or truths, unlike that of flex attention, and lets attention see all tokens."""
    return isinstance(mask, Tensor) and bool((mask if mask.dtype == torch.bool else mask == 0).all())


def _fits(layer: WholeLayer, x: Tensor, cos: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether what a layer is given and its cache are as `DecoderLayer` takes them."""
    texts, turn, kept, (groups, size) = x.shape[0], cos.shape, keys.shape, layer.cache_shape
    if turn not in ((texts, 1, size), (1, 1, size)) or kept[:2] != (texts, groups) or kept[3:] != (size,):
        return False
    if values.shape != kept or keys.requires_grad or values.requires_grad or not (keys.is_cpu and values.is_cpu):
        return False
    return x.dtype == cos.dtype == keys.dtype == values.dtype == torch.float32


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


class OneCall:
    """The forward of a layer that runs as one call where it can, and as its module otherwise."""

    def __init__(self, layer: WholeLayer, kernel: DecoderLayer) -> None:
        self.layer, self.kernel, self.own, self.inside = layer, kernel, layer.module.forward, Inside(layer)
        self.rooms = WeakKeyDictionary[DynamicLayer, Room]()

    def __call__(self, hidden_states: Tensor, *args: Any, **given: Any) -> Any:
        cached = _cached(self.layer, self.inside, hidden_states, args, given)
        if cached is None:
            self.rooms.clear()  # the modules write elsewhere
            return self.own(hidden_states, *args, **given)
        room = self.rooms.get(cached)
        if room is None or not room.serves(cached):
            room = self.rooms[cached] = Room(cached)
        y = _run(self.kernel, room, hidden_states, given["position_embeddings"])
        room.give(cached)
        return y


@contextmanager
def run_whole(layer: WholeLayer, kernel: DecoderLayer) -> Iterator[None]:
    """Inside the block the layer runs as one call where it can."""
    with forward_replaced(layer.module, OneCall(layer, kernel)):
        yield


def run_as_one_call(model: nn.Module, texts: int) -> bool:
    """Whether the layers of `model` do so now when a token of each of so many texts is decoded."""
    return texts <= MOST and any(isinstance(vars(module).get("forward"), OneCall) for module in model.modules())


def with_kernels(
    layers: Sequence[WholeLayer], attention: Sequence[SparseLinear], ffns: Sequence[SparseFFN | SparseInputFFN]
) -> list[tuple[WholeLayer, DecoderLayer]]:
    """Each layer with its kernel; attention: kernels of q, k and v, and of o, of one layer after the other."""
    parts = zip(attention[::2], attention[1::2], ffns, strict=True) if layers else ()
    return [(layer, layer.kernel(*own)) for layer, own in zip(layers, parts, strict=True)]
