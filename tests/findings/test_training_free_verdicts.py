"""Verdicts on training-free rules, on tables whose answers are planted; the notebook, with a stand-in and without."""

import pandas as pd
import pytest
from notebook_runs import run_notebook
from planted import check_stated
from planted_training_free import tables
from small import profile_content, write_text
from tiny_llama import write_llama

from sparsity_utils.console import InputError
from sparsity_utils.findings import printed_numbers, training_free
from sparsity_utils.findings import training_free_figures as shown
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED
from sparsity_utils.study.tables import Tables, write_table


def analysed(tmp_path, **changes):
    """What follows from planted tables, stored and read as a study's."""
    study = Tables("planted", tmp_path)
    for name, table in tables(**changes).items():
        write_table(table, study.file(name))
    return training_free.analyse(study, study.table("training_free"))


def words(found):
    return {row.claim.key: row.verdict for row in training_free.verdicts(found)}


def test_every_claim_holds_where_it_was_planted(tmp_path):
    expected = dict.fromkeys((claim.key for claim in training_free.CLAIMS), SUPPORTED)
    assert words(analysed(tmp_path)) == expected | {"minimised": NOT_SUPPORTED}  # by the counter-example


@pytest.mark.parametrize(
    ("changes", "refuted"),
    [
        ({"excess": {("wina", "uniform"): 0.0595}, "rotated": 0.05}, {"norm_50", "norm_65"}),
        ({"excess": {("wina", "uniform"): 0.0555}, "rotated": 0.05}, {"norm_65"}),
        ({"rotated": 0.0499}, {"rotation"}),
        ({"errors": 0.97}, {"greedy_error"}),
        ({"excess": {("teal", "greedy"): 0.063}}, {"greedy"}),
        ({"excess": {("teal", "uniform"): 0.08}}, {"teal_50"}),
        ({"excess": {("cats", "uniform"): 0.0042}}, {"cats"}),
        ({"excess": {("n", "cett"): 0.0195}}, {"cett"}),
        ({"violations": 1}, {"lemma"}),
        ({"identity": 1e-7}, {"lemma"}),
    ],
)
def test_what_is_planted_against_a_claim_refutes_it_alone(tmp_path, changes, refuted):
    found = words(analysed(tmp_path, **changes))
    assert {key for key, word in found.items() if word == NOT_SUPPORTED} == refuted | {"minimised"}


def test_few_tokens_few_seeds_and_unequal_sparsities_decide_nothing(tmp_path):
    on_losses = {"norm_50", "norm_65", "rotation", "greedy", "teal_25", "teal_50", "cats", "cett"}
    few = words(analysed(tmp_path, tokens=900))
    assert {key for key, word in few.items() if word == INCONCLUSIVE} == on_losses
    seeds = words(analysed(tmp_path, seeds=4))
    assert {key for key, word in seeds.items() if word == INCONCLUSIVE} == {"greedy_error", "greedy", "cett"}
    shifted = analysed(tmp_path, shift=0.006)
    assert {key for key, word in words(shifted).items() if word == INCONCLUSIVE} == {"greedy", "cats"}
    details = training_free.verdicts(shifted).details().set_index("question")
    assert "skipped differs by 0.6 points, more than 0.5" in details.loc[training_free.GREEDY.claim, "reason"]


def test_without_the_pretrained_model_only_theory_is_decided(tmp_path):
    found = words(analysed(tmp_path, real=False))
    assert {key for key, word in found.items() if word != INCONCLUSIVE} == {"lemma", "bound", "minimised"}


def test_without_tables_every_claim_is_inconclusive(tmp_path):
    assert training_free.analyse(Tables("empty", tmp_path), None) is None
    assert set(words(None).values()) == {INCONCLUSIVE}
    assert list(training_free.figures(Tables("empty", tmp_path))) == []


def test_claims_are_stated_before_their_verdicts(tmp_path):
    check_stated(training_free, training_free.verdicts(analysed(tmp_path)))


