"""Run a model once on a tiny input and list the down projections of its FFNs, with the modules that compute them."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_utils.console import InputError
from sparsity_utils.neurons.flow import Down, Flow, Stray
from sparsity_utils.neurons.modes import eager_attention, evaluating, unchanged
from sparsity_utils.neurons.vectors import Frames, Map, Matrix, Role, Source, Vectors, common

TEXTS, TOKENS, IMAGES = 2, 5, 2  # of the tiny input: several texts, so that the order of tokens shows

Inputs = Mapping[str, Any] | Tensor


@dataclass(frozen=True, eq=False)
class FirstMap:
    """A linear map of x that a module computes."""

    module: str  # its first argument is x
    outputs: slice  # which columns of what it returns make s, or the other factor of h
    matrix: Matrix  # the rows of W that they are computed with


@dataclass(frozen=True, eq=False)
class Use:
    """One down projection that ran."""

    matrix: Matrix  # W_out
    x: Source  # the vectors the FFN was applied to
    h: object  # `Vectors.source` of h
    operation: int  # number of the operation that it is a part of: one may multiply by several matrices
    frames: Frames  # the modules that ran both the first linear map and the down projection
    calls: tuple[int, ...]  # the number of the call of each of `frames`
    gathered: Frames | None  # the modules that chose the rows of x, if any did
    activation: str | None  # the module whose output is s, if there is one
    down: str | None  # the module whose first argument is h, if there is one
    gate: FirstMap | None  # what s is computed from; None where not all linear maps of x are found in modules
    up: FirstMap | None  # what s is multiplied by; None also in a plain FFN


@dataclass
class _Call:
    """A module that is running."""

    name: str
    number: int  # of calls before it
    argument: Any  # its first positional one
    tag: Vectors | None  # of that argument, when the module began


class _Tracer:
    """Keeps the stack of running modules and collects the uses."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[_Call] = []
        self.begun = 0  # calls
        self.downs = 0  # operations
        self.uses: list[Use] = []
        self.projections: dict[Map, str] = {}  # -> the module that returned its output
        self.returned: dict[str, Map] = {}  # activation module -> the map whose s it returned last
        self.flow = Flow(model, self.seen)

    def enter(self, name: str, args: tuple) -> None:
        argument = args[0] if args else None
        self.calls.append(_Call(name, self.begun, argument, self._tag(argument)))
        self.begun += 1
        self.flow.frames = tuple(call.name for call in self.calls)

    def leave(self, output: Any) -> None:
        """Note whether the module that ends is a projection or an activation module.

        A projection returns all of W x of its argument x; an activation module returns s of a linear image of x.
        """
        call = self.calls.pop()
        self.flow.frames = self.flow.frames[:-1]
        tag = self._tag(output)
        if tag is None or tag.image is None:
            return
        image, given = tag.image, self._tag(call.argument)
        if image.role is Role.LINEAR and image.frames[-1:] == (call.name,) and image.map.matrix is not None:
            all_of_it = tag.part == (0, 1, image.map.matrix.size[0])
            x = image.xs[0]
            if all_of_it and given is not None and (given.source, given.part) == (x.tensor, x.part):
                self.projections[image.map] = call.name
        if call.tag is None or call.tag.image is None:
            return
        before = call.tag.image
        if (before.role, image.role) == (Role.LINEAR, Role.ACTIVATED) and before.map is image.map:
            name = image.activation or call.name  # the innermost, where one holds another
            self.flow.tags[output] = replace(tag, image=replace(image, activation=name))
            self.returned[name] = image.map

    def seen(self, down: Down) -> None:
        h, image, call = down.vectors, down.vectors.image, self.calls[-1]
        given = self._tag(call.argument)
        is_h = given is not None and (given.source, given.part) == (h.source, h.part)
        # Hooks on modules see s and h where those return and take them, of all tokens in order, s last of all calls.
        in_order = torch.equal(down.tokens, torch.arange(len(down.tokens), device=down.tokens.device))
        hooked = is_h and in_order and self.returned.get(image.activation) is image.map
        activation, name = (image.activation, call.name) if hooked else (None, None)
        frames, first = common(image.frames, self.flow.frames), self._first_maps(down)
        calls = tuple(call.number for call in self.calls[: len(frames)])
        self.downs += 1
        for matrix, _ in down.blocks:
            x = next(x for x in image.xs if x.width == matrix.size[0])
            self.uses.append(Use(matrix, x, h.source, self.downs, frames, calls, h.gathered, activation, name, *first))

    def _first_maps(self, down: Down) -> tuple[FirstMap | None, FirstMap | None]:
        """Gate and up. A plain FFN has no up; both are None where a map is not computed by a module."""
        image = down.vectors.image
        factors = image.factors if image.role is Role.PRODUCT else ((image.map, down.vectors.part),)
        found = [self._first_map(*factor, down.h.shape[-1]) for factor in factors]
        if not found or None in found:
            return None, None
        return found[0], found[1] if len(found) > 1 else None

    def _first_map(self, applied: Map, part: tuple, d_ff: int) -> FirstMap | None:
        start, step, width = part
        module = self.projections.get(applied)
        if module is None or step < 1 or width != d_ff:
            return None
        outputs = slice(start, start + step * (width - 1) + 1, step)
        return FirstMap(module, outputs, applied.matrix.rows(outputs))

    def _tag(self, x: Any) -> Vectors | None:
        return self.flow.tags.get(x) if isinstance(x, Tensor) else None


