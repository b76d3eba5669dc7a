"""Training that reads only the largest inputs, held against the written-out reading of `literal_inputs`."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from literal_inputs import literal_maps, read_rows, ternary_entries
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, GraniteForCausalLM
from transformers.models.granite.modeling_granite import GraniteRMSNorm

from sparsity_utils.console import InputError
from sparsity_utils.models.config import ModelConfig, TrainConfig
from sparsity_utils.models.decoder import build_model, granite_config
from sparsity_utils.models.input_training import KEPT_INPUTS, KeptInputs, TernaryLinear, ternary
from sparsity_utils.models.penalty import ActivationPenalty
from sparsity_utils.models.pretrained import load_weights, open_checkpoint
from sparsity_utils.models.quick import QuickLinear
from sparsity_utils.models.training import Training, checkpoint_folder, model_tensors, trainable
from sparsity_utils.text.windows import TrainingBatches, measurement_batches

CPU = torch.device("cpu")
MODEL = ModelConfig(16, 2, vocabulary=64, context=16, head_size=8, base_width=16, ffn_ratio=3.0)  # 48 neurons
TRAIN = TrainConfig(tokens=64 * 16, batch_tokens=64, checkpoints=6, seed=3)
WAYS = {  # of training
    "half": {"keep": 8, "activation": "relu2"},
    "blocks": {"keep": 3, "block": 16, "rescale": "unit", "activation": "silu"},
    "no_straight_through": {"keep": 8, "straight_through": False},
    "ternary": {"keep": 8, "quantised": True, "rescale": "ratio", "activation": "gelu"},
    "ternary_dense": {"quantised": True, "activation": "relu2"},
    "plain": {"ffn": "plain", "keep": 6, "activation": "gelu"},
    "plain_ternary": {"ffn": "plain", "quantised": True, "activation": "silu"},
}
SAVED = ("ternary", "plain")
IDS = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(5))


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(got.double() - wanted.double()) / torch.linalg.vector_norm(wanted.double()))


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("rescale", ["none", "ratio", "unit"])
@pytest.mark.parametrize("straight_through", [True, False])
@pytest.mark.parametrize("block", [0, 16])
def test_what_is_read_and_its_gradient_equal_the_written_out_ones(quantised, rescale, straight_through, block):
    for keep in range(1, 17):
        how = KeptInputs(keep, block, straight_through, rescale, quantised)
        x, above = numbers(2, 3, 48, seed=keep).requires_grad_(), numbers(2, 3, 48, seed=99)
        read = how.read(x)
        (read * above).sum().backward()
        values, slopes = read_rows(x, how)
        assert (read != 0).sum() == 6 * 3 * keep or quantised  # a small input may be quantised to zero
        torch.testing.assert_close(read.detach(), values, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(x.grad, above * slopes, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(32,), (1, 32), (7, 32), (2, 1, 5, 32), (0, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_shape_and_type_reads_the_same_inputs(shape, dtype):
    how = KeptInputs(5, 16)
    x = numbers(*shape).to(dtype)
    assert how.read(x).dtype == dtype and how.read(x).shape == x.shape
    if x.numel():
        torch.testing.assert_close(how.read(x).double(), read_rows(x, how)[0], rtol=0, atol=0)
    transposed = numbers(32, 6).to(dtype).t()
    torch.testing.assert_close(how.read(transposed), how.read(transposed.contiguous()), rtol=0, atol=0)


def test_ties_with_the_last_one_stay():
    x = torch.tensor([3.0, -1, 1, 0.5, 1, -3, 0, 0] * 2)
    kept = KeptInputs(4).kept(x.abs())  # 4 of 16: the four of size 3
    assert kept.tolist() == [True, False, False, False, False, True, False, False] * 2
    kept = KeptInputs(5).kept(x.abs())  # the fifth has size 1, as have five others
    assert kept.tolist() == [True, True, True, False, True, True, False, False] * 2


@pytest.mark.parametrize("rescale", ["none", "ratio", "unit"])
@pytest.mark.parametrize("quantised", [False, True])
def test_a_vector_of_zeros_stays_one_and_its_neighbours_as_they_are(rescale, quantised):
    x = torch.stack([torch.zeros(16), numbers(16).float()]).requires_grad_()
    how = KeptInputs(4, 0, True, rescale, quantised)
    read = how.read(x)
    read.sum().backward()
    assert not read[0].any() and torch.isfinite(x.grad).all()
    torch.testing.assert_close(read[1], how.read(x[1]))


def test_ternary_weights_are_the_written_out_ones_and_their_gradient_passes():
    weight = numbers(5, 7).mul_(0.3)
    torch.testing.assert_close(ternary(weight), ternary_entries(weight), rtol=1e-12, atol=0)
    assert not ternary(torch.zeros(3, 2)).any()
    linear = torch.nn.Linear(7, 5, bias=False, dtype=torch.float64)
    linear.weight.data, linear.__class__ = weight, TernaryLinear
    x, above = numbers(4, 7, seed=1), numbers(4, 5, seed=2)
    y = linear(x)
    (y * above).sum().backward()
    torch.testing.assert_close(y.detach(), x @ ternary_entries(weight).t())
    torch.testing.assert_close(linear.weight.grad, above.t() @ x)


def decoders(way: str) -> tuple[GraniteForCausalLM, GraniteForCausalLM]:
    """As it is trained, and an unmodified one whose seven maps each read on their own, both in float64."""
    config = dataclasses.replace(MODEL, **WAYS[way])
    literal = build_model(config, 1).double().eval()
    literal_maps(literal, KeptInputs.of(config), config.quantised)
    return trainable(config, 1, CPU).double(), literal


@pytest.fixture
def wide_norms(monkeypatch):
    """RMSNorm in float64: transformers rounds to float32 in there, which may move an input across a step of 8 bits."""

    def normed(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(GraniteRMSNorm, "forward", normed)


@pytest.mark.parametrize("way", WAYS)
def test_a_decoder_computes_as_if_each_map_masked_its_own_input(way, wide_norms):
    ours, literal = decoders(way)
    for model in (ours, literal):
        model(input_ids=IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        assert relative(ours(input_ids=IDS).logits, literal(input_ids=IDS).logits) < 1e-12
    wanted = dict(literal.named_parameters())
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert {"model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"} < set(gradients)
    for name, gradient in gradients.items():
        assert relative(gradient, wanted[name].grad) < 1e-10, name


def test_the_reference_sees_a_map_that_reads_everything():
    """The test above can fail: with one hook gone, logits move by far more than its tolerance."""
    ours, literal = decoders("half")
    ours.model.layers[1].post_attention_layernorm._forward_hooks.clear()
    with torch.no_grad():
        assert relative(ours(input_ids=IDS).logits, literal(input_ids=IDS).logits) > 1e-3


def test_a_decoder_that_reads_everything_is_the_one_it_was():
    assert KeptInputs.of(MODEL) is None
    model = trainable(MODEL, 1, CPU)
    linears = [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 14 and all(type(linear) is QuickLinear for linear in linears)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not hasattr(model.config, "kept_inputs")


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 64, 3000).astype(np.uint16)


def training(way: str, tokens: np.ndarray, folder, **changes) -> Training:
    config = dataclasses.replace(MODEL, **WAYS[way])
    validation = measurement_batches(tokens, 16, "evaluation", 320)
    return Training(config, dataclasses.replace(TRAIN, **changes), tokens, validation, folder)


@pytest.fixture(scope="module", params=SAVED)
def trained(request, tokens, tmp_path_factory):
    """A finished run: its way, itself, and the folder of its last checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    run = training(request.param, tokens, folder)
    last = checkpoint_folder(folder, run.finish()[-1]["step"])
    Tokenizer(WordLevel({str(i): i for i in range(64)}, unk_token="0")).save(str(last / "tokenizer.json"))
    return request.param, run, last


