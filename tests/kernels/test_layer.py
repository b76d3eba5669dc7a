"""A decoder layer in one call against its equations, written out token by token and head by head in float64."""

from dataclasses import replace

import pytest
import torch

from kernels import SparseFFN, cpu_layer
from kernels.layer import DecoderLayer
from kernels.linear import SparseInputFFN, SparseLinear
from kernels.naive import sparse_ffn

pytestmark = pytest.mark.usefixtures("threads")
SIZE, GAINS, RESIDUAL, SCALE, EPS = 6, (0.5, 2.0), 0.7, 0.3, (1e-2, 1e-3)


def linear(widths, d, seed, limit=0.3):
    random = torch.Generator().manual_seed(seed)
    weight_t = torch.randn(d, sum(widths), generator=random) / d**0.5
    limits = torch.full((len(widths), d), limit)
    return SparseLinear(weight_t, widths, limits, bias=torch.randn(sum(widths), generator=random))


def neurons(d, d_ff, certified=False):
    random = torch.Generator().manual_seed(9)
    gate, up, down_t = (torch.randn(d_ff, d, generator=random) / d**0.5 for _ in range(3))
    ffn = SparseFFN(gate, up, down_t, 0.2, act="relu")
    return ffn.certified() if certified else ffn


def inputs(d, d_ff):
    return SparseInputFFN(linear((d_ff, d_ff), d, 3), linear((d,), d_ff, 4))


def layer(d=21, heads=4, groups=2, ffn=None, **changed):
    random = torch.Generator().manual_seed(5)
    gains = torch.stack([torch.rand(d, generator=random) * gain for gain in GAINS])
    qkv = linear((heads * SIZE, groups * SIZE, groups * SIZE), d, 1)
    parts = {"gains": gains, "eps": EPS, "qkv": qkv, "o": linear((d,), heads * SIZE, 2), "ffn": ffn or inputs(d, 33)}
    return DecoderLayer(**parts | changed, head_size=SIZE, scale=SCALE, residual=RESIDUAL)


