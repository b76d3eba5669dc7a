"""Profiles: the shipped ones hold, and every mistake in one is named."""

import copy
import dataclasses
import json

import pytest
import yaml
from small import one_size, profile_content, write_profile

from sparsity_utils import paths
from sparsity_utils.console import InputError
from sparsity_utils.models.config import ModelConfig
from sparsity_utils.models.shapes import d_ff, head_count, non_embedding_parameters
from sparsity_utils.study.experiments import EXPERIMENTS
from sparsity_utils.study.plan import COVERING, QUESTIONS, TRAINED_DECODING, planned, ratio_shapes
from sparsity_utils.study.profiles import profile_names, read_profile
from sparsity_utils.study.runs import digest
from sparsity_utils.study.sections import parsed


@pytest.mark.parametrize("name", profile_names())
def test_every_shape_of_a_shipped_profile_can_be_built(name):
    profile = read_profile(name)
    assert profile.name == name and profile.about
    for question in QUESTIONS:
        for model, train in planned(profile, question):
            assert head_count(model) >= 1 and train.tokens > 0
    for line in (profile.study.sizes, profile.study.second_sizes):
        ratios = [width / depth for width, depth in (size.d_model_and_layers() for size in line)]
        spread = 1.21 if name == "paper" else 1.1  # the published ratios are 48 to 57.6
        assert not line or max(ratios) <= spread * min(ratios), "a line of sizes has one width-depth ratio"


@pytest.mark.parametrize("name", ["gpu", "long"])
def test_the_deep_profiles_train_and_span_what_they_say(name):
    profile = read_profile(name)
    study = profile.study
    counts = [parameters(profile.size_config(size, "relu")) for size in study.sizes]
    assert max(counts) > 10**1.8 * min(counts)
    for size in (*study.sizes, *study.second_sizes, *study.one_dimension):
        model = profile.size_config(size, "relu")
        assert 1 <= size.tokens / (190 * parameters(model)) < 1.002 and model.n_layers >= 2
        assert model.d_model // head_count(model) == 16
    ratios = [width / depth for width, depth in ratio_shapes(profile)]
    assert len(set(ratios)) >= 8 and max(ratios) > 114 and len(study.ratio_seeds) == 3
    assert set(study.other_activations) == {"gelu", "relu2"}


def parameters(model: ModelConfig) -> int:
    return non_embedding_parameters(model.d_model, model.n_layers, model.ffn_ratio)


def test_studies_share_no_seed():
    """Runs of the first recorded study had the seeds 0 to 2; nothing of it enters the tests of later ones."""
    profile = read_profile("long")
    seeds = {question: {train.seed for _, train in planned(profile, question)} for question in QUESTIONS}
    experiments = set.union(*(seeds.pop(question) for question in (*EXPERIMENTS, TRAINED_DECODING)))
    assert set.union(*seeds.values()) == {10, 11, 12, 13, 14} and experiments == {20, 21, 22}


@pytest.mark.parametrize(("name", "text"), [("long", 90_000_000), ("laptop", 18_000_000)])
def test_no_run_reads_the_default_text_twice(name, text):
    """text: fewer tokens than the training text of the profile has."""
    profile = read_profile(name)
    runs = [train for question in QUESTIONS for _, train in planned(profile, question)]
    assert max(train.tokens * (1 + train.decay_share) for train in runs) < text


def test_one_dimension_changes_at_a_time_and_parameters_follow():
    runs = planned(read_profile("long"), "one_dimension")
    shapes = {(model.n_layers, model.d_model, d_ff(model.d_model, model.ffn_ratio)) for model, _ in runs}
    centre = (4, 32, 80)
    assert centre in shapes and len(shapes) == 8 and len(runs) == 24
    moved = [[place for place in range(3) if shape[place] != centre[place]] for shape in shapes]
    assert sorted(moved) == [[], [0], [0], [1], [1], [2], [2], [2]]
    assert {model.activation for model, _ in runs} == {"relu"}
    wide = next(model for model, _ in runs if model.ffn_ratio == 10)
    assert parameters(wide) == 4 * (4 * 32**2 + 3 * 32 * 320)


