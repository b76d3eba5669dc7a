"""Is the published form of the data law the best description of a curve? The claim that notebooks 02 and 07 test."""

import numpy as np
import pandas as pd

from sparsity_utils.findings.claims import Claim, Verdict
from sparsity_utils.laws.data_law import RIVAL_FORMS
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, mean_over_runs
from sparsity_utils.models.config import ACTIVATIONS


def form_claim(activation: str, form: str, question: str) -> Claim:
    """Does the published form describe an activation's curves better than its rivals: ours, or the published ones?"""
    ours = question == "relu_vs_silu"
    name, unit = (ACTIVATIONS[activation], "runs") if ours else (f"its {ACTIVATIONS[activation]} curves", "curves")
    return Claim(
        f"{activation}_form" if ours else f"published_{activation}_form",
        question,
        f"The published {form} law describes {name} best",
        "fits best",
        "AICc below the closest form",
        f"t interval over {unit} of the AICc difference to each of constant, log, exponential, plain power and sigmoid",
        "90% interval above 0 for every form; not supported if a form has smaller residuals, parameters not counted",
        scale=1.0,
    )


def form_gaps(forms: pd.DataFrame, form: str, curve: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """AICc, and logarithm of the root mean square error, of each rival less that of `form`.

    forms: form, aicc and rmse of every curve, named in the column `curve`. One row per curve and one column per rival;
    NaN where a form could not be fitted.
    """
    gaps = []
    for values in (forms["aicc"], np.log(forms["rmse"].clip(lower=1e-9))):
        wide = forms.assign(value=values).pivot(index=curve, columns="form", values="value")
        wide = wide.reindex(columns=[form, *RIVAL_FORMS])
        gaps.append(wide[[*RIVAL_FORMS]].sub(wide[form], axis=0))
    return gaps[0], gaps[1]


def form_verdict(claim: Claim, aicc: pd.DataFrame, misfit: pd.DataFrame) -> Verdict:
    """The published form must be better than each rival.

    AICc on a dozen points prefers a simpler form even where the published one is true: that a simpler form does well
    is not evidence against it. Against it counts a form that fits better before parameters are counted.

    aicc, misfit: as `form_gaps` gives them for the published form, one row per run or published curve.
    """
    estimates = {rival: mean_over_runs(aicc[rival].dropna().astype(float)) for rival in aicc}
    words = {}
    for rival, estimate in estimates.items():
        closer = claim.decide(mean_over_runs(misfit[rival].dropna().astype(float))) == NOT_SUPPORTED
        word = claim.decide(estimate)
        words[rival] = NOT_SUPPORTED if closer else INCONCLUSIVE if word == NOT_SUPPORTED else word
    return claim.judged_all(estimates, "runs", words=words)
