"""Sparse drafts of opened models measured in pieces: against single texts, continued, and refused."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from checkpoint_files import tiny_gguf
from small import profile_content, write_profile, write_text

from sparsity_utils.console import InputError
from sparsity_utils.decoding.accounting import effective_density
from sparsity_utils.decoding.correction import Correction, corrected
from sparsity_utils.decoding.drafters import FromPrompt, Masked, fsparse, top_inputs
from sparsity_utils.decoding.speed import greedy
from sparsity_utils.models.pretrained import open_checkpoint
from sparsity_utils.paths import RESULTS
from sparsity_utils.study.makers import correction, correction_prompts, pretrained
from sparsity_utils.study.opened_models import CorrectionConfig
from sparsity_utils.study.plan import CORRECTION
from sparsity_utils.study.study import Study

TEXTS = ("english", "python", "arithmetic")
SETTINGS = CorrectionConfig(documents=3, prompt=20, new_tokens=12, thresholds=(0.004, 0.1), rounds=1, timed_tokens=12)


@pytest.fixture(scope="module", autouse=True)
def little_text():
    """Some hundred kilobytes of the pinned packages' text are enough; the usual two megabytes take ten seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "MEGABYTES", 0.3)
        pretrained.pinned.cache_clear()
        yield
        pretrained.pinned.cache_clear()


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A stand-in for SmolLM2: the model and its tokenizer, from a GGUF file."""
    file = tmp_path_factory.mktemp("correction") / "tiny.gguf"
    tiny_gguf(file)
    model, tokenizer = open_checkpoint(file, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight *= 12  # or no word is likelier than another, and FFNs decide nothing
        for layer in model.model.layers:
            layer.mlp.down_proj.weight *= 200
    return model, tokenizer


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return tmp_path_factory.mktemp("pieces")


@pytest.fixture(scope="module")
def tables(opened, pieces):
    return measured(opened, pieces)


def measured(opened, pieces, settings=SETTINGS, texts=TEXTS):
    """All tables, as a study puts them together."""
    subject = correction.Subject("tiny", *opened, texts)
    tables = correction.corrected_drafts(subject, settings, pieces)
    return tables | correction.drafting_speeds(subject, settings, pieces)


def rows_of(tables, text, rule, way, threshold=None):
    rows = tables["correction"].query("text == @text and rule == @rule and way == @way")
    return rows if threshold is None else rows[rows["threshold"] == threshold]


def test_a_row_is_what_its_document_gives_alone(opened, tables):
    model, tokenizer = opened
    prompts, _, _ = correction_prompts.prompts_of(tokenizer, "english", SETTINGS)
    drafters = {"fsparse": Masked(model, fsparse(model, 0.5)), "csparse": FromPrompt(model, 0.5)}
    drafters["teal"] = Masked(model, top_inputs(model, 0.5))
    full, _ = greedy(model, prompts, 12)
    for rule, drafter in drafters.items():
        rows = rows_of(tables, "english", rule, "corrected", 0.1).set_index("document")
        assert list(rows.index) == [0, 1, 2]
        for number, prompt in enumerate(prompts):
            found, row = corrected(model, prompt[None], drafter, Correction(), 12), rows.loc[number]
            assert row["rounds"] == len(found.rounds) and row["advance"] == found.rounds["advance"].sum()
            assert row["rejected"] == found.rounds["rejected"].sum() and row["tokens"] == 12
            assert row["agreed"] == (found.tokens[0] == full[number]).sum()
            assert row["log_likelihood"] == pytest.approx(likelihood(model, prompt, found.tokens[0]), rel=1e-5)


def likelihood(model, prompt, tokens):
    """Word by word."""
    total, text = 0.0, prompt.tolist()
    for token in tokens.tolist():
        with torch.no_grad():
            total += float(model(input_ids=torch.tensor([text])).logits[0, -1].log_softmax(-1)[token])
        text.append(token)
    return total


def test_tables_have_the_columns_that_are_described(tables):
    described = pd.read_csv(RESULTS / "columns.csv").groupby("table")["column"].apply(list)
    assert {name: list(table) for name, table in tables.items()} == {name: described[name] for name in CORRECTION}


def test_every_way_is_measured_on_every_document(tables):
    table = tables["correction"]
    plan = correction.ways(("fsparse", "csparse", "teal"), SETTINGS)
    assert len(plan) == 1 + 3 * (1 + 2 + 1) + 3 + 1 and len({way.name for way in plan}) == len(plan)
    assert len(table) == len(plan) * 3 * 3 and set(table["model"]) == {"tiny"}
    full = rows_of(tables, "python", "full", "full")
    assert (full["agreed"] == 12).all() and (full["density"] == 1).all() and full["rounds"].isna().all()
    lossless = table[table["way"] == "lossless"]
    assert (lossless["agreed"] == 12).all() and (lossless["place"] == -1).all() and lossless["threshold"].isna().all()
    assert table.loc[table["way"] != "lossless", "place"].isna().all()
    assert table.loc[table["text"] == "arithmetic", "right"].notna().all()
    assert table.loc[table["text"] != "arithmetic", "right"].isna().all()


def test_densities_are_those_of_the_weights(opened, tables):
    model, _ = opened
    config = model.config
    in_ffns = config.num_hidden_layers * 3 * config.hidden_size * config.intermediate_size
    everything = sum(weight.numel() for weight in model.parameters())  # the embedding is the head
    found = tables["correction"].groupby("rule")["density"].first()
    assert found["csparse"] == pytest.approx(1 - in_ffns / everything / 2)
    assert found["fsparse"] == pytest.approx(1 - in_ffns / everything * 2 / 3 / 2)
    queries = config.num_attention_heads * config.head_dim * config.hidden_size
    keys = config.num_key_value_heads * config.head_dim * config.hidden_size
    in_attention = config.num_hidden_layers * 2 * (queries + keys)
    assert found["teal"] == pytest.approx(1 - (in_ffns + in_attention) / everything / 2)


def test_prefixes_word_by_word(opened, tables):
    model, tokenizer = opened
    prompts, fresh, _ = correction_prompts.prompts_of(tokenizer, "python", SETTINGS)
    full, _ = greedy(model, prompts, 12)
    drafter = FromPrompt(model, 0.5)
    table = tables["correction_prefixes"].query("text == 'python'")
    for number, prompt in enumerate(prompts):
        row = table.query("rule == 'csparse' and document == @number").iloc[0]
        with torch.no_grad(), drafter.reading(prompt[None]):
            model(input_ids=prompt[None])
        for name, text in (("fresh", fresh[number]), ("repeated", prompt)):
            dense = step_by_step(model, prompt, text)
            sparse = step_by_step(model, prompt, text, drafter)
            targets = text[1:, None]
            assert row[f"{name}_full"] == pytest.approx(-float(dense.gather(1, targets).sum()), rel=1e-4)
            assert row[f"{name}_sparse"] == pytest.approx(-float(sparse.gather(1, targets).sum()), rel=1e-4)
        wrong = (step_by_step(model, prompt, full[number], drafter).argmax(-1) != full[number, 1:]).sum()
        assert row["disagreed"] == wrong and row["tokens"] == 11 and row["predicted"] == 19


def step_by_step(model, prompt, text, drafter=None):
    """Log-probabilities after each but the last word of `text`; the prompt is read by the full model."""
    with torch.no_grad():
        cache, found = model(input_ids=prompt[None], use_cache=True).past_key_values, []
        for token in text[:-1]:
            if drafter is None:
                out = model(input_ids=token[None, None], past_key_values=cache, use_cache=True)
            else:
                with drafter.drafting(torch.tensor([0])):
                    out = model(input_ids=token[None, None], past_key_values=cache, use_cache=True)
            found.append(out.logits[0, -1].log_softmax(-1))
    return torch.stack(found)


def test_speeds_are_of_the_same_text(opened, tables):
    table = tables["correction_speeds"].set_index(["rule", "way"])
    assert list(table.index) == [
        ("full", "full"), ("csparse", "alone"), ("csparse", "corrected"), ("csparse", "lossless"),
        ("teal", "alone"), ("teal", "corrected"), ("teal", "lossless"),
    ]  # fmt: skip
    assert table["same_tokens"].all() and (table["tokens_per_second"] > 0).all()
    whole = sum(weight.numel() for weight in opened[0].parameters()) * 4 / 1e6
    assert table.loc[("full", "full"), "megabytes"] == pytest.approx(whole)
    row = table.loc[("csparse", "corrected")]
    assert row["megabytes"] == pytest.approx(whole * effective_density(row["density"], 16, row["advance"]))


def test_no_speed_where_texts_differ(opened, pieces, monkeypatch):
    from sparsity_utils.study.makers import correction_speed

    monkeypatch.setattr(correction_speed, "Shrunk", lambda model, share: Masked(model, fsparse(model, 0.02)))
    prompt = correction_prompts.prompts_of(opened[1], "python", SETTINGS)[0][:1]
    table = correction_speed.speeds(opened[0], prompt, {}, {"csparse": 0.7, "full": 1.0}, SETTINGS).set_index("way")
    assert not table.loc["alone", "same_tokens"] and math.isnan(table.loc["alone", "tokens_per_second"])
    assert table.loc["lossless", "same_tokens"]  # whatever drafts it


def test_the_shown_text_is_that_of_the_first_document(tables):
    table = tables["correction_text"]
    assert len(table) == 3 * 3 * 12 and set(table["kind"]) <= {"first", "accepted", "interleaved", "corrected"}
    for _, rows in table.groupby(["text", "rule"]):
        assert rows["place"].tolist() == list(range(12)) and rows["kind"].iloc[0] == "first"


def test_a_stopped_measurement_goes_on_where_it_was(opened, pieces, tables, tmp_path):
    (folder,) = pieces.iterdir()
    (folder / "0-fsparse-alone").rename(tmp_path / "gone")
    passes = []
    handle = opened[0].register_forward_pre_hook(lambda *_: passes.append(1))
    again = measured(opened, pieces)
    handle.remove()
    assert len(passes) < 2 * 12 + 12  # the full text, the sparse one, and looks at the FFNs
    for name in ("correction", "correction_prefixes", "correction_speeds", "correction_text"):
        pd.testing.assert_frame_equal(again[name], tables[name])


def test_sums_have_their_answers(opened):
    _, tokenizer = opened
    prompts, _, answers = correction_prompts.prompts_of(tokenizer, "arithmetic", SETTINGS)
    for prompt, answer in zip(prompts, answers, strict=True):
        left, right = tokenizer.decode(prompt).splitlines()[-1].removesuffix(" =").split(" + ")
        assert int(left) + int(right) == int(answer)
    assert correction._answer(" 12\n3 + 4") == "12" and correction._answer(" x 12") == ""


def test_repeated_sequences_of_eight_words():
    assert correction.repeated(list(range(20))) == 0
    assert correction.repeated([1] * 10) == 2  # three sequences of eight, all the same
    assert correction.repeated([*range(9), *range(9)]) == 2
    assert correction.repeated([1, 2]) == 0


def test_too_little_text_is_an_input_error(opened, pieces):
    with pytest.raises(InputError, match="english text has 0 documents of 200000 tokens, and 3 are asked for"):
        correction_prompts.prompts_of(opened[1], "english", replace(SETTINGS, prompt=100_000))
    with pytest.raises(InputError, match="24 sums have fewer than 1000 tokens"):
        correction_prompts.prompts_of(opened[1], "arithmetic", replace(SETTINGS, prompt=1000))
    with pytest.raises(InputError, match="longer than the model's context"):
        settings = replace(SETTINGS, new_tokens=600)
        measured(opened, pieces, settings, ("python",))


def test_a_study_without_the_model_measures_its_own_and_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPARSITY_BUILD", str(tmp_path / "build"))
    text = write_text(tmp_path / "text")
    content = profile_content(text) | {
        "correction": {
            "documents": 2,
            "prompt": 8,
            "new_tokens": 6,
            "thresholds": [0.1],
            "rounds": 1,
            "timed_tokens": 6,
        }
    }
    study = Study.open("run", write_profile(tmp_path, content), "correction", model="")
    assert study.answers("correction") and study.jobs(*CORRECTION) == []
    table = study.table_or_none("correction")
    assert "python -m sparsity_utils fetch smollm2 gets it" in capsys.readouterr().out
    assert set(table["model"]) == {"relu"} and set(table["rule"]) == {"full", "fsparse", "csparse", "teal", "cett"}
    assert set(study.table("correction_speeds")["rule"]) == {"full", "csparse", "teal", "cett"}
    assert "fetch" not in capsys.readouterr().out
    assert not (study.output / "correction_speeds").exists()  # pieces of one sitting are not those of another
    study.file("correction_speeds").unlink()
    monkeypatch.setattr(correction, "speeds", lambda *of: pd.DataFrame({"rule": ["again"]}))
    assert set(study.table("correction_speeds")["rule"]) == {"again"}
