"""Train a decoder whose linear maps read only the largest of their inputs, as Q-Sparse does (arXiv 2407.10969).

A layer has four vectors that linear maps read (`neurons.linears`): one for q, k and v, one for gate and up, one for o
and one for down. Each of them, x with n entries, is replaced by

    x_hat = scale (quantise(x) * M)

M keeps the K = n keep / 16 entries of the largest |x| of each token (section 2.1), among all of them or in every block
of `block` neighbours (section 4.1); ties with the K-th stay. `scale` is 1, ||x|| / ||y|| ("ratio") or
sqrt(n) / ||y|| ("unit", the norm of 1 that the paper prints in words, times what vectors after an RMSNorm have), where
y = quantise(x) * M.

Gradients are those of a straight-through estimator: dL/dx = scale dL/dx_hat for every entry, also for those that M left
out (equation 13); without it they get none. Quantised inputs have 8 bits, round(127 x / max |x|), and the weights are
round(W / mean |W|) between -1 and 1, times mean |W| (equations 5 to 10), with straight-through gradients as well.

The embedding and the output head read everything.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from kernels.selection import kth_largest
from sparsity_utils.console import InputError, check
from sparsity_utils.models.config import PARTS, ModelConfig
from sparsity_utils.neurons.linears import find_linears
from sparsity_utils.neurons.thresholds import Thresholds

KEPT_INPUTS = "kept_inputs"  # the key of config.json under which a checkpoint says what its maps read
SMALLEST = 1e-12  # norm, or size of the largest weight, below which a vector counts as zero
BITS = 127  # steps of an input of 8 bits on either side of zero


@dataclass(frozen=True)
class KeptInputs:
    """What the linear maps of a model read; the fields are those of `ModelConfig`, explained above."""

    keep: int = PARTS
    block: int = 0
    straight_through: bool = True
    rescale: str = "none"
    quantised: bool = False

    @classmethod
    def of(cls, config: ModelConfig) -> "KeptInputs | None":
        """Those of a configuration; None where maps read everything."""
        found = cls(config.keep, config.block, config.straight_through, config.rescale, config.quantised)
        return None if found.keep == PARTS and not found.quantised else found

    @classmethod
    def of_checkpoint(cls, config: PreTrainedConfig) -> "KeptInputs | None":
        """Those that config.json of a checkpoint says; None where it says nothing.

        Raises InputError for settings that are not those of this class.
        """
        written, kinds = getattr(config, KEPT_INPUTS, None) or {}, {field.name: field.type for field in fields(cls)}
        check(
            isinstance(written, dict) and all(type(value) is kinds.get(name) for name, value in written.items()),
            f"{KEPT_INPUTS} in config.json is {written!r}; it holds {', '.join(kinds)}: copy the file again.",
        )
        if not written:
            return None
        try:
            ModelConfig(config.hidden_size, 1, ffn_ratio=config.intermediate_size / config.hidden_size, **written)
        except InputError as error:
            raise InputError(f"{KEPT_INPUTS} in config.json is not of this shape: {error}") from error
        return cls(**written)

    def written(self) -> dict[str, Any]:
        """As config.json has it."""
        return asdict(self)

    def kept(self, sizes: Tensor) -> Tensor:
        """Which entries are read, bool. `sizes`: |x|, (..., n); the result likewise."""
        if self.keep == PARTS:
            return torch.ones_like(sizes, dtype=torch.bool)
        groups = sizes.unflatten(-1, (-1, self.block or sizes.shape[-1]))  # (..., blocks, inputs of a block)
        return (groups >= kth_largest(groups, groups.shape[-1] * self.keep // PARTS)).flatten(-2)

    def read(self, x: Tensor) -> Tensor:
        """x_hat of the vector x, (..., n)."""
        return _Read.apply(x, self)

    def scale(self, x: Tensor, left: Tensor) -> Tensor | None:
        """What the kept entries `left` of x are multiplied by, (..., 1); None for 1."""
        if self.rescale == "none":
            return None
        norm = torch.linalg.vector_norm(left, dim=-1, keepdim=True).clamp_min(SMALLEST)
        wanted = torch.linalg.vector_norm(x, dim=-1, keepdim=True) if self.rescale == "ratio" else x.shape[-1] ** 0.5
        return wanted / norm


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, how: KeptInputs) -> Tensor:
        kept = how.kept(x.abs())
        left = (_eight_bits(x) if how.quantised else x) * kept
        scale = how.scale(x, left)
        ctx.save_for_backward(scale, None if how.straight_through else kept)
        return left if scale is None else left * scale

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        scale, kept = ctx.saved_tensors
        grad = grad if scale is None else grad * scale
        return (grad if kept is None else grad * kept), None


def _eight_bits(x: Tensor) -> Tensor:
    """x in steps of its largest entry's 127th part."""
    step = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST) / BITS
    return (x / step).round().clamp(-BITS - 1, BITS) * step