def test_tables_and_figures_show_what_was_found(tmp_path):
    found = analysed(tmp_path)
    (title, rows), (decoders, means) = shown.models_of(found)
    assert (title, decoders) == ("planted", "32x4 silu, 5 seeds") and set(means["seeds"]) == {5}
    methods = shown.method_table(rows)
    assert list(methods) == ["25%", "40%", "50%", "65%"] and methods.loc["TEAL", "50%"] == "0.060 (0.059 to 0.061)"
    assert methods.loc["WINA, rotated", "50%"].startswith("0.045") and list(shown.method_table(means)) == [
        "25%",
        "50%",
        "62.5%",
    ]
    read = shown.read_table(rows)
    assert read.loc["CATS", "of the maps read %"] == 75 and len(read) == 9
    prices = shown.price_table(rows)
    assert prices.loc["TEAL", ("rise here %", "+5%")] == pytest.approx(5) and shown.price_table(means) is None
    down = shown.down_table(rows, 0.5)
    assert down.loc["‖n‖", "k per token"] == 6 and down.loc["gate |s|", "one relative error (CETT)"] == 18
    split = shown.shares_table(found).query("model == 'planted'").iloc[0]
    assert split["CETT against Top-k %"] == pytest.approx(-75, abs=0.1)
    assert split["by score %"] + split["by allocation %"] == pytest.approx(100) and split["by score %"] > 85
    theory = shown.theory_table(found).set_index(["model", "check"])
    assert theory.loc[("example", "stack"), "lower bound by |x|"] == 4
    assert theory.loc[("planted", "lemma k"), "identity"] == "1e-14"
    assert theory.loc[("planted", "lemma k"), "lower bound by |x|"] == ""  # it was not looked at
    assert shown.blocks_table(found).loc["planted", "error"] == pytest.approx(90, abs=0.3)
    drawn = dict(training_free.figures(Tables("planted", tmp_path)))
    assert {name: len(figure.axes) for name, figure in drawn.items()} == {"10_pareto": 2, "10_down": 2}
    assert all(len(figure._repr_png_()[0]) > 5_000 for figure in drawn.values())


def test_an_unusable_table_is_an_input_error(tmp_path):
    analysed(tmp_path)
    study = Tables("planted", tmp_path)
    twice = pd.concat([study.table("training_free")] * 2)
    with pytest.raises(InputError, match="training_free table has two rows for model planted"):
        training_free.analyse(study, twice)
    with pytest.raises(InputError, match="training_free table lacks the columns excess"):
        training_free.analyse(study, study.table("training_free").drop(columns="excess"))


def test_printed_numbers_follow_from_shapes():
    assert printed_numbers.LLAMA_2.block == 4 * 4096**2 + 3 * 4096 * 11008
    assert printed_numbers.SMOLLM2.block * 30 == 106_168_320
    assert printed_numbers.LLAMA_2.saved(0.65) == pytest.approx(0.637, abs=5e-4)
    assert printed_numbers.LLAMA_2.saved(0.65, 2) == pytest.approx(0.475, abs=5e-4)
    assert printed_numbers.SMOLLM2.saved(0.5) == pytest.approx(0.395, abs=5e-4)
    shares = [printed_numbers.larosa_read(getattr(printed_numbers, name)) for name in ("LLAMA_2", "LLAMA_3", "SMOLLM2")]
    assert shares == pytest.approx([0.92, 0.94, 0.94], abs=5e-3)
    computed = printed_numbers.computed().set_index("quantity")["computed"]
    assert computed["rotations, of a block of SmolLM2"] == "18.75%: 50% becomes 31%"
    assert len(printed_numbers.read_only()) == 5


def run(tmp_path, monkeypatch, **parameters):
    content = profile_content(write_text(tmp_path / "text")) | {
        "training_free": {
            "window": 32, "calibration_tokens": 64, "allocation_tokens": 32, "evaluation_tokens": 256,
            "decoder_tokens": 64, "sparsities": [0.5], "decoder_sparsities": [0.5], "prices": [1], "greedy_step": 0.25,
        }
    }  # fmt: skip
    return run_notebook("10_training_free", tmp_path, monkeypatch, content, **parameters)


def test_the_notebook_measures_a_stand_in_and_decoders(tmp_path, monkeypatch):
    model, english = write_llama(tmp_path / "tiny_llama", layers=2), write_text(tmp_path / "english")
    found = run(tmp_path, monkeypatch, model=str(model), english=str(english))
    assert "Measuring tiny_llama" in found.text and "Measuring 16x2 silu seed 0" in found.text
    assert len(found.verdicts) == len(training_free.CLAIMS)
    assert {"10_pareto", "10_down"} <= found.figures
    judged = found.verdicts.set_index("question")["verdict"]
    assert judged[training_free.MINIMISED.claim] == NOT_SUPPORTED and judged[training_free.CETT.claim] == INCONCLUSIVE


def test_the_notebook_without_the_model_says_how_to_get_it(tmp_path, monkeypatch):
    found = run(tmp_path, monkeypatch)
    assert "smollm2 is not here" in found.text and "python -m sparsity_utils fetch smollm2 gets it" in found.text
    decided = found.verdicts[found.verdicts["verdict"] != INCONCLUSIVE]
    assert set(decided["question"]) == {claim.claim for claim in training_free.CLAIMS[:3]}
