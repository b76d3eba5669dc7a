"""Every FFN and every path of its neurons is measured, or the model is refused in a sentence."""

from copy import deepcopy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from families import Keep, build, inputs, keep_none, left_behind, output
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from sparsity_utils.console import InputError
from sparsity_utils.neurons.find import find_ffns
from sparsity_utils.neurons.hooks import observe_neurons, sparse_neurons

ADAPTER = "merge adapters into the weights first"


def offloaded_layer(model, folder):
    places = {name: "cpu" for name, _ in model.named_children()} | {"model": "cpu"}
    inside = {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"}
    places = {"lm_head": "cpu", **inside, "model.layers.0": "cpu", "model.layers.1": "disk"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


ELSEWHERE = {
    "one layer on disk": offloaded_layer,
    "disk_offload": lambda model, folder: disk_offload(model, folder, execution_device="cpu") or model,
    "cpu_offload": lambda model, folder: cpu_offload(model, execution_device="cpu") or model,
    "meta": lambda model, folder: model.to("meta"),
}


@pytest.mark.parametrize("move", ELSEWHERE.values(), ids=ELSEWHERE)
def test_weights_that_are_elsewhere_are_refused(move, tmp_path):
    model = build("llama")
    assert len(find_ffns(model)) == 2
    model = move(model, tmp_path)
    with pytest.raises(InputError, match=r"The weight .* of LlamaForCausalLM is not in memory .* load the model whole"):
        find_ffns(model)


def test_weights_on_several_devices_are_refused(monkeypatch):
    model = build("llama")
    monkeypatch.setattr(type(model.lm_head.weight), "device", property(lambda p: other_device(p, model)), raising=False)
    with pytest.raises(InputError, match=r"lie on several devices \(cpu, cuda:1\): move it to one, such as model.to"):
        find_ffns(model)


def other_device(parameter, model):
    return torch.device("cuda:1" if parameter is model.lm_head.weight else "cpu")


class Moves(nn.Linear):
    """Brings its weight from elsewhere whenever it runs."""

    def forward(self, x):
        self.weight.data = self.weight.data.clone()
        return super().forward(x)


def test_weights_that_move_while_the_model_runs_are_refused():
    model = build("llama")
    model.model.layers[1].mlp.down_proj = Moves(24, 16).double()
    with pytest.raises(InputError, match=r"LlamaForCausalLM moves its weights while it runs.*without offloading"):
        find_ffns(model)


def peft_model(targets, **options):
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=targets, lora_alpha=5, init_lora_weights=False, **options)
    return get_peft_model(build("llama"), config).eval()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_adapters_of_the_down_projection_are_refused_until_they_are_merged(options):
    model = peft_model(["down_proj"], **options)
    with pytest.raises(InputError, match=ADAPTER):
        find_ffns(model)
    with model.disable_adapter():
        assert len(find_ffns(model)) == 2
    with pytest.raises(InputError, match=ADAPTER):  # though no module was replaced
        find_ffns(model)
    merged = model.merge_and_unload()
    assert len(find_ffns(merged)) == 2
    check_silenced(merged, "llama")


def check_silenced(model, family):
    """Masking everything leaves no more than the bias of the down projections."""
    given = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda m, args, out: given.append((out, m.down_proj.bias)))
    with sparse_neurons(model, Keep(find_ffns(model), keep_none)):
        given.clear()
        output(model, inputs(family))
    assert len(given) == 2 and all(torch.equal(out, bias.expand_as(out)) for out, bias in given)


def test_adapters_of_gate_and_up_are_followed():
    model, seen = peft_model(["gate_proj", "up_proj"]), {}
    with observe_neurons(model, lambda ffn, s, h, tokens: seen.update({ffn.layer: (s, h)})):
        output(model, inputs("llama"))
    merged, expected = deepcopy(model).merge_and_unload(), {}
    with observe_neurons(merged, lambda ffn, s, h, tokens: expected.update({ffn.layer: (s, h)})):
        output(merged, inputs("llama"))
    assert list(seen) == [0, 1]
    torch.testing.assert_close(seen, expected, rtol=1e-10, atol=1e-10)
    check_silenced(model.base_model.model, "llama")


def test_dora_of_the_gate_of_one_layer_is_refused():
    model = peft_model(["gate_proj"], use_dora=True, layers_to_transform=[1])
    with pytest.raises(InputError, match=r"An FFN was found in .*layers\.0 and none in .*layers\.1.*Merge adapters"):
        find_ffns(model)


def test_a_learned_factor_on_h_is_part_of_h():
    torch.manual_seed(0)
    config = IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False)
    model, seen = get_peft_model(build("llama"), config).eval(), []
    given = []
    for layer in model.base_model.model.model.layers:
        layer.mlp.down_proj.base_layer.register_forward_pre_hook(lambda m, args: given.append(args[0].flatten(0, -2)))
    find_ffns(model)
    given.clear()
    with observe_neurons(model, lambda ffn, s, h, tokens: seen.append(h)):
        output(model, inputs("llama"))
    torch.testing.assert_close(seen, given, rtol=0, atol=0)
    check_silenced(model.base_model.model, "llama")


