"""The bench of the search on a model small enough for a test: its table says what was measured."""

import numpy as np
import pytest
from metric_cases import model_for
from small import profile_content, write_profile, write_text

from sparsity_utils.commands import bench
from sparsity_utils.study.study import Study


class Text:
    def tokens(self, split):
        assert split == "validation"
        return np.random.default_rng(0).integers(0, 23, 60_000).astype(np.uint16)


class FakeStudy:
    corpus = Text()


def test_the_search_is_set_beside_the_literal_algorithm(monkeypatch):
    model = model_for("relu")
    monkeypatch.setattr(bench, "_models", lambda study: [("tiny", model)])
    monkeypatch.setattr(bench, "TOKENS", 1024)
    monkeypatch.setattr(bench, "SUBSAMPLE", 512)
    monkeypatch.setattr(bench, "ROUNDS", 1)
    table = bench.search(FakeStudy()).set_index("way")
    assert list(table.index) == ["all tokens", "subsample", "literal"]
    assert table.loc["literal", ["times_literal", "points_from_literal"]].tolist() == [1.0, 0.0]
    assert (table["seconds"] > 0).all() and table["activation_ratio"].between(0, 100).all()
    apart = table["activation_ratio"] - table.loc["literal", "activation_ratio"]
    assert table["points_from_literal"].tolist() == pytest.approx(apart.tolist(), abs=0.011)


@pytest.mark.slow
def test_packing_sums_the_runs_and_compares_with_one_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSITY_BUILD", str(tmp_path / "build"))
    monkeypatch.setattr(bench, "ROUNDS", 1)
    content = profile_content(write_text(tmp_path / "text"))
    table = bench.packing(Study.from_profile(write_profile(tmp_path, content)))
    assert list(zip(table["shape"], table["runs"], strict=True)) == [("8x1", 1), ("8x1", 2), ("16x2", 1), ("16x2", 2)]
    assert (table["tokens_per_second"] > 0).all()
    assert table.loc[table["runs"] == 1, "gain"].tolist() == [1.0, 1.0]