def test_every_size_has_its_own_seeds():
    profile = read_profile("long")
    runs = [(model.d_model, train.seed) for model, train in planned(profile, "dead_neurons")]
    assert [seed for width, seed in runs if width == 64] == [10] and (48, 12) in runs and (48, 13) not in runs
    others = {(model.d_model, model.activation, train.seed) for model, train in planned(profile, "other_activations")}
    assert others == {(32, activation, seed) for activation in ("gelu", "relu2") for seed in (10, 11, 12)}
    tried = [(model.activation, train.learning_rate) for model, train in planned(profile, "tuning")]
    assert len(tried) == 12 and set(tried) == {(a, rate) for a in ("relu", "silu") for rate in (0.005, 0.01)}
    assert planned(read_profile("laptop"), "second_line") == [] == planned(profile, "sparse_ffn")


@pytest.mark.parametrize("name", profile_names())
def test_costs_cover_every_run(name):
    profile = read_profile(name)
    runs = {settings for question in QUESTIONS for settings in planned(profile, question)}
    assert runs == {settings for question in COVERING for settings in planned(profile, question)}


def test_the_laptop_profile_asks_what_its_notebooks_need():
    study = read_profile("laptop").study
    assert len(study.sizes) >= 3 and len(study.ratios) >= 5 and {"relu", "silu"} <= set(study.activations)
    assert min(len(study.ratio_seeds), *(len(size.seeds) for size in study.sizes)) >= 2
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
    (("corpus", "source"), "web", r"corpus\.source is 'web'; choose one of python-source, python-prose, path, hub"),
    (("corpus", "path"), None, r"corpus\.path is empty; source 'path' needs one"),
    (("measure", "p"), 0.0, r"measure\.p is 0\.0"),
    (("measure", "domain_calibration_tokens"), 0, r"measure\.domain_calibration_tokens is 0; it must be positive"),
    (("measure", "protocol"), "best", r"measure\.protocol is 'best'"),
    (("study", "tuning_rates"), [0.1], r"study\.tuning_rates needs study\.tuning_sizes and study\.tuning_batches"),
    (("study", "other_activations"), ["gelu"], r"study\.other_activations needs study\.other_sizes beside it"),
    (("study", "other_activations"), ["silu"], r"study\.other_activations repeats silu of study\.activations"),
    (("study", "second_sizes"), [one_size("8x1", seeds=())], r"8x1 has no seeds; it needs at least one"),
    (("study", "second_sizes"), [one_size("8x1", seeds=(1, 1))], r"8x1 names a seed twice: \[1, 1\]"),
    (
        ("study", "second_sizes"),
        [one_size("8x1") | {"seeds": 0}],
        r"sizes\[0\]\.seeds is 0; it should be a list",
    ),
    (
        ("study", "one_dimension"),
        [one_size("8x1", d_ff=20.5)],
        r"\[0\]\.d_ff is 20\.5; it should be of type int",
    ),
    (("study", "one_dimension"), [one_size("8x1", d_ff=0)], r"8x1 has d_ff 0; it must be positive"),
    (("study", "equal_heads"), True, r"Size 12x1 has no heads of 8, which do not divide 12; choose a width"),
    (("study", "activations"), ["relu", "swish"], r"study\.activations has 'swish'; choose from relu"),
    (("study", "sizes"), [], r"study\.sizes is empty"),
    (("study", "sizes"), [one_size("8by2")], r"'8by2' is not of the form 48x4"),
    (("study", "sizes"), [one_size("9x2")], r"model\.d_model is 9; it must be even"),
    (("study", "sizes"), [{"shape": "8x2", "seeds": [0]}], r"the key study\.sizes\[0\]\.tokens is missing"),
    (("study",), 7, r"study should hold 'key: value' lines"),
    (("study", "activations"), ["silu"], r"study\.activations lacks relu"),
    (("study", "sizes"), [one_size("8x2", seeds=(-1,))], r"a seed is -1"),
    (("study", "ratio_tokens"), 100, r"train\.tokens is 100, less than six batches"),
    (("train", "decay_share"), 0.0, r"train\.decay_share is 0\.0; choose above 0"),
    (("train", "beta2"), 2.0, r"train\.beta1 and beta2 must be"),
    (("model", "ffn_ratio"), -1.0, r"model\.ffn_ratio is -1\.0"),
    (
        ("model", "ffn_ratio"),
        2.3,
        r"model\.ffn_ratio 2\.3 gives 18\.4 neurons at d_model 8; d_ff must be",
    ),
    (("cluster",), {"minutes": 0}, r"cluster\.minutes is 0; at least 1 is needed"),
    (("cluster",), {"gpu": 1}, r"unknown key cluster\.gpu; known are partition"),
    (("cluster",), {"gpus": 1}, r"cluster\.gpus is 1, fewer than the 2 of train\.devices"),
    (("cluster",), [], r"cluster should hold 'key: value' lines"),
    (("cluster",), {"memory_gb": 0}, r"cluster\.memory_gb is 0\.0; at least 0\.1"),
    (("device",), {"teraflops": 1, "memory_gb": 1}, r"the key device\.name is missing"),
    (("device",), {"name": "x", "teraflops": 1, "memory_gb": 1, "utilisation": 0}, r"device\.utilisation is 0\.0"),
    (("train", "devices"), 0, r"train\.devices is 0; at least 1"),
    (("train", "devices"), 3, r"batch_tokens 256 is not divided by train\.devices 3 into equal parts of whole micro"),
    (("train", "devices"), 16, r"train\.devices 16 .* whole windows \(32\)"),
    (("train", "micro_tokens"), 96, r"whole micro-batches \(96 tokens\)"),
    (("study", "sizes"), [one_size("8x2", batch_tokens=10**6)], r"train\.tokens is 5000, less than six batches"),
    (("gradient_flow",), {"n_layers": 0}, r"gradient_flow: .*model\.n_layers is 0"),
    (("gradient_flow",), {"seeds": [-1]}, r"gradient_flow: .*a seed is -1"),
    (
        ("gradient_flow",),
        {"batch_tokens": 500},
        r"gradient_flow: .*batch_tokens is 500, not a multiple of the context of 32",
    ),
    (("trained_decoding",), {"new_tokens": 30}, r"prompt and new_tokens are 34 tokens; the arm dense .* context of 32"),
    (("input_speeds",), {"models": []}, r"input_speeds\.models is empty"),
    (
        ("input_speeds",),
        {"window": 100},
        r"input_speeds\.window is 100; give at least 2, and input_speeds\.calibration",
    ),
    (("name",), "../x", r"the key name is not for the file"),
    (("workers",), 0, r"workers is 0; at least 1"),
]


