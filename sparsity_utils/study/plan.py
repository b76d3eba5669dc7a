"""Which table answers which question, and which runs it needs."""

from itertools import product
from typing import NamedTuple

from sparsity_utils.models.config import ModelConfig, TrainConfig
from sparsity_utils.models.shapes import solve_shape
from sparsity_utils.study.experiments import EXPERIMENTS, ArmRun
from sparsity_utils.study.profiles import Profile, Size

SCHEMA = 2  # of the tables; raise it when a column changes its meaning or a file its name
# Of the runs of an experiment; arm and learning_rate are added to what a run says of itself.
ARM = ("run", "arm", "learning_rate", "d_model", "n_layers", "d_ff", "parameters", "seed", "tokens", "validation_loss")
IDENTITY = ("run", "activation", "d_model", "n_layers", "seed")
# Speeds are of this machine, not of a run; the question whose runs or shapes they are measured with.
SPEEDS = {"sparse_ffn": "relu_vs_silu", "sparse_decoding": "relu_vs_silu", "depth_cost": "width_depth_ratio"}
# Tables of one measurement, of a model that is not trained here; each names its file.
PRETRAINED = ("pretrained", "pretrained_prices", "pretrained_positions")
# Training-free rules on a pretrained model, and on runs of the profile that are there for other questions.
TRAINING_FREE_TABLES = ("training_free", "training_free_documents", "training_free_blocks", "training_free_theory")
# Sparse drafts that are corrected: of a pretrained model, and of the profile's own largest ReLU model.
CORRECTION = ("correction", "correction_prefixes", "correction_speeds", "correction_text")
OF_MODELS = (*PRETRAINED, *TRAINING_FREE_TABLES, *CORRECTION)
COMPRESSED = ("pretrained_positions", "training_free_documents")  # thousands of rows, as the tables of patterns
INPUT_SPEEDS = "input_speeds"  # of this machine and of models that need no run
# Beside the experiment q_sparse: of its shapes before training, and of some of its runs, on this machine.
GRADIENT_FLOW, TRAINED_DECODING = "gradient_flow", "trained_decoding"
DECODED = ("dense", "keep_8", "keep_3", "relu", "relu_l1_strong")  # the arms whose models are timed, where there are
DIGITS = "digits"  # of small networks on images, which are no runs of the store
UNTRAINED = (DIGITS, GRADIENT_FLOW)  # need no run


class Question(NamedTuple):
    """A question is answered by a table. It holds what was measured on each of the runs that the question needs."""

    file: str
    measurement: str | None  # a key of jobs.MEASUREMENTS; None: validation losses alone, or no measurement of a run
    about: tuple[str, ...] | None = None  # columns of `Run.checkpoints` beside each measured row; None: all of them


# Several questions read the same runs; large tables say no more of a checkpoint than they need.
QUESTIONS = {
    "metrics": Question("metrics.csv", "metrics"),
    "relu_vs_silu": Question("relu_vs_silu.csv", "curve"),
    "other_activations": Question("other_activations.csv", "curve"),
    "width_depth_ratio": Question("width_depth_ratio.csv", "curve"),
    "scale_insensitivity": Question("relu_vs_silu.csv", "curve"),
    "second_line": Question("second_line.csv", "curve"),
    "one_dimension": Question("one_dimension.csv", "curve"),
    "data_limited": Question("data_limited.csv", "curve"),
    "activation_patterns": Question("patterns_neurons.csv.gz", "neurons", IDENTITY),
    "token_patterns": Question("patterns_vocabulary.csv.gz", "vocabulary", IDENTITY),
    "dead_neurons": Question("dead_neurons.csv", "dead", (*IDENTITY, "step", "tokens", "fit")),
    "transfer": Question("transfer.csv", "transfer", IDENTITY),
    "tuning": Question("tuning.csv", None),
    "sparse_ffn": Question("sparse_ffn.csv", None),
    "sparse_decoding": Question("sparse_decoding.csv", None),
    "depth_cost": Question("depth_cost.csv", None),
    **{name: Question(f"{name}.csv", "ends", ARM) for name in EXPERIMENTS},
    **{
        name: Question(f"{name}.csv.gz" if name in COMPRESSED else f"{name}.csv", None)
        for name in (*OF_MODELS, INPUT_SPEEDS, *UNTRAINED, TRAINED_DECODING)
    },
}
COVERING = (  # questions that together need every run of a profile
    *("relu_vs_silu", "second_line", "width_depth_ratio", "one_dimension", "other_activations", "data_limited"),
    "tuning",
    *EXPERIMENTS,
)
PRIMARY = ("relu_vs_silu", "second_line", "width_depth_ratio")  # what primary claims rest on
# What `python -m sparsity_utils refit` makes of the published curves: recorded once, read by every study.
PUBLISHED_TABLES = ("published_refit", "published_forms", "published_forecasts", "published_stability")

