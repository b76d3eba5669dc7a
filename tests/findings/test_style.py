"""Words on axes and in captions, and tables that a study lacks."""

import pandas as pd
import pytest
from planted import study

from sparsity_utils.findings import labels
from sparsity_utils.study.study import Study


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (2944, "2.94k"),
        (188_416, "188k"),
        (1.04e6, "1.04M"),
        (1e7, "10M"),
        (2.44e9, "2.44B"),
        (2.4e9, "2.4B"),
        (512, "512"),
        (26.25, "26.2"),
        (999_900, "1M"),
        (999_400, "999k"),
    ],
)
def test_short_numbers(count, text):
    assert labels.short_number(count) == text


def test_names_of_shapes_sizes_and_seeds():
    checkpoints = study(((40, 2), (48, 3)), ("relu",), seeds=(0, 1)).assign(p=1.0)
    assert labels.shape_name(checkpoints) == "40x2" and labels.price_name(checkpoints) == "CETT-PPL-1%"
    assert labels.parameters_name(checkpoints) == "58.1k parameters"  # the mean of 36,800 and 79,488
    assert labels.seeds_name(checkpoints) == "2 seeds"
    assert labels.seeds_name(checkpoints.query("seed == 0 or d_model == 40")) == "1 to 2 seeds"
    assert labels.seeds_name(checkpoints.query("seed == 0")) == "1 seed"


def test_a_table_that_a_study_lacks_is_none_and_says_so(tmp_path, capsys):
    assert Study.recorded(tmp_path).table_or_none("relu_vs_silu") is None
    assert capsys.readouterr().out == "The recorded study has no table for relu_vs_silu.\n"
    pd.DataFrame({"run": ["a"]}).to_csv(tmp_path / "relu_vs_silu.csv", index=False)
    assert Study.recorded(tmp_path).table_or_none("relu_vs_silu")["run"].tolist() == ["a"]