def test_a_checkpoint_opens_as_it_was_trained(trained):
    _way, run, last = trained
    with torch.no_grad():
        wanted = run.model.eval()(input_ids=IDS).logits
        for model in (load_weights(last), open_checkpoint(last)[0].cpu()):
            assert not model.training
            assert relative(model(input_ids=IDS).logits, wanted) < 1e-5
        unaware = AutoModelForCausalLM.from_pretrained(last)
        assert relative(unaware(input_ids=IDS).logits, wanted) > 1e-4  # what transformers alone would make of it
    assert run.rows[-1]["validation_loss"] == pytest.approx(np.log(64), abs=1.0)  # of random tokens


def test_a_checkpoint_holds_ternary_weights_and_training_goes_on_with_their_origins(trained):
    _way, run, last = trained
    stored = load_file(last / "model.safetensors")
    for name, tensor in model_tensors(run.model).items():
        if name.endswith("_proj.weight") and run.model_config.quantised and tensor.any():
            assert len(stored[name].unique()) <= 3 < 100 < len(tensor.unique())
            torch.testing.assert_close(stored[name].double(), ternary_entries(tensor), rtol=1e-5, atol=0)
        else:
            assert torch.equal(stored[name], tensor), name


def test_constants_of_a_plain_ffn_do_not_move(trained):
    way, _run, last = trained
    stored, biases = load_file(last / "model.safetensors"), 0
    for name, tensor in stored.items():
        if name.endswith("bias"):
            biases += 1
            assert torch.equal(tensor, torch.full_like(tensor, float("up_proj" in name))), name
        elif "up_proj" in name:
            assert tensor.any() != ("plain" in way), name
    assert biases == (6 if "plain" in way else 0)