Settings = tuple[ModelConfig, TrainConfig]


def planned(profile: Profile, question: str) -> list[Settings]:
    """The settings of the runs that a question needs; none where the profile leaves the question out."""
    study = profile.study
    if question in (*SPEEDS, *PRETRAINED, *CORRECTION, INPUT_SPEEDS, *UNTRAINED):
        return []
    if question == TRAINED_DECODING:
        return [(run.model, run.train) for run in decoded_runs(profile)]
    if question in EXPERIMENTS:
        return [(run.model, run.train) for run in profile.arm_runs(question)]
    if question in TRAINING_FREE_TABLES:
        return _decoders(profile)
    if question == "width_depth_ratio":
        return _unique(
            (profile.model_config(*shape, "relu"), profile.train_config(study.ratio_tokens, seed))
            for shape, seed in product(ratio_shapes(profile), study.ratio_seeds)
        )
    if question == "tuning":
        return _tuning(profile)
    if question == "one_dimension":
        return _line(profile, study.one_dimension, ("relu",))
    if question == "other_activations":
        return _line(profile, study.other_sizes, study.other_activations)
    lines = {"second_line": study.second_sizes, "data_limited": study.data_limited}
    activations = ("relu",) if question == "dead_neurons" else study.activations
    return _line(profile, lines.get(question, study.sizes), activations)


def decoded_runs(profile: Profile) -> list[ArmRun]:
    """The runs of q_sparse whose models are timed: of some arms the first seed, with each learning rate.

    Which rate counts is known once all seeds are measured (`laws.arms`); whoever reads the table picks its rows.
    """
    runs = [run for run in profile.arm_runs("q_sparse") if run.arm in DECODED]
    return [run for run in runs if run.train.seed == profile.experiments["q_sparse"].seeds[0]]


def ratio_shapes(profile: Profile) -> list[tuple[int, int]]:
    """The shapes (d_model, n_layers) of one size at the profile's width-depth ratios."""
    study, ffn_ratio = profile.study, profile.model.get("ffn_ratio", ModelConfig.ffn_ratio)
    shapes = [solve_shape(study.ratio_parameters, ratio, ffn_ratio) for ratio in study.ratios]
    return [(shape.d_model, shape.n_layers) for shape in shapes]


def _decoders(profile: Profile) -> list[Settings]:
    """The SiLU runs of one size of the main line: of the sizes with most seeds, the largest."""
    sizes = profile.study.sizes
    most = max(len(size.seeds) for size in sizes)
    size = [size for size in sizes if len(size.seeds) == most][-1]
    return _line(profile, (size,), ("silu",)) if "silu" in profile.study.activations else []


def _line(profile: Profile, sizes: tuple[Size, ...], activations: tuple[str, ...]) -> list[Settings]:
    return _unique(
        (profile.size_config(size, activation), profile.size_training(size, seed))
        for size, activation in product(sizes, activations)
        for seed in size.seeds
    )


def _tuning(profile: Profile) -> list[Settings]:
    study = profile.study
    tried = product(study.tuning_sizes, study.tuning_rates, study.tuning_batches, study.activations)
    return _unique(
        (
            profile.size_config(size, activation),
            profile.size_training(size, seed, learning_rate=rate, batch_tokens=batch),
        )
        for size, rate, batch, activation in tried
        for seed in size.seeds
    )


def _unique(settings) -> list[Settings]:
    return list(dict.fromkeys(settings))  # two ratios may lead to one shape
