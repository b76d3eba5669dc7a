"""The profiles for large devices: the published study as it was published, and what it costs, by hand."""

import pytest

from sparsity_utils import paths
from sparsity_utils.__main__ import main
from sparsity_utils.console import InputError
from sparsity_utils.laws.published import PUBLISHED_LAWS, TOKENS_PER_PARAMETER
from sparsity_utils.models.config import TrainConfig
from sparsity_utils.models.decoder import granite_config
from sparsity_utils.models.memory import device_memory
from sparsity_utils.models.shapes import head_count, non_embedding_parameters
from sparsity_utils.models.training import Schedule
from sparsity_utils.study.cost import device_costs
from sparsity_utils.study.makers.speeds import SMALLEST_PUBLISHED
from sparsity_utils.study.plan import QUESTIONS, planned
from sparsity_utils.study.profiles import read_profile
from sparsity_utils.study.study import Study

PUBLISHED_BATCHES = (3.27e5, 5.90e5, 7.86e5, 1.18e6, 1.57e6, 2.10e6)  # tokens, arXiv 2411.02335


def test_paper_is_the_published_study():
    profile = read_profile("paper")
    shapes = [size.d_model_and_layers() for size in profile.study.sizes]
    assert shapes == [(law.d_model, law.n_layers) for law in PUBLISHED_LAWS if law.activation == "relu"]
    assert [size.batch_tokens for size in profile.study.sizes] == pytest.approx(PUBLISHED_BATCHES, rel=0.003)
    for size in profile.study.sizes:
        model = profile.size_config(size, "relu")
        parameters = non_embedding_parameters(model.d_model, model.n_layers, model.ffn_ratio)
        assert size.tokens == TOKENS_PER_PARAMETER * parameters and model.d_model // head_count(model) == 64
    smallest = profile.size_config(profile.study.sizes[0], "relu")
    for name in ("d_model", "n_layers", "vocabulary", "base_width", "head_size", "ffn_ratio"):
        assert getattr(smallest, name) == getattr(SMALLEST_PUBLISHED, name)


@pytest.mark.parametrize("name", ["paper", "cluster"])
def test_every_configuration_can_be_built_cut_and_held(name):
    profile = read_profile(name)
    for question in QUESTIONS:
        for model, train in planned(profile, question):
            granite_config(model)
            train.check_windows(model.context)
            assert len(Schedule(train).checkpoints()) > 10
            assert sum(device_memory(model, train).values()) < 0.8e9 * profile.device.memory_gb
    if name == "cluster":
        for size in (*profile.study.sizes, *profile.study.second_sizes):
            model = profile.size_config(size, "relu")
            parameters = non_embedding_parameters(model.d_model, model.n_layers, model.ffn_ratio)
            assert parameters <= 30e6 and 1 <= size.tokens / (190 * parameters) < 1.002


def test_costs_are_those_of_the_usual_estimate():
    table = device_costs(read_profile("paper"))
    assert table["runs"].sum() == 12 and (table["devices"] == 8).all()
    largest = table.iloc[-1]
    tokens = 1.1 * 190 * 2_441_871_360
    operations = 6 * (2_441_871_360 + 65_536 * 2304 + 40 * 2304 * 4096) * tokens  # of one run
    assert largest["billion_tokens"] == pytest.approx(tokens / 1e9)
    assert largest["exaflops"] == pytest.approx(2 * operations / 1e18, rel=0.01)  # validating and measuring on top
    assert largest["device_hours"] == pytest.approx(largest["exaflops"] * 1e18 / (0.4 * 989e12) / 3600)
    weights = 4 * (2_441_871_360 + 65_536 * 2304 + 81 * 2304) / 1e9
    kept = len(Schedule(TrainConfig(463_955_558_400, 2_097_152, checkpoints=24)).checkpoints())
    assert largest["disk_gb"] == pytest.approx((2 * kept + 3) * weights)


@pytest.mark.parametrize("name", ["paper", "cluster"])
def test_a_price_is_told_before_anything_starts(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPARSITY_BUILD", str(tmp_path / "build"))
    monkeypatch.setattr("sparsity_utils.study.study.build_corpus", lambda config: pytest.fail("read text"))
    assert main(["study", "--profile", name, "--cost"]) == 0
    told = capsys.readouterr().out
    for words in ("device hours", "memory_gb", "GB of disk", "assumed utilisation", "H100 SXM", "were not measured"):
        assert words in told
    assert not (tmp_path / "build").exists() and "do not fit" not in told
    hours = device_costs(read_profile(name))["device_hours"].sum()
    assert f"{hours:,.0f} H100 hours" in (paths.ROOT / "docs" / "train.md").read_text(encoding="utf-8")


def test_text_that_no_machine_can_hold_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr("sparsity_utils.study.study.build_corpus", lambda config: pytest.fail("read text"))
    with pytest.raises(InputError, match=r"Profile paper asks for 2,000,000 MB of text, .*lower corpus\.max_megabytes"):
        _ = Study.from_profile("paper").corpus