class Branch(nn.Module):
    """A down projection, and something else that reads h."""

    def __init__(self, down, branch):
        super().__init__()
        self.down, self.branch = down, branch
        self.a, self.b = nn.Linear(24, 3, bias=False).double(), nn.Linear(3, 16, bias=False).double()

    def forward(self, h):
        return self.down(h) + self.branch(self, h)


BRANCHES = {
    "LoRA": lambda m, h: m.b(m.a(h)) * 2,
    "LoRA of a copy": lambda m, h: m.b(m.a(h.clone().view(h.shape))),
    "adapter": lambda m, h: m.b(m.a(h).relu()),
    "skip": lambda m, h: h[..., :16],
    "part": lambda m, h: m.b(h[..., 4:7]),
}


@pytest.mark.parametrize("act", ["llama", "gpt_neox"], ids=["gated", "plain"])
@pytest.mark.parametrize("branch", BRANCHES.values(), ids=BRANCHES)
def test_whatever_else_reads_h_is_refused(branch, act):
    model = build(act)
    place = model.model.layers[1].mlp if act == "llama" else model.gpt_neox.layers[1].mlp
    name = "down_proj" if act == "llama" else "dense_4h_to_h"
    setattr(place, name, Branch(getattr(place, name), branch))
    with pytest.raises(InputError, match=rf"neurons of .*layers\.1\.mlp.* are also read in .*{ADAPTER}"):
        find_ffns(model)
    assert left_behind(model) == []


def test_a_sum_over_h_reads_it_without_harm():
    model = build("llama")
    model.model.layers[1].mlp.down_proj = Branch(model.model.layers[1].mlp.down_proj, lambda m, h: 0 * h.abs().sum())
    assert len(find_ffns(model)) == 2


class Quantised(nn.Module):
    """A linear map whose weight is made of integers in each pass."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("scale", scale)
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.qweight.to(x.dtype) * self.scale).T


def quantised(linear):
    return Quantised(linear)


def pruned_by_a_mask(linear):
    return prune.l1_unstructured(linear, "weight", amount=0.5)


def weight_norm(linear):
    return parametrizations.weight_norm(linear)


@pytest.mark.parametrize("change", [quantised, pruned_by_a_mask, weight_norm])
@pytest.mark.parametrize("layers", [[1], [0, 1]], ids=str)
def test_a_down_projection_whose_weight_is_no_parameter_is_refused(change, layers):
    model = build("llama")
    for layer in layers:
        mlp = model.model.layers[layer].mlp
        mlp.down_proj = change(mlp.down_proj)
    with pytest.raises(InputError, match=r"The down projection in model\.layers\..* dequantise it, or make the change"):
        find_ffns(model)
    if change is pruned_by_a_mask:
        for layer in layers:
            prune.remove(model.model.layers[layer].mlp.down_proj, "weight")
        assert len(find_ffns(model)) == 2
    if change is weight_norm:
        for layer in layers:
            parametrize.remove_parametrizations(model.model.layers[layer].mlp.down_proj, "weight")
        assert len(find_ffns(model)) == 2


def transposed_storage(parameter):
    return nn.Parameter(parameter.detach().T.contiguous().T * 2)


def fewer_neurons(parameter):
    return nn.Parameter(parameter.detach()[:, :20].clone())


@pytest.mark.parametrize("replace", [transposed_storage, fewer_neurons])
def test_a_replaced_weight_is_that_of_a_fresh_model(replace):
    model, seen, expected = build("llama"), [], []
    find_ffns(model)
    mlp = model.model.layers[1].mlp
    mlp.down_proj.weight = replace(mlp.down_proj.weight)
    if replace is fewer_neurons:
        for part in (mlp.gate_proj, mlp.up_proj):
            part.weight, part.bias = nn.Parameter(part.weight[:20].detach()), nn.Parameter(part.bias[:20].detach())
    fresh = deepcopy(model)
    for one, kept in ((model, seen), (fresh, expected)):
        with observe_neurons(one, lambda ffn, s, h, tokens, kept=kept: kept.append((s, h, ffn.column_norms()))):
            output(one, inputs("llama"))
    assert torch.equal(find_ffns(model)[1].down_weight, mlp.down_proj.weight)
    torch.testing.assert_close(seen, expected, rtol=0, atol=0)


def test_weights_pruned_in_place_show_at_once():
    model = build("llama")
    ffn = find_ffns(model)[1]
    before = ffn.column_norms()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, 3] = 0
    assert find_ffns(model)[1] is ffn and before[3] > 0 and ffn.column_norms()[3] == 0