@pytest.mark.parametrize(("place", "value", "message"), CHANGES, ids=[f"{'.'.join(p)}={v}"[:40] for p, v, _ in CHANGES])
def test_a_mistake_is_named(tmp_path, place, value, message):
    content = copy.deepcopy(profile_content(tmp_path))
    content["study"]["data_limited"] = [one_size("12x1")] if place == ("study", "equal_heads") else []
    content["train"] |= {"devices": 2} if value == {"gpus": 1} else {}
    if place[0] in ("gradient_flow", "trained_decoding"):
        common = {"shape": "16x2", "activation": "relu2", "tokens": 20_000, "rates": [0.01]}
        content["experiments"] = {"q_sparse": {"common": common, "seeds": [0], "arms": {"dense": {}}}}
        content |= {
            "gradient_flow": {"d_model": 16, "head_size": 8},
            "trained_decoding": {"prompt": 4, "new_tokens": 4},
        }
        value = {**content[place[0]], **value}
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


NUMBERS = {
    "1e-2": 0.01, "1E-2": 0.01, "1.5e-3": 0.0015, "+2.5": 2.5, ".5": 0.5, "5.": 5.0, "-1": -1, "3": 3, "0.010": 0.01,
    "5e6": 5_000_000, "1E5": 100_000, "1.5e3": 1500, "2e+3": 2000, "1_000": 1000, "1_0.5": 10.5,
    "010": 10, "08": 8, "5.0": 5.0, "1e0": 1,
}  # fmt: skip


def test_a_key_that_stands_twice_is_named(tmp_path):
    file = tmp_path / "twice.yaml"
    file.write_text("about: x\ncorpus:\n  source: path\n  path: texts\ntrain: {}\ncorpus:\n  vocabulary: 512\n")
    with pytest.raises(InputError, match=r"twice\.yaml is not valid YAML \(the key corpus stands twice .* from line 1"):
        read_profile(str(file))
    file.write_text("corpus:\n  source: path\n  path: texts\n  path: others\n")
    with pytest.raises(InputError, match=r"the key path stands twice in the block from line 2 on"):
        read_profile(str(file))


