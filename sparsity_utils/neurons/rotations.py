"""Rotate the vectors that attention and FFN read, so that columns of W_k and W_gate become orthogonal.

WINA (arXiv 2505.19427v2, section 3) keeps the inputs of the largest |z_j| ||W'[:, j]||, which is the best choice where
W'^T W' is diagonal. With x = g * x^, g the gains of the RMSNorm before, and W g = U S V^T, the coordinates z = V^T x^
have that property: W' = W g V = U S. V is taken from W_k for all that attention reads, from W_gate for the FFN.

The published code rotates embeddings, residual stream and head, and multiplies the residual stream by V_i^T V_(i+1)
between: two products of size d x d per block. Here each vector is rotated where it is read, which needs as many
products, gives the same masks, and leaves residual stream, embeddings and head (tied or not) as they are.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from sparsity_utils.console import progress
from sparsity_utils.neurons.find import widened
from sparsity_utils.neurons.linears import Basis, LinearMap, by_vector, find_linears
from sparsity_utils.neurons.modes import evaluating
from sparsity_utils.neurons.trace import Inputs, tiny_inputs

DIAGONAL = {"attention": "k", "ffn": "gate"}  # vector -> the map whose W'^T W' is made diagonal
ROUNDING = 0.02  # relative difference at which a module still counts as an RMSNorm: bfloat16 rounds by 0.004
LEVEL = 256.0  # far above the epsilon of any norm


def rotated(model: nn.Module, inputs: Inputs | None = None, show_progress: bool = False) -> list[LinearMap]:
    """The linear maps of `model`, those of attention and FFN with a basis: for `observe_inputs` and `sparse_inputs`.

    With nothing masked, the model computes what it did, to rounding. The gains g are those of the module that returned
    the vector, if that is an RMSNorm, else 1. Bases are computed and kept in float32 or wider. Errors as of
    `find_linears`.
    """
    maps = find_linears(model, inputs)
    gains = _gains(model, maps, inputs)
    bases = {}
    for readers in progress(by_vector(maps), "rotations", shown=show_progress):
        made_diagonal = next((linear for linear in readers if linear.role == DIAGONAL.get(linear.vector)), None)
        if made_diagonal is not None:
            bases[readers[0].layer, readers[0].vector] = _basis(made_diagonal, gains[made_diagonal])
    return [replace(linear, basis=bases.get((linear.layer, linear.vector))) for linear in maps]


def rotation_weights(maps: list[LinearMap]) -> int:
    """Numbers in the matrices that rotate the vectors of `maps`, each read once per token."""
    return sum(basis.into.numel() for basis in {linear.basis for linear in maps if linear.basis is not None})


def _basis(linear: LinearMap, gains: Tensor | None) -> Basis:
    weight = widened(linear.weight)
    gains = torch.ones_like(weight[0]) if gains is None else widened(gains)
    # The eigenvectors of W^T W are V, the largest last; with a wide W the null space is among them. In float64 their
    # errors are far below those of a float32 decomposition, and 576 of them take less than half of its time.
    wide = (weight * gains).double()
    v = torch.linalg.eigh(wide.mT @ wide).eigenvectors.flip(1).to(weight)  # (in, in)
    inverse = torch.where(gains == 0, 0.0, 1 / gains)  # where a gain is zero, so is x
    return Basis(into=v.mT * inverse, back=gains[:, None] * v)


def _gains(model: nn.Module, maps: list[LinearMap], inputs: Inputs | None) -> dict[LinearMap, Tensor | None]:
    """The gains of the RMSNorm that returned the vector each map reads, (in,); None where none did."""
    returned: list[tuple[Tensor, Tensor]] = []  # what RMSNorms returned and their gains
    found: dict[LinearMap, Tensor | None] = {}

    def keep(module: nn.Module, args: tuple, output: object) -> None:
        gains = _rms_gains(module, args, output)
        if gains is not None:
            returned.append((output, gains))  # type: ignore[arg-type]  # a tensor, since it has gains

    def look(linear: LinearMap, x: Tensor) -> None:
        found[linear] = next((gains for output, gains in reversed(returned) if output is x), None)

    given = tiny_inputs(model) if inputs is None else inputs
    handles = [module.register_forward_hook(keep) for module in model.modules() if not any(module.children())]
    handles += [
        linear.module.register_forward_pre_hook(lambda module, args, linear=linear: look(linear, args[0]))
        for linear in maps
    ]
    try:
        with evaluating(model):
            model(given) if isinstance(given, Tensor) else model(**given)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _rms_gains(module: nn.Module, args: tuple, output: object) -> Tensor | None:
    """The gains g of a module that returned g * x / rms(x), (in,); None for any other."""
    if getattr(module, "weight", None) is None or len(args) != 1 or not isinstance(output, Tensor):
        return None
    x = args[0]
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.shape != output.shape:
        return None
    level = torch.full((1, x.shape[-1]), LEVEL, dtype=x.dtype, device=x.device)
    gains = widened(module.forward(level)[0])  # g * 1
    wide = widened(x)
    expected = gains * wide * wide.square().mean(-1, keepdim=True).clamp(min=1e-30).rsqrt()
    same = (expected - output).norm() <= ROUNDING * expected.norm()
    return gains if bool(same) and bool(gains.any()) else None
