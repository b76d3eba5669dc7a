"""Corrected decoding against a version written out without a cache, and what must hold at the ends of every setting."""

from dataclasses import replace

import pytest
import torch
from families import build, left_behind
from literal_correction import literal, logits_of, top_k

from sparsity_utils.console import InputError
from sparsity_utils.decoding.correction import (
    ACCEPTED,
    CORRECTED,
    FIRST,
    INTERLEAVED,
    KINDS,
    REJECTED,
    Correction,
    corrected,
    drafted,
    first_differences,
)
from sparsity_utils.decoding.drafters import FromPrompt, Masked, OnKernels, Shrunk, fsparse, top_inputs
from sparsity_utils.decoding.kept_text import KeptText
from sparsity_utils.decoding.speed import greedy
from sparsity_utils.neurons.find import find_ffns
from sparsity_utils.neurons.hooks import sparse_neurons
from sparsity_utils.neurons.thresholds import Thresholds

NEW, SHARE = 21, 0.3  # with a prompt of 7 tokens and 4 drafts beyond them: a context of 32
RULE = Correction(period=5, threshold=0.15)


def peaked(family="llama", dtype=torch.float64):
    """A random model whose next words are likely enough to be accepted or not."""
    model = build(family, dtype=dtype).eval()
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head *= 2.5 / (head @ torch.randn(head.shape[1], 99, dtype=dtype, generator=torch.manual_seed(0))).std()
    return model


@pytest.fixture(scope="module")
def llama():
    return peaked()


@pytest.fixture(scope="module")
def prompts():
    return torch.randint(0, 41, (4, 7), generator=torch.Generator().manual_seed(1))


def sparse(model):
    return Masked(model, fsparse(model, SHARE))


def kept(model):
    return int(fsparse(model, SHARE).values[0])


SETTINGS = {
    "plain": RULE,
    "lossless": replace(RULE, threshold=None),
    "no rewrite": replace(RULE, rewrite=False),
    "no rollback": replace(RULE, rollback=False),
    "no interleaving": replace(RULE, interleave=False),
    "nothing of it": replace(RULE, rewrite=False, rollback=False, interleave=False),
    "period 2": replace(RULE, period=2),
    "period 1": replace(RULE, period=1),
}


@pytest.mark.parametrize("correction", SETTINGS.values(), ids=SETTINGS)
def test_it_is_what_the_literal_version_gives(llama, prompts, correction):
    found = corrected(llama, prompts, sparse(llama), correction, NEW)
    for number, prompt in enumerate(prompts.tolist()):
        tokens, kinds, advances = literal(llama, prompt, top_k(kept(llama)), correction, NEW)
        assert found.tokens[number].tolist() == tokens
        assert [KINDS[kind] for kind in found.kinds[number].tolist()] == kinds
        assert found.rounds.query("sequence == @number")["advance"].tolist() == advances
    assert not left_behind(llama)


def test_the_settings_above_reject_and_accept(llama, prompts):
    found = corrected(llama, prompts, sparse(llama), RULE, NEW)
    accepted = found.rounds["accepted"]
    assert 0 in set(accepted) and RULE.period - 1 in set(accepted) and accepted.nunique() >= 3
    assert found.average_advance == (found.rounds["advance"]).sum() / len(found.rounds)
    assert (found.rounds["advance"] == accepted + 1).all()
    assert (found.rounds["rejected"] == (accepted < RULE.period - 1)).all()


@pytest.mark.parametrize(
    "correction",
    [
        replace(RULE, threshold=1.0),
        replace(RULE, period=1),
        replace(RULE, threshold=None, width=3),
        SETTINGS["lossless"],
    ],
    ids=["threshold 1", "period 1", "lossless tree", "lossless"],
)
def test_the_full_model_s_greedy_text(llama, prompts, correction):
    expected, _ = greedy(llama, prompts, NEW)
    alone, _ = drafted(llama, prompts, sparse(llama), NEW)
    assert torch.equal(corrected(llama, prompts, sparse(llama), correction, NEW).tokens, expected)
    assert not torch.equal(alone, expected)


def test_without_correction_the_sparse_model_s_text(llama, prompts):
    alone, _ = drafted(llama, prompts, sparse(llama), NEW)
    assert torch.equal(corrected(llama, prompts, sparse(llama), SETTINGS["nothing of it"], NEW).tokens, alone)
    for number, prompt in enumerate(prompts.tolist()):
        tokens, flags = list(prompt), [False] * len(prompt)
        for _ in range(NEW):
            tokens.append(int(logits_of(llama, tokens, flags, top_k(kept(llama)))[-1].argmax()))
            flags.append(True)
        assert alone[number].tolist() == tokens[len(prompt) :]