def test_a_profile_in_another_encoding_is_named(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("about: müde\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.yaml is not text in UTF-8; save it as such"):
        read_profile(str(tmp_path / "latin.yaml"))


@pytest.mark.parametrize(("written", "wanted"), NUMBERS.items())
def test_numbers_in_yaml_are_what_they_look_like(tmp_path, written, wanted):
    file = tmp_path / "a.yaml"
    file.write_text(f"about: x\nworkers: {written}\n", encoding="utf-8")
    (found,) = [value for key, value in parsed(file.read_text()).items() if key == "workers"]
    assert found == wanted and type(found) is type(wanted)


def test_numbers_with_exponents_reach_every_section(tmp_path):
    content = profile_content(tmp_path)
    plain = read_profile(write_profile(tmp_path, content))
    written = (tmp_path / "tiny.yaml").read_text()
    for before, after in {
        "ratio_tokens: 5000": "ratio_tokens: 5e3",
        "batch_tokens: 256": "batch_tokens: 2.56e2\n  learning_rate: 1e-2",
        "calibration_tokens: 256": "calibration_tokens: 2_56",
        "validation_share: 0.2": "validation_share: 2E-1",
    }.items():
        assert before in written
        written = written.replace(before, after)
    (tmp_path / "tiny.yaml").write_text(written)
    found = read_profile(str(tmp_path / "tiny.yaml"))
    assert found == dataclasses.replace(plain, train=plain.train | {"learning_rate": 0.01})
    assert {name: type(value) for name, value in found.train.items()} == {
        name: float if name == "learning_rate" else int for name in found.train
    }
    assert digest(dataclasses.asdict(found.train_config(5000, 0))) == digest(
        dataclasses.asdict(plain.train_config(5000, 0))
    )


@pytest.mark.parametrize("written", ["1e-2", "1.5", "1:30", "0x10", "0b11", "12e", "1_", "_1", "--1", "'4'", "5.0"])
def test_what_is_no_whole_number_is_refused_in_a_sentence(tmp_path, written):
    file = write_profile(tmp_path, profile_content(tmp_path))
    (tmp_path / "tiny.yaml").write_text(
        (tmp_path / "tiny.yaml").read_text().replace("threads: 1", f"threads: {written}")
    )
    with pytest.raises(InputError, match=r"^Profile tiny\.yaml: threads is .*; it should be of type int\.$"):
        read_profile(file)


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profiles_read_as_yaml_1_1_reads_them(name):
    text = (paths.PROFILES / f"{name}.yaml").read_text()
    assert json.dumps(parsed(text)) == json.dumps(yaml.safe_load(text))


def test_a_relative_text_path_starts_at_the_profile(tmp_path):
    content = profile_content(tmp_path / "text")
    content["corpus"]["path"] = "text"
    assert read_profile(write_profile(tmp_path, content)).corpus.path == str(tmp_path / "text")
    content["corpus"] |= {"source": "hub", "revision": "1"}
    assert read_profile(write_profile(tmp_path, content)).corpus.path == "text"  # a data set's name
    (tmp_path / "text").mkdir()
    assert read_profile(write_profile(tmp_path, content)).corpus.path == str(tmp_path / "text")


def test_models_and_documents_beside_the_profile_are_found_there(tmp_path):
    content = profile_content(tmp_path / "text")
    content |= {"pretrained": {"english": "documents", "model": "mine"}, "correction": {"model": "owner/name"}}
    content |= {"input_speeds": {"models": ["mine", "silu", "smollm2"]}}
    with pytest.raises(InputError, match=r"pretrained\.english is 'documents', which is not in .*; name a file"):
        read_profile(write_profile(tmp_path, content))
    for name in ("documents", "mine", "silu"):
        (tmp_path / name).mkdir()
    profile = read_profile(write_profile(tmp_path, content))
    assert profile.pretrained.english == str(tmp_path / "documents")
    assert profile.pretrained.model == str(tmp_path / "mine") and profile.correction.model == "owner/name"
    assert profile.input_speeds.models == (str(tmp_path / "mine"), "silu", "smollm2")