def given(layer, texts, length, room, seed=6):
    """x, cosines, sines, keys and values; places of no token are NaN, so that reading them shows."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(texts, layer.qkv.d, generator=random)
    angles = torch.rand(texts, SIZE, generator=random) * 6
    kept = torch.full((2, texts, layer.qkv.widths[1] // SIZE, room, SIZE), torch.nan)
    kept[..., :length, :] = torch.randn(*kept.shape[:3], length, SIZE, generator=random)
    return x, angles.cos(), angles.sin(), kept[0], kept[1]


def maps(linear, x):
    """W (x masked) + b, in float64."""
    masked = torch.where(x.abs() > linear.limits[0].double(), x, 0)
    return masked @ linear.wide_weights().double() + linear.bias.double()


def norm(x, gain, eps):
    return gain.double() * x / (x.square().mean() + eps).sqrt()


def literal(layer, x, cos, sin, keys, values, length):
    """y, (texts, d), and the newest keys and values, (texts, heads of keys, size) each."""
    outputs, new_keys, new_values = [], [], []
    for text in range(len(x)):
        own, angle = x[text].double(), text % len(cos)
        q, k, v = maps(layer.qkv, norm(own, layer.gains[0], layer.eps[0])).split(layer.qkv.widths)

        def turned(head, angle=angle):
            swapped = torch.cat([-head[SIZE // 2 :], head[: SIZE // 2]])
            return head * cos[angle].double() + swapped * sin[angle].double()

        k, v = [turned(head) for head in k.split(SIZE)], v.split(SIZE)
        mixed = []
        for number, head in enumerate(q.split(SIZE)):
            group = number // (len(q) // SIZE // len(k))
            before = keys[text, group, :length].double(), values[text, group, :length].double()
            all_keys, all_values = torch.cat([before[0], k[group][None]]), torch.cat([before[1], v[group][None]])
            mixed.append((all_keys @ turned(head) * layer.scale).softmax(0) @ all_values)
        a = own + layer.residual * maps(layer.o, torch.cat(mixed))
        outputs.append(a + layer.residual * ffn(layer.ffn, norm(a, layer.gains[1], layer.eps[1])))
        new_keys.append(torch.stack(k))
        new_values.append(torch.stack(v))
    return torch.stack(outputs), torch.stack(new_keys), torch.stack(new_values)


def ffn(ffn, x):
    if isinstance(ffn, SparseInputFFN):
        gate, up = maps(ffn.gate_up, x).chunk(2)
        return maps(ffn.down, torch.nn.functional.silu(gate) * up)
    weights = (part.double() for part in (ffn.w_gate, ffn.w_up, ffn.w_down_t))
    return sparse_ffn(x[None], *weights, ffn.threshold, ffn.act, ffn.rule)[0]


def compared(layer, texts, length, room=9):
    x, cos, sin, keys, values = given(layer, texts, length, room)
    expected, new_keys, new_values = literal(layer, x, cos, sin, keys, values, length)
    before = keys[:, :, :length].clone(), values[:, :, :length].clone()
    y = layer(x, cos, sin, keys, values, length)
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(keys[:, :, length].double(), new_keys, atol=1e-5)
    assert torch.allclose(values[:, :, length].double(), new_values, atol=1e-5)
    assert torch.equal(keys[:, :, :length], before[0]) and torch.equal(values[:, :, :length], before[1])
    assert keys[:, :, length + 1 :].isnan().all() and values[:, :, length + 1 :].isnan().all()


@pytest.mark.parametrize("texts", [1, 3])
@pytest.mark.parametrize("length", [0, 1, 8])
def test_a_layer_is_its_equations(texts, length):
    compared(layer(), texts, length)


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (3, 3), (6, 2), (5, 1)])
def test_heads(heads, groups):
    compared(layer(heads=heads, groups=groups), 2, 5)


@pytest.mark.parametrize("certified", [False, True])
def test_a_ffn_that_skips_neurons(certified):
    compared(layer(ffn=neurons(21, 35, certified)), 2, 4)


def test_texts_at_one_position_share_its_angles():
    one, (x, cos, sin, keys, values) = layer(), given(layer(), 3, 4, 9)
    expected = one(x, cos[:1].expand(3, -1), sin[:1].expand(3, -1), keys.clone(), values.clone(), 4)
    assert torch.equal(one(x, cos[:1], sin[:1], keys, values, 4), expected)


@pytest.mark.parametrize(("heads", "groups", "length"), [(5, 5, 2400), (3, 1, 6000)])
def test_many_tokens_share_their_heads_among_threads(heads, groups, length):
    one, texts = layer(heads=heads, groups=groups), 3
    assert 8 * texts * groups * length * SIZE >= 2 * cpu_layer.BYTES_PER_THREAD  # the compiled one: attention is shared
    parts = given(one, texts, length, length + 1)
    first, again = one(*parts, length), one(*parts, length)
    assert torch.equal(first, again)
    assert torch.allclose(first.double(), literal(one, *parts, length)[0], rtol=1e-5, atol=1e-5)


def test_weights_in_8_bits():
    one = layer()
    ffn = SparseInputFFN(one.ffn.gate_up.quantised(), one.ffn.down.quantised())
    compared(replace(one, qkv=one.qkv.quantised(), o=one.o.quantised(), ffn=ffn), 2, 3)


def test_broken_numbers_reach_the_output():
    one, (x, cos, sin, keys, values) = layer(), given(layer(), 2, 3, 9)
    x[1, 4] = torch.nan
    y = one(x, cos, sin, keys, values, 3)
    assert y[0].isfinite().all() and y[1].isnan().all()


@pytest.mark.parametrize(
    "changed",
    [
        {"gains": torch.ones(2, 20)},
        {"qkv": linear((24, 12, 6), 21, 1)},
        {"qkv": linear((24, 12), 21, 1)},
        {"qkv": linear((24, 9, 9), 21, 1)},
        {"o": linear((21,), 23, 2)},
        {"o": linear((20,), 24, 2)},
        {"ffn": neurons(20, 35)},
        {"ffn": SparseInputFFN(linear((33, 33), 21, 3), linear((1,), 33, 4))},
        {"ffn": SparseFFN(torch.ones(35, 21), torch.ones(35, 21), torch.ones(35, 1), 0.2)},
    ],
)
def test_parts_that_do_not_follow_each_other_are_refused(changed):
    with pytest.raises(ValueError, match="make no layer of 21 with heads of 6"):
        layer(**changed)


def test_other_numbers_than_float32_are_refused():
    half = linear((24, 12, 12), 21, 1)
    half = SparseLinear(half.weight_t.half(), half.widths, half.limits, bias=half.bias.half())
    with pytest.raises(ValueError, match="float16"):
        layer(qkv=half)
    down = linear((21,), 33, 4)
    down = SparseLinear(down.weight_t.half(), down.widths, down.limits, bias=down.bias.half())
    with pytest.raises(ValueError, match="float16"):
        layer(ffn=SparseInputFFN(linear((33, 33), 21, 3), down))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.ones(2, 20)}, r"x is \(2, 20\).* must be \(sequences, 21\)"),
        ({"x": torch.ones(21)}, "one token of each"),
        ({"x": torch.ones(2, 21).double()}, "a layer is float32 on a CPU"),
        ({"x": torch.ones(2, 21).requires_grad_()}, "needs a gradient"),
        ({"x": torch.ones(3, 21)}, r"must be \(3 or 1, 6\)"),
        ({"cos": torch.ones(2, 3)}, r"must be \(2 or 1, 6\)"),
        ({"sin": torch.ones(1, 6)}, r"must be \(2 or 1, 6\)"),
        ({"sin": torch.ones(2, 6).half()}, "a layer is float32 on a CPU"),
        ({"keys": torch.ones(2, 3, 9, 6)}, r"must be \(2, 2, room, 6\)"),
        ({"keys": torch.ones(2, 2, 6)}, r"must be \(2, 2, room, 6\)"),
        ({"values": torch.ones(2, 2, 8, 6)}, r"must be \(2, 2, room, 6\)"),
        ({"values": torch.ones(2, 2, 9, 6).bfloat16()}, "a layer is float32 on a CPU"),
        ({"keys": torch.ones(2, 2, 6, 9).mT}, "must be contiguous"),
        ({"keys": torch.ones(2, 2, 9, 6).requires_grad_()}, "needs a gradient"),
        ({"length": 9}, "there is room for 9 tokens"),
        ({"length": -1}, "there is room for 9 tokens"),
    ],
)
def test_what_does_not_fit_a_layer_is_refused(changed, message):
    names = ("x", "cos", "sin", "keys", "values")
    parts = dict(zip(names, given(layer(), 2, 4, 9), strict=True)) | {"length": 4}
    with pytest.raises(ValueError, match=message):
        layer()(**parts | changed)


def test_a_forked_process_is_refused(monkeypatch):
    from kernels import cpu_layer

    monkeypatch.setattr(cpu_layer, "forked", lambda: True)
    with pytest.raises(ValueError, match="does not run in a forked process"):
        layer()(*given(layer(), 2, 4, 9), 4)