def test_a_killed_run_ends_in_the_same_latent_weights(trained, tokens, tmp_path, monkeypatch):
    way, whole, _last = trained
    original, steps = TrainingBatches.__call__, iter(range(1000))
    monkeypatch.setattr("sparsity_utils.models.training.SAVE_EVERY", 0.0)  # a state after every step

    def kill(self, step):
        if next(steps) == 9:
            raise KeyboardInterrupt
        return original(self, step)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(TrainingBatches, "__call__", kill)
        training(way, tokens, tmp_path).finish()
    resumed = training(way, tokens, tmp_path)
    rows = resumed.finish()
    assert [row["validation_loss"] for row in rows] == [row["validation_loss"] for row in whole.rows]
    ends = model_tensors(resumed.model)
    assert all(torch.equal(tensor, ends[name]) for name, tensor in model_tensors(whole.model).items())


@pytest.mark.parametrize("way", ["half", "ternary"])
def test_micro_batches_change_no_gradient(way, tokens, tmp_path):
    gradients = []
    for micro in (None, 16):
        run = training(way, tokens, tmp_path, micro_tokens=micro, clip_norm=1e9, l1=0.01)
        run.optimizer.step = lambda run=run: gradients.append([p.grad.clone() for p in run.model.parameters()])
        run.train_step()
    assert all(relative(pieces, whole) < 1e-4 for whole, pieces in zip(*gradients, strict=True))


@pytest.mark.parametrize("way", ["half", "ternary"])
def test_recomputing_changes_no_gradient(way, tokens, tmp_path):
    gradients = []
    for recompute in (False, True):
        run = training(way, tokens, tmp_path, recompute=recompute)
        run.optimizer.step = lambda run=run: gradients.append([p.grad.clone() for p in run.model.parameters()])
        run.train_step()
    assert all(torch.equal(again, once) for once, again in zip(*gradients, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
@pytest.mark.parametrize("way", ["half", "ternary"])
def test_compiling_changes_no_gradient(way, monkeypatch):
    """On GPUs runs are compiled; here the same graphs are, for this processor, and without the products made for it."""
    monkeypatch.setattr("sparsity_utils.models.training.quicken", lambda model: model)
    above, gradients = numbers(3, 16, 16).float(), []
    for compiled in (False, True):
        model = trainable(dataclasses.replace(MODEL, **WAYS[way]), 3, CPU)
        penalty = ActivationPenalty(model, 0.01)
        backbone = torch.compile(model.model) if compiled else model.model
        loss = (backbone(input_ids=IDS).last_hidden_state * above).sum() + penalty.taken()
        loss.backward()
        gradients.append([p.grad for p in model.model.parameters()])
    assert all(relative(compiled, plain) < 1e-5 for plain, compiled in zip(*gradients, strict=True))


REFUSED = [
    ({"keep": 0}, r"model\.keep is 0; choose 1 to 16"),
    ({"keep": 17}, r"model\.keep is 17; choose 1 to 16"),
    ({"keep": 8, "block": -16}, r"model\.block is -16; give a number of inputs"),
    ({"keep": 8, "block": 32}, r"model\.block 32 does not divide the 16 inputs of a map"),
    ({"keep": 8, "block": 16, "ffn_ratio": 2.5}, r"model\.block 16 does not divide the 40 inputs of a map"),
    ({"keep": 3, "block": 8}, r"model\.keep 3 is no whole number of 8 inputs, of which a sixteenth is 0\.5"),
    ({"keep": 3, "ffn_ratio": 2.5}, r"model\.keep 3 is no whole number of 40 inputs, of which a sixteenth is 2\.5"),
    ({"block": 16}, r"model\.block is 16, but model\.keep 16 reads all"),
    ({"rescale": "unit"}, r"model\.rescale is unit .* reads all, so that neither would do anything; leave them out"),
    ({"straight_through": False, "quantised": True}, r"model\.straight_through False, but model\.keep 16 reads all"),
    ({"keep": 8, "rescale": "l2"}, r"model\.rescale is 'l2'; choose one of none, ratio, unit"),
    ({"ffn": "wide"}, r"model\.ffn is 'wide'; choose one of gated, plain"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_a_way_that_a_shape_does_not_have_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(MODEL, **changes)


@pytest.mark.parametrize(
    "written", [{"keep": 8, "width": 3}, 8, ["keep"], {"keep": "8"}, {"keep": 99}, {"keep": 8, "block": 3}]
)
def test_a_checkpoint_that_says_something_else_is_refused(written):
    config = granite_config(ModelConfig(16, 1, vocabulary=32, context=16, head_size=8))
    setattr(config, KEPT_INPUTS, written)
    with pytest.raises(InputError, match="kept_inputs in config"):
        KeptInputs.of_checkpoint(config)
