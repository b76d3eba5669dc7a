"""Profiles: the shipped ones hold, and every mistake in one is named."""

import copy

import pytest
from small import profile_content, write_profile

from sparsity_utils import paths
from sparsity_utils.errors import InputError
from sparsity_utils.model import head_count, non_embedding_parameters
from sparsity_utils.plan import QUESTIONS, planned, ratio_shapes
from sparsity_utils.profiles import profile_names, read_profile


@pytest.mark.parametrize("name", profile_names())
def test_every_shape_of_a_shipped_profile_can_be_built(name):
    profile = read_profile(name)
    assert profile.name == name and profile.about
    for question in QUESTIONS:
        for model, train in planned(profile, question):
            assert head_count(model) >= 1 and train.tokens > 0
    for line in (profile.study.sizes, profile.study.second_sizes):
        ratios = [width / depth for width, depth in (size.d_model_and_layers() for size in line)]
        assert not line or max(ratios) <= 1.1 * min(ratios), "a line of sizes has one width-depth ratio"


@pytest.mark.parametrize("name", ["gpu", "long"])
def test_the_deep_profiles_train_and_span_what_they_say(name):
    study = read_profile(name).study
    counts = [non_embedding_parameters(*size.d_model_and_layers()) for size in study.sizes]
    assert max(counts) > 10**1.5 * min(counts)
    for size in (*study.sizes, *study.second_sizes):
        assert size.tokens >= 189 * non_embedding_parameters(*size.d_model_and_layers())
    ratios = [width / depth for width, depth in ratio_shapes(read_profile(name))]
    assert len(set(ratios)) >= 8 and max(ratios) > 114
    assert set(study.other_activations) == {"gelu", "relu2"}


def test_a_size_may_have_fewer_seeds_and_the_probe_has_more_activations():
    profile = read_profile("long")
    runs = [(model.d_model, train.seed) for model, train in planned(profile, "dead_neurons")]
    assert runs.count((64, 0)) == 1 and (64, 1) not in runs and (48, 1) in runs and (32, 2) in runs
    others = {(model.d_model, model.activation) for model, _ in planned(profile, "other_activations")}
    assert others == {(32, "gelu"), (32, "relu2")}
    tried = {(model.d_model, train.learning_rate) for model, train in planned(profile, "tuning")}
    assert tried == {(32, 0.005), (32, 0.01), (32, 0.02)}
    assert planned(read_profile("laptop"), "second_line") == [] == planned(profile, "sparse_ffn")


def test_the_laptop_profile_asks_what_its_notebooks_need():
    study = read_profile("laptop").study
    assert len(study.sizes) >= 3 and len(study.ratios) >= 5 and {"relu", "silu"} <= set(study.activations)
    assert min(len(study.seeds), len(study.ratio_seeds)) >= 2
    for size in study.sizes:
        assert size.tokens >= 100 * non_embedding_parameters(*size.d_model_and_layers())


def test_shared_settings_and_changes_reach_the_run():
    profile = read_profile("laptop")
    config = profile.train_config(10**6, 3, learning_rate=0.5)
    assert (config.tokens, config.seed, config.learning_rate) == (10**6, 3, 0.5)
    assert config.batch_tokens == profile.train["batch_tokens"]
    assert profile.model_config(24, 2, "silu").vocabulary == profile.corpus.vocabulary