def test_every_accepted_token_was_accepted_by_the_rule(llama, prompts):
    found = corrected(llama, prompts, sparse(llama), RULE, NEW)
    with torch.no_grad():
        logits = llama(input_ids=torch.cat([prompts, found.tokens], dim=1)).logits[:, prompts.shape[1] - 1 : -1]
    probabilities = (logits / RULE.temperature).softmax(-1).gather(-1, found.tokens[..., None])[..., 0]
    assert (probabilities[found.kinds == ACCEPTED] >= RULE.threshold).all()
    own = torch.isin(found.kinds, torch.tensor([FIRST, INTERLEAVED, CORRECTED]))
    assert torch.equal(logits.argmax(-1)[own], found.tokens[own]) and not (found.kinds == REJECTED).any()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "falcon", "gpt_neox", "phi3", "qwen3", "granite"])
def test_sequences_side_by_side_are_what_each_is_alone(family, prompts):
    model = peaked(family)
    for width in (1, 3):
        correction = replace(RULE, width=width)
        together = corrected(model, prompts, sparse(model), correction, NEW)
        for number, prompt in enumerate(prompts):
            alone = corrected(model, prompt[None], sparse(model), correction, NEW)
            assert torch.equal(together.tokens[number], alone.tokens[0])
            assert torch.equal(together.kinds[number], alone.kinds[0])
    if family == "llama":
        assert together.rounds.groupby("sequence")["advance"].apply(tuple).nunique() > 1  # of unequal lengths


def test_the_cache_after_corrections_is_that_of_a_full_run(llama, prompts, monkeypatch):
    caches = []
    drop = KeptText.drop

    def watched(text, counts):
        drop(text, counts)
        caches.append(
            (text.padding.clone(), [(layer.keys.clone(), layer.values.clone()) for layer in text.cache.layers])
        )

    monkeypatch.setattr(KeptText, "drop", watched)
    found = corrected(llama, prompts[:2], sparse(llama), RULE, NEW)
    with torch.no_grad():
        full = llama(input_ids=torch.cat([prompts[:2], found.tokens], 1), use_cache=True).past_key_values
    compared = 0
    for padding, layers in caches[1::2]:  # each round drops the drafts first, then what was not kept
        if len(padding) < 2:
            break
        for (keys, values), layer in zip(layers, full.layers, strict=True):
            for row in range(2):
                for own, right in ((keys, layer.keys), (values, layer.values)):
                    own = own[row, :, padding[row] :]
                    size = min(own.shape[1], right.shape[2] - 1)
                    torch.testing.assert_close(
                        own[:, :size], right[row, :, :size], rtol=1e-5, atol=1e-6
                    )  # norms are float32
                    compared += 1
    assert compared > 20


def test_a_tree_keeps_the_longest_accepted_path(llama, prompts):
    narrow, wide = (corrected(llama, prompts, sparse(llama), replace(RULE, width=width), NEW) for width in (1, 4))
    assert wide.average_advance > narrow.average_advance
    first = {width: _first_round(llama, prompts, width) for width in (1, 4)}
    assert first[4] == [max(_accepted(llama, prompt, path) for path in _paths(llama, prompt, 4)) for prompt in prompts]


def _first_round(model, prompts, width):
    rounds = corrected(model, prompts, sparse(model), replace(RULE, width=width), NEW).rounds
    return rounds.groupby("sequence")["accepted"].first().tolist()


def _paths(model, prompt, width):
    """Beams by extending every path by every word."""
    first = int(logits_of(model, prompt.tolist(), [False] * len(prompt), top_k(1))[-1].argmax())
    paths = [(0.0, [first])]
    for _ in range(RULE.period - 1):
        longer = []
        for score, path in paths:
            flags = [False] * len(prompt) + [True] * len(path)
            logits = logits_of(model, prompt.tolist() + path, flags, top_k(kept(model)))[-1]
            longer += [(score + float(p), [*path, word]) for word, p in enumerate(logits.log_softmax(-1))]
        paths = sorted(longer, reverse=True)[:width]
    return [path for _, path in paths]


def _accepted(model, prompt, path):
    logits = logits_of(model, prompt.tolist() + path, [False] * (len(prompt) + len(path)), top_k(1))
    rows = logits[len(prompt) :][: len(path) - 1]
    right = [bool(RULE.accepts(row[None], torch.tensor([word]))) for row, word in zip(rows, path[1:], strict=True)]
    return [*right, False].index(False)


@pytest.mark.parametrize("rule", ["relu", "fat", "cett", "teal", "teal-top-k"])
def test_kernels_draft_what_masks_draft_and_are_out_of_the_way_of_the_full_model(prompts, rule):
    model = peaked(dtype=torch.float32)
    values = {"teal": (0.3,) * 14, "teal-top-k": top_inputs(model, 0.4).values}.get(rule, (0.2,) * 2)
    thresholds = Thresholds(rule, values)
    on_kernels = OnKernels(model, thresholds)
    dense, _ = greedy(model, prompts, NEW)
    for correction in (RULE, replace(RULE, width=2), replace(RULE, threshold=None)):
        expected = corrected(model, prompts, Masked(model, thresholds), correction, NEW)
        found = corrected(model, prompts, on_kernels, correction, NEW)
        assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.kinds, expected.kinds)
    assert torch.equal(found.tokens, dense) and not left_behind(model)
    alone, _ = drafted(model, prompts, on_kernels, NEW)
    assert torch.equal(alone, dense) == (rule == "relu")  # SiLU has no zeros to leave out


