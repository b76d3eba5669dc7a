"""The claims on the speed of sparse decoding, stated before any result."""

from sparsity_utils.findings.judgement import Claim

NEAR_IDEAL = 0.9  # of the speed-up that the unread bytes allow
BEYOND_WALL = 3.5  # times dense; reading all gates in full caps an exact method below 3
SPEED_SHAPE = "A single FFN of the 2.4B shape, float32, one token, random patterns"
NEARLY_IDEAL = Claim(
    "sparse_decoding",
    "Skipping neurons saves nearly all the time that their weights take",
    "2.00x and 1.51x in two steps of an FFN (7B, 89% sparse)",
    "of the ideal",
    f"{SPEED_SHAPE}: speed-up over the fastest way that reads all weights, by that of the bytes left; the lowest "
    "from 50% to 97% sparsity decides",
    f"90% interval of the median at or above {NEAR_IDEAL:g}",
    scale=1.0,
)
NEVER_SLOWER = Claim(
    "sparse_decoding",
    "With nothing to skip the sparse kernel is no slower than dense",
    "none",
    "x dense",
    f"{SPEED_SHAPE} and no inactive neuron: speed-up over torch",
    "90% interval of the median at or above 1",
    scale=1.0,
)
GATE_WALL = Claim(
    "sparse_decoding",
    "An exact method passes the wall of 3x that reading the gate in full puts up",
    "none",
    "x dense",
    f"{SPEED_SHAPE}, certified gate at 93.5% sparsity: speed-up over the fastest way that reads all weights",
    f"90% interval of the median above {BEYOND_WALL:g}",
    scale=1.0,
)
PUBLISHED_SPEED = Claim(
    "sparse_decoding",
    "Sparse FFNs alone can explain the published decoding speed",
    "4.1x (2.4B)",
    "x at most",
    "arithmetic: all weights but those of the FFNs are read still; FFNs that cost nothing, no output head",
    "at or above 4.1",
    scale=1.0,
)
SHAPE_GAINS = Claim(
    "sparse_decoding",
    "A decoder of the published 0.1B shape gains from sparse FFNs at 90% sparsity",
    "gains",
    "x dense",
    "random weights, FAT thresholds, one sequence, the masked model's own tokens: speed-up of whole decoding steps "
    "over the faster of torch and the kernels with nothing skipped",
    "90% interval of the median above 1",
    scale=1.0,
)
TRAINED_GAIN = Claim(
    "sparse_decoding",
    "The trained models of this study gain from sparse FFNs",
    "gains",
    "x dense",
    "one sequence, CETT-PPL-1%, the masked model's own tokens: speed-up of whole decoding steps over the faster of "
    "torch and the kernels with nothing skipped, each activation function; the lowest decides",
    "90% interval of the median above 1 for each",
    scale=1.0,
)
SPEED_CLAIMS = (NEARLY_IDEAL, NEVER_SLOWER, GATE_WALL, PUBLISHED_SPEED, SHAPE_GAINS, TRAINED_GAIN)