def trace(model: nn.Module, inputs: Inputs | None = None) -> tuple[list[Use], list[Stray]]:
    """The down projections that one forward pass computes, in the order in which it does, and what else reads s or h.

    The pass is in evaluation mode and without gradients. When it ends, the model is `unchanged` and the random state
    as before.

    Args:
        inputs: keyword arguments of the model, or its one positional argument; None: two texts of five tokens, or two
            blank images.

    Raises `InputError` when the model has no such inputs, does not run on them, or moves its weights meanwhile.
    """
    given = tiny_inputs(model) if inputs is None else inputs
    tracer = _Tracer(model)
    places = [(parameter, parameter.data_ptr()) for parameter in model.parameters()]
    with ExitStack() as stack:
        stack.enter_context(unchanged(model))
        stack.enter_context(evaluating(model))
        stack.enter_context(eager_attention(model))
        stack.enter_context(torch.random.fork_rng(_cuda_devices(model)))
        for name, module in model.named_modules():
            _watch(stack, tracer, name, module)
        stack.enter_context(tracer.flow)
        try:
            model(**given) if isinstance(given, Mapping) else model(given)
        except Exception as error:
            which = "a tiny input of its own" if inputs is None else "the given inputs"
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{type(model).__name__} did not run on {which}, which finding its FFNs needs "
                f"({type(error).__name__}: {reason}); pass find_ffns inputs that it takes."
            ) from error
        if any(parameter.data_ptr() != place for parameter, place in places):
            raise InputError(
                f"{type(model).__name__} moves its weights while it runs, as offloading does: "
                f"load it on one device, without offloading."
            )
    return tracer.uses, tracer.flow.strays


def _watch(stack: ExitStack, tracer: _Tracer, name: str, module: nn.Module) -> None:
    enter = module.register_forward_pre_hook(lambda module, args: tracer.enter(name, args), prepend=True)
    stack.callback(enter.remove)
    leave = module.register_forward_hook(lambda module, args, output: tracer.leave(output))
    stack.callback(leave.remove)


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"})


def tiny_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Inputs that a transformers model of texts, or of images, takes.

    Raises `InputError` for a model of another kind.
    """
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    vocabulary = _vocabulary(model) if config is not None and main == "input_ids" else None
    if vocabulary is not None:
        padding, chunk = getattr(config, "pad_token_id", None), getattr(config, "chunk_size_feed_forward", 0)
        usable = [token for token in range(min(vocabulary, TEXTS * TOKENS + 1)) if token != padding] or [0]
        tokens = 2 * chunk if chunk else TOKENS  # FFNs in chunks run on multiples of their size, here on two
        ids = torch.tensor([usable[i % len(usable)] for i in range(TEXTS * tokens)], device=device)
        inputs = {"input_ids": ids.view(TEXTS, tokens)}
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = inputs["input_ids"]
        return inputs
    if main == "pixel_values" and hasattr(config, "image_size") and hasattr(config, "num_channels"):
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        dtype = next(model.parameters()).dtype
        return {"pixel_values": torch.zeros(IMAGES, config.num_channels, height, width, device=device, dtype=dtype)}
    raise InputError(
        f"{type(model).__name__} takes neither input_ids nor pixel_values of a size that its config tells: "
        f"call find_ffns(model, inputs=...) once with inputs that it takes."
    )


def _vocabulary(model: nn.Module) -> int | None:
    """How many token ids the model knows; None where its embedding does not tell."""
    try:
        weight = model.get_input_embeddings().weight  # type: ignore[operator]  # of a transformers model
    except (AttributeError, NotImplementedError):
        return None
    return len(weight)
