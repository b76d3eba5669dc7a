"""The transfer matrix against direct measurements, and the batches of domains that a study makes."""

import numpy as np
import pandas as pd
import pytest
from metric_cases import model_for, padded_batches, with_own_labels

from sparsity_utils.console import InputError
from sparsity_utils.sparsity.metrics import apply_thresholds, measure_sparsity
from sparsity_utils.sparsity.patterns import transfer_matrix
from sparsity_utils.text.windows import MOST_DOMAINS, domain_batches


@pytest.fixture(scope="module")
def matrix():
    model = model_for("silu")
    pairs = {
        name: tuple(with_own_labels(model, padded_batches(seed + side, rows=(6, 5))) for side in (0, 10))
        for name, seed in (("code", 0), ("prose", 1), ("maths", 2))
    }
    return model, pairs, transfer_matrix(model, pairs, p=5.0)


def test_every_ordered_pair_is_measured_as_alone(matrix):
    model, pairs, table = matrix
    assert list(zip(table["calibrated_on"], table["applied_to"], strict=True)) == [(a, b) for a in pairs for b in pairs]
    for row in table.itertuples():
        solved = measure_sparsity(model, pairs[row.calibrated_on][1], "cett-ppl", 5.0, pairs[row.calibrated_on][0])
        report = apply_thresholds(model, pairs[row.applied_to][1], solved.thresholds)
        assert (row.activation_ratio, row.ppl_ratio, row.cett) == pytest.approx(
            (report.activation_ratio, report.ppl_ratio, report.cett), rel=1e-9
        )
        if row.calibrated_on == row.applied_to:
            assert (row.activation_ratio, row.ppl_ratio) == (solved.activation_ratio, solved.ppl_ratio)
    assert table["activation_ratio"].nunique() > len(pairs)


def test_a_domain_calibrated_on_its_own_evaluation_text_meets_the_target():
    model = model_for("relu")
    text = with_own_labels(model, padded_batches(3, rows=(8, 8)))
    table = transfer_matrix(model, {"a": (text, text)}, p=20.0)
    assert len(table) == 1 and table["ppl_ratio"][0] == pytest.approx(1.2, rel=0.01)


def test_no_domain_is_an_input_error(matrix):
    with pytest.raises(InputError, match="No domain was given"):
        transfer_matrix(matrix[0], {})


def documents_of(lengths):
    """A token array that counts up, and a table of its documents: (domain, name, tokens)."""
    stops = np.cumsum([length for _, _, length in lengths])
    table = pd.DataFrame(lengths, columns=["domain", "name", "tokens"])
    table = table.assign(start=stops - table["tokens"], stop=stops).drop(columns="tokens")
    return np.arange(stops[-1], dtype=np.uint16), table


def test_a_domain_has_whole_files_on_one_side_and_equal_amounts():
    lengths = [("b", "x.py#0", 300), ("a", "y.py", 250), ("b", "x.py#1", 300), ("a", "z.py", 350), ("b", "w.py", 400)]
    lengths += [("a", f"small{i}.py", 90) for i in range(4)] + [("few", "one.py", 400)]
    tokens, documents = documents_of(lengths)
    found = domain_batches(tokens, documents, 16, 128, 320)
    assert list(found) == ["b", "a"]  # largest first; a single file cannot be on both sides
    for domain, sides in found.items():
        files = []
        for side, wanted in zip(sides, (128, 320), strict=True):
            seen = np.concatenate([batch["input_ids"].numpy().ravel() for batch in side])
            assert len(seen) == len(set(seen)) == wanted
            rows = documents.iloc[np.searchsorted(documents["stop"], seen, side="right")]
            assert set(rows["domain"]) == {domain}
            files.append(set(rows["name"].str.split("#").str[0]))
        assert files[0] and files[1] and not files[0] & files[1]


def test_only_the_largest_domains_take_part():
    lengths = [(f"d{i}", f"{i}-{part}", 60 + i) for i in range(MOST_DOMAINS + 2) for part in range(3)]
    tokens, documents = documents_of(lengths)
    found = domain_batches(tokens, documents, 16, 32, 64)
    assert list(found) == [f"d{i}" for i in range(MOST_DOMAINS + 1, 1, -1)]


def test_too_little_text_is_an_input_error():
    tokens, documents = documents_of([("a", "x", 100), ("a", "y", 100)])
    with pytest.raises(InputError, match="No domain of the validation text has 512 tokens for calibration"):
        domain_batches(tokens, documents, 16, 512, 64)