CHANGES = [  # place, value, message
    (("corpus", "vocabluary"), 3, r"unknown key corpus\.vocabluary; known are source"),
    (("colour",), 1, r"unknown key colour; known are name"),
    (("model", "heads"), 4, r"unknown key model\.heads"),
    (("model", "activation"), "relu", r"unknown key model\.activation"),
    (("train", "learning_rate"), "fast", r"train\.learning_rate is 'fast'; it should be of type float"),
    (("train", "learning_rate"), -1.0, r"train\.learning_rate is -1\.0; it must be positive"),
    (("train", "checkpoints"), 3, r"train\.checkpoints is 3; at least 6"),
    (("train", "batch_tokens"), 10**9, r"train\.tokens is 5000, less than six batches"),
    (("corpus", "vocabulary"), 12, r"corpus\.vocabulary is 12; choose 257 to 65536"),
    (("corpus", "vocabulary"), True, r"corpus\.vocabulary is True; it should be of type int"),
    (("corpus", "source"), "web", r"corpus\.source is 'web'; choose one of python-source, path, hub"),
    (("corpus", "path"), None, r"corpus\.path is empty; source 'path' needs one"),
    (("measure", "p"), 0.0, r"measure\.p is 0\.0"),
    (("measure", "protocol"), "best", r"measure\.protocol is 'best'"),
    (("study", "probe"), 2, r"study\.probe is 2; choose 0 to 1, a place in study\.sizes"),
    (("study", "other_activations"), ["silu"], r"study\.other_activations repeats silu of study\.activations"),
    (("study", "second_sizes"), [{"shape": "8x1", "tokens": 5000, "seeds": 0}], r"8x1 has 0 seeds; it needs 1 or more"),
    (("study", "activations"), ["relu", "swish"], r"study\.activations has 'swish'; choose from relu"),
    (("study", "seeds"), 0, r"study\.seeds is 0; it should be a list"),
    (("study", "sizes"), [], r"study\.sizes is empty"),
    (("study", "sizes"), [{"shape": "8by2", "tokens": 5000}], r"'8by2' is not of the form 48x4"),
    (("study", "sizes"), [{"shape": "9x2", "tokens": 5000}], r"model\.d_model is 9; it must be even"),
    (("study", "sizes"), [{"shape": "8x2"}], r"the key study\.sizes\[0\]\.tokens is missing"),
    (("study",), 7, r"study should hold 'key: value' lines"),
    (("study", "activations"), ["silu"], r"study\.activations lacks relu"),
    (("study", "seeds"), [-1], r"a seed is -1"),
    (("study", "ratio_tokens"), 100, r"train\.tokens is 100, less than six batches"),
    (("train", "decay_share"), 0.0, r"train\.decay_share is 0\.0; choose above 0"),
    (("train", "beta2"), 2.0, r"train\.beta1 and beta2 must be"),
    (("model", "ffn_ratio"), -1.0, r"model\.ffn_ratio is -1\.0"),
    (("name",), "../x", r"the key name is not for the file"),
    (("workers",), 0, r"workers is 0; at least 1"),
]


@pytest.mark.parametrize(("place", "value", "message"), CHANGES, ids=[f"{'.'.join(p)}={v}"[:40] for p, v, _ in CHANGES])
def test_a_mistake_is_named(tmp_path, place, value, message):
    content = copy.deepcopy(profile_content(tmp_path))
    section = content
    for key in place[:-1]:
        section = section[key]
    section[place[-1]] = value
    with pytest.raises(InputError, match=rf"^Profile tiny\.yaml: .*{message}"):
        read_profile(write_profile(tmp_path, content))


def test_an_unknown_profile_lists_the_known_ones():
    with pytest.raises(InputError, match=r"no profile 'labtop'; choose one of .*laptop.*smoke"):
        read_profile("labtop")
    assert {"laptop", "smoke"} <= set(profile_names()) == {file.stem for file in paths.PROFILES.glob("*.yaml")}


def test_broken_yaml_is_named(tmp_path):
    (tmp_path / "bad.yaml").write_text("about: [", encoding="utf-8")
    with pytest.raises(InputError, match=r"bad\.yaml is not valid YAML"):
        read_profile(str(tmp_path / "bad.yaml"))


def test_a_relative_text_path_starts_at_the_profile(tmp_path):
    content = profile_content(tmp_path / "text")
    content["corpus"]["path"] = "text"
    assert read_profile(write_profile(tmp_path, content)).corpus.path == str(tmp_path / "text")
    content["corpus"] |= {"source": "hub", "revision": "1"}
    assert read_profile(write_profile(tmp_path, content)).corpus.path == "text"  # a data set's name
    (tmp_path / "text").mkdir()
    assert read_profile(write_profile(tmp_path, content)).corpus.path == str(tmp_path / "text")
