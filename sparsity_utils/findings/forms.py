"""Is the published form of the data law the best description of a curve? The claim that notebooks 02 and 07 test."""

import pandas as pd

from sparsity_utils.findings.claims import Claim, Verdict
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, mean_over_runs
from sparsity_utils.models.config import ACTIVATIONS


def form_claim(activation: str, form: str, question: str) -> Claim:
    """Does the published form describe an activation's curves better than its rivals: ours, or the published ones?"""
    ours = question == "relu_vs_silu"
    name, unit = (ACTIVATIONS[activation], "runs") if ours else (f"its {ACTIVATIONS[activation]} curves", "curves")
    return Claim(
        f"{activation}_form",
        question,
        f"The published {form} law describes {name} best",
        "fits best",
        "AICc below the closest form",
        f"t interval over {unit} of the AICc difference to each of constant, log, exponential, plain power and sigmoid",
        "90% interval above 0 for every form; not supported if a form has smaller residuals, parameters not counted",
        scale=1.0,
    )


def form_verdict(claim: Claim, aicc: pd.DataFrame, misfit: pd.DataFrame) -> Verdict:
    """The published form must be better than each rival.

    AICc on a dozen points prefers a simpler form even where the published one is true: that a simpler form does well
    is not evidence against it. Against it counts a form that fits better before parameters are counted.

    Args:
        aicc: AICc of each rival less that of the published form, one row per curve, one column per rival.
        misfit: the same of the logarithm of the root mean square error.
    """
    estimates = {rival: mean_over_runs(aicc[rival].dropna().astype(float)) for rival in aicc}
    words = {}
    for rival, estimate in estimates.items():
        closer = claim.decide(mean_over_runs(misfit[rival].dropna().astype(float))) == NOT_SUPPORTED
        word = claim.decide(estimate)
        words[rival] = NOT_SUPPORTED if closer else INCONCLUSIVE if word == NOT_SUPPORTED else word
    return claim.judged_all(estimates, "runs", words=words)
