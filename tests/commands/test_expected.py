"""The plan of `make reproduce`: minutes from a pace and from records, memory and disk by arithmetic."""

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from small import profile_content, write_profile, write_text

from sparsity_utils import paths
from sparsity_utils.commands import expected
from sparsity_utils.commands.expected import Expected, expect, keep_minutes, measured_pace
from sparsity_utils.models.training import Schedule
from sparsity_utils.study.study import Study

PLAN = Expected("mine", 2, 12, 3, 2, 1.25, "48x4", 30.0, {"01_a": 0.25, "02_b": None}, 3e9, 5e8)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Nothing of it is trained."""
    folder = tmp_path_factory.mktemp("expected")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSITY_BUILD", str(folder / "build"))
        yield Study.from_profile(write_profile(folder, profile_content(write_text(folder / "text"))))


@pytest.fixture
def twice_as_long(monkeypatch: pytest.MonkeyPatch):
    """Every training step takes twice the time of the cost model."""
    monkeypatch.setattr(expected, "measured_pace", lambda job, profile: 2.0)


def test_the_pace_is_the_measured_time_of_a_step_over_that_of_the_cost_model(study, monkeypatch):
    job = study.jobs("relu_vs_silu")[0]
    asked = []

    def three_times(models, batch_tokens, rounds):
        asked.append((models, batch_tokens))
        return pd.DataFrame({"training_us": [3e6 * job.config.token_cost()]})

    monkeypatch.setattr(expected, "step_times", three_times)
    assert measured_pace(job, study.profile) == pytest.approx(3.0)
    assert asked == [([job.config.model], job.config.train.batch_tokens)]


def test_a_real_step_gives_a_pace(study):
    assert 0.05 < measured_pace(study.jobs("relu_vs_silu")[0], study.profile) < 100


@pytest.mark.usefixtures("twice_as_long")
def test_minutes_memory_and_disk_follow_from_the_jobs(study):
    jobs = study.jobs("relu_vs_silu", "width_depth_ratio")
    found = expect(study, [], jobs)
    seconds = [job.config.cost() + job.measuring() for job in jobs]
    assert (found.runs, found.left, found.untrained) == (len(jobs),) * 3
    assert found.run_minutes == pytest.approx(2 * max(sum(seconds) / 2, *seconds) / 60)
    weights = [4 * sum(map(math.prod, shapes(job.config.model))) for job in jobs]  # bytes
    kept = sum(size * len(Schedule(job.config.train).checkpoints()) for size, job in zip(weights, jobs, strict=True))
    assert found.disk == kept + 3 * sum(sorted(weights)[-2:])
    assert found.memory > 3 * 1e8  # two workers and this process, with torch in each


def shapes(model):
    """Every weight of a decoder, with tied embedding."""
    d, neurons = model.d_model, round(model.ffn_ratio * model.d_model)
    layer = [(d, d)] * 4 + [(d, neurons)] * 3 + [(d,)] * 2
    return layer * model.n_layers + [(model.vocabulary, d), (d,)]


@pytest.mark.usefixtures("twice_as_long")
def test_minutes_of_a_notebook_are_those_it_took_here_or_the_shipped_ones_times_the_pace(study, monkeypatch, tmp_path):
    shipped = pd.DataFrame({"profile": ["tiny", "tiny", "other"], "notebook": ["01_a", "02_b", "03_c"], "minutes": 1.5})
    shipped.to_csv(tmp_path / "minutes.csv", index=False)
    monkeypatch.setattr(expected, "RECORD", tmp_path / "minutes.csv")
    names = [Path(f"{name}.ipynb") for name in ("01_a", "02_b", "03_c")]
    keep_minutes(study, "02_b", 9.0)
    keep_minutes(study, "02_b", 0.5)
    found = expect(study, names, study.jobs("relu_vs_silu"))
    assert found.notebook_minutes == {"01_a": 3.0, "02_b": 0.5, "03_c": None}
    monkeypatch.setattr(expected, "LIKE", "other")
    shipped.assign(profile=["a", "b", "other"]).to_csv(tmp_path / "minutes.csv", index=False)
    assert expect(study, names, []).notebook_minutes == {"01_a": None, "02_b": 0.5, "03_c": 1.5}


def test_without_runs_nothing_is_timed(study, monkeypatch):
    monkeypatch.setattr(expected, "measured_pace", lambda job, profile: pytest.fail("timed"))
    found = expect(study, [], [])
    assert (found.runs, found.run_minutes, found.disk, found.pace) == (0, 0, 0, 1)
    assert "none of 0 is left" in found.told() and "measured now" not in found.told()


def test_a_finished_study_takes_no_minutes_for_runs(monkeypatch):
    assert "none of 12 is left" in replace(PLAN, left=0).told()


def test_the_plan_names_everything_that_is_asked_before_a_start():
    told = PLAN.told()
    for words in (
        "3 of 12 to do, 2 of them to train: about 30 min with 2 workers",
        "about 30 min in all, 0.2 min of them for notebooks; without 02_b, whose time is not known yet",
        "a training step of 48x4 takes 1.25 times what the cost model says",
        "about 3.0 GB; this machine has",
        f"about 500 MB more in {paths.build()}",
        "Ctrl-C at any time: finished runs and notebooks are kept",
    ):
        assert words in told, words


def test_the_shipped_record_names_notebooks_and_profiles_that_exist():
    record = pd.read_csv(expected.RECORD)
    assert set(record["notebook"]) <= {notebook.stem for notebook in paths.collection()}
    assert set(record["profile"]) <= {file.stem for file in paths.PROFILES.glob("*.yaml")}
    assert not record.duplicated(["profile", "notebook"]).any() and (record["minutes"] > 0).all()