def test_neurons_of_the_prompt(llama, prompts):
    drafter, h = FromPrompt(llama, SHARE), {}
    ffns = find_ffns(llama)
    for number, layer in enumerate(llama.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, number=number: h.setdefault(number, args[0]))
    with drafter.reading(prompts), torch.no_grad():
        llama(input_ids=prompts)
    for layer in llama.model.layers:
        layer.mlp.down_proj._forward_pre_hooks.clear()
    for ffn in ffns:
        for row, vectors in enumerate(h[ffn.layer]):
            score = torch.stack([vector / vector.norm() for vector in vectors]).norm(dim=0)
            chosen = set(score.argsort(descending=True)[: int(SHARE * ffn.d_ff)].tolist())
            assert set(drafter.chosen[ffn.layer][row].nonzero()[:, 0].tolist()) == chosen

    for number, prompt in enumerate(prompts.tolist()):
        active = lambda layer, s, h, number=number: drafter.chosen[layer][number].expand_as(s)  # noqa: E731
        tokens, _, _ = literal(llama, prompt, active, RULE, NEW)
        found = corrected(llama, prompts, drafter, RULE, NEW)
        assert found.tokens[number].tolist() == tokens


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_weights_of_the_chosen_neurons_alone_draft_the_same(family, prompts):
    model = peaked(family)
    for prompt in prompts:
        expected, found = (
            corrected(model, prompt[None], kind(model, SHARE), RULE, NEW) for kind in (FromPrompt, Shrunk)
        )
        assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.kinds, expected.kinds)
    assert not left_behind(model)
    with pytest.raises(InputError, match="4 prompts have neurons of their own"):
        corrected(model, prompts, Shrunk(model, SHARE), RULE, NEW)


def test_texts_that_differ_by_rounding_alone_are_told_from_others(llama, prompts):
    expected, _ = greedy(llama, prompts, NEW)
    alone, _ = drafted(llama, prompts, sparse(llama), NEW)
    same = first_differences(llama, prompts, expected, expected)
    assert (same["place"] == -1).all()
    found = first_differences(llama, prompts, alone, expected)
    for row in found.itertuples():
        differs = [a != b for a, b in zip(alone[row.sequence].tolist(), expected[row.sequence].tolist(), strict=True)]
        assert row.place == (differs.index(True) if True in differs else -1)
        assert row.place < 0 or (row.gap > 1e-3 and 0 < row.rounding < 1e-5)


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"period": 0}, "period is 0"),
        ({"threshold": 1.2}, "threshold is 1.2"),
        ({"threshold": -0.1}, "threshold is -0.1"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"width": 0}, "width 0"),
        ({"period": 1, "interleave": False}, "never a next token"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting, match):
    with pytest.raises(InputError, match=match):
        Correction(**setting)


def test_models_and_prompts_that_cannot_be_corrected_are_refused(llama, prompts):
    context = llama.config.max_position_embeddings
    with pytest.raises(InputError, match=f"4 drafted beyond them are longer than the model's context of {context}"):
        corrected(llama, prompts, sparse(llama), RULE, NEW + 1)
    assert corrected(llama, prompts[:1], sparse(llama), RULE, NEW).tokens.shape == (1, NEW)
    for empty in (prompts[:0], prompts[:, :0], prompts[0]):
        with pytest.raises(InputError, match="give token ids"):
            corrected(llama, empty, sparse(llama), RULE, NEW)
    with pytest.raises(InputError, match="wider than the vocabulary"):
        corrected(llama, prompts, sparse(llama), replace(RULE, width=99), NEW)
    for family in ("gemma3", "lfm2"):
        model = build(family, dtype=torch.float32)
        with pytest.raises(InputError, match="without sliding windows and recurrent layers"):
            corrected(model, prompts, sparse(model), RULE, NEW)
    t5 = build("t5", dtype=torch.float32)
    with pytest.raises(InputError, match="give a decoder"):
        corrected(t5, prompts, None, RULE, NEW)
    for share in (0.0, 1.5):
        with pytest.raises(InputError, match="share of neurons"):
            FromPrompt(llama, share)


def test_a_failure_leaves_the_model_as_it_was(llama, prompts, monkeypatch):
    monkeypatch.setattr(KeptText, "drop", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        corrected(llama, prompts, sparse(llama), RULE, NEW)
    assert not left_behind(llama)
    with sparse_neurons(llama, fsparse(llama, SHARE)):
        pass
