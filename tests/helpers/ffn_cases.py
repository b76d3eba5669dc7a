"""FFNs of odd shapes with a chosen share of inactive neurons, the reference in float64, and the error measure."""

import pytest
import torch

from kernels import SparseFFN, naive

SHAPES = {  # name -> (d, d_ff, d_out)
    "one": (1, 1, 1),
    "tiny": (3, 5, 3),
    "odd": (63, 157, 63),
    "block": (64, 160, 64),
    "tall": (37, 300, 21),
    "wide": (301, 33, 301),
}
BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # relative RMS; a dropped row gives > 0.02


def ffn_case(
    shape, sparsity, *, tokens=1, act="relu", rule="gate", gated=True, biases=False, dtype=torch.float32, device="cpu"
):
    """Arguments of `sparse_ffn`, in `dtype`, of which about `sparsity` of all pairs of token and neuron are inactive.

    The threshold lies in a wide gap between the magnitudes it is compared with, so that the order of a sum cannot
    decide whether a neuron is active. Sparsity 0 and 1 mean none and all.
    """
    d, d_ff, d_out = SHAPES[shape]
    random = torch.Generator().manual_seed(d * d_ff + tokens)

    def normal(*size, scale=1.0):
        return (torch.randn(size, generator=random, dtype=torch.float64) * scale).to(dtype).to(device)

    case = {
        "x": normal(tokens, d),
        "w_gate": normal(d_ff, d, scale=d**-0.5),
        "w_up": normal(d_ff, d, scale=d**-0.5) if gated else None,
        "w_down_t": normal(d_ff, d_out, scale=d_ff**-0.5),
        "act": act,
        "rule": rule,
    }
    if biases:
        case |= {"b_gate": normal(d_ff, scale=0.5), "b_down": normal(d_out, scale=0.5)}
        case |= {"b_up": normal(d_ff, scale=0.5)} if gated else {}
    return case | {"threshold": threshold_for(case, sparsity)}


def threshold_for(case, sparsity):
    """One for all neurons for the rule "gate"; for "neuron", as in CETT, one for |h_i| times its norm of W_down."""
    _, s, h = neurons(case)
    if case["rule"] == "gate":
        return gap(s.abs().flatten(), sparsity)
    norms = case["w_down_t"].double().norm(dim=1)  # (d_ff,)
    return (gap((h.abs() * norms).flatten(), sparsity) / norms).float()


def gap(magnitudes, sparsity):
    """A number that about `sparsity` of the magnitudes lie below, amid the widest gap near there."""
    ordered = torch.cat([magnitudes.new_zeros(1), magnitudes.sort().values])  # (n + 1,)
    if sparsity == 0:
        return 0.0
    if sparsity == 1:
        return float(ordered[-1]) * 2 + 1
    near, reach, last = round(sparsity * len(magnitudes)), len(magnitudes) // 20, len(magnitudes) - 1
    low, high = min(max(near - reach, 0), last), min(near + reach, last)
    at = low + int((ordered[low + 1 : high + 2] - ordered[low : high + 1]).argmax())
    return float(ordered[at] + ordered[at + 1]) / 2


def neurons(case):
    """g, s and h in float64, (tokens, d_ff)."""
    wide = widened(case)
    g = torch.nn.functional.linear(wide["x"], wide["w_gate"], wide.get("b_gate"))
    s = naive.ACTIVATIONS[case["act"]](g)
    return (
        g,
        s,
        s if wide["w_up"] is None else s * torch.nn.functional.linear(wide["x"], wide["w_up"], wide.get("b_up")),
    )


def widened(case):
    return {key: value.double() if isinstance(value, torch.Tensor) else value for key, value in case.items()}


def reference(case):
    """y in float64, (tokens, d_out), from the numbers that the kernel is given."""
    return naive.sparse_ffn(**widened(case))


def computed(run, case):
    """y of a backend, (tokens, d_out)."""
    ffn = SparseFFN(**{key: value for key, value in case.items() if key != "x"})
    return run(ffn, case["x"])


def assert_close(y, expected, bound=None):
    """Relative RMS error within the bound of the dtype of `y`; where nothing is active, exact zeros."""
    assert y.shape == expected.shape and y.isfinite().all()
    bound = BOUNDS[y.dtype] if bound is None else bound
    size = expected.square().mean().sqrt()
    error = (y.double() - expected).square().mean().sqrt()
    assert error <= bound * size, f"relative RMS error {float(error / size):.3g}, allowed {bound:.3g}"


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that is not written holds NaN."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def fill(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(2**30) if x.element_size() > 2 else x

        return made

    monkeypatch.setattr(torch, "empty", fill(empty))
    monkeypatch.setattr(torch, "empty_like", fill(empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", fill(new_empty))