def ternary(weight: Tensor) -> Tensor:
    """The weights -1, 0 and 1 nearest to `weight` / mean |weight|, times that mean."""
    mean = weight.abs().mean().clamp_min(SMALLEST)
    return (weight / mean).round().clamp(-1, 1) * mean


class _Ternary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        return ternary(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class TernaryLinear(nn.Linear):
    """A linear map that computes with `ternary` weights, and whose gradient goes to the weights that they come from."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, _Ternary.apply(self.weight), self.bias)


def read_kept_inputs(model: PreTrainedModel, how: KeptInputs) -> list[RemovableHandle]:
    """Let every linear map of a decoder of this study read x_hat; returns the hooks, which can be removed.

    q, k and v read what the norm before attention gives, gate and up what the norm before the FFN gives.
    """
    hooks = []
    for layer in model.base_model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            hooks.append(norm.register_forward_hook(lambda module, args, x: how.read(x)))
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            hooks.append(linear.register_forward_pre_hook(lambda module, args: (how.read(args[0]),)))
    return hooks


def attach_as_trained(model: PreTrainedModel) -> PreTrainedModel:
    """A model that was opened, with its maps reading what they were trained to read, as its config.json says."""
    if how := KeptInputs.of_checkpoint(model.config):
        read_kept_inputs(model, how)
    return model


def trained_thresholds(model: PreTrainedModel) -> Thresholds | None:
    """The thresholds with which `sparse_inputs` and `sparse_kernels` have maps read what they were trained to read.

    model: opened to read everything, as `load_weights` does with `as_trained=False`.

    Returns those of the rule "teal-top-k", a number of inputs for each map; None where maps were trained to read
    everything. Raises InputError where that rule computes something else than was trained.
    """
    how = KeptInputs.of_checkpoint(model.config)
    if how is None:
        return None
    check(
        not how.block and not how.quantised and how.rescale == "none",
        f"The model was trained with {how.written()}; thresholds stand for inputs that are chosen among all of a map, "
        "and neither rescaled nor quantised: open it as trained.",
    )
    return Thresholds("teal-top-k", tuple(float(one.inputs * how.keep // PARTS) for one in find_linears(model)))


def prepare_to_train(model: PreTrainedModel) -> PreTrainedModel:
    """A fresh model that is to be trained as its config says: `attach_as_trained`, its weights ternary where asked."""
    how = KeptInputs.of_checkpoint(model.config)
    if how and how.quantised:
        for module in model.base_model.layers.modules():
            if isinstance(module, nn.Linear):
                module.__class__ = TernaryLinear
    return attach_as_trained(model)


def as_computed(config: PreTrainedConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that a model computes with, of those that it is trained in: what a checkpoint holds."""
    how = KeptInputs.of_checkpoint(config)
    if how is None or not how.quantised:
        return tensors
    return {name: ternary(tensor) if name.endswith("_proj.weight") else tensor for name, tensor in tensors.items()}
