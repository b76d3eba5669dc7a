"""The claim that the published form of the data law describes curves better than its rivals, of any set of curves."""

import numpy as np
import pandas as pd

from sparsity_utils.findings.claims import Claim, Verdict
from sparsity_utils.laws.data_law import RIVAL_FORMS
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, mean_over_runs
from sparsity_utils.models.config import ACTIVATIONS


def form_claim(activation: str, form: str, question: str = "relu_vs_silu") -> Claim:
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
    """AICc, and log of the root mean square residual, of each rival less that of `form`.

    forms: form, aicc and rmse of every curve, named in the column `curve`. One row per curve and one column per rival;
    NaN where a form could not be fitted.
    """
    gaps = []
    for values in (forms["aicc"], np.log(forms["rmse"].clip(lower=1e-9))):
        wide = forms.assign(value=values).pivot(index=curve, columns="form", values="value")
        wide = wide.reindex(columns=[form, *RIVAL_FORMS])
        gaps.append(wide[[*RIVAL_FORMS]].sub(wide[form], axis=0))
    return gaps[0], gaps[1]


def form_verdict(claim: Claim, aicc_gaps: pd.DataFrame, fit_gaps: pd.DataFrame) -> Verdict:
    """Is the published form better than every rival?

    AICc on a dozen points prefers a simpler form even where the published one is true: that a simpler form does well
    is not evidence against it. Against it counts a form that fits better before parameters are counted.

    aicc_gaps, fit_gaps: as `form_gaps` gives them, one row per run or published curve.
    """
    aicc, fit = (
        {rival: mean_over_runs(gaps[rival].dropna().astype(float)) for rival in gaps} for gaps in (aicc_gaps, fit_gaps)
    )
    words = {}
    for rival, estimate in aicc.items():
        simpler = INCONCLUSIVE if claim.decide(estimate) == NOT_SUPPORTED else claim.decide(estimate)
        words[rival] = NOT_SUPPORTED if claim.decide(fit[rival]) == NOT_SUPPORTED else simpler
    return claim.judged_all(aicc, "runs", words=words)
