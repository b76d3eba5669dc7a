"""Text that sets thresholds is told from text that they are judged on."""

import numpy as np
import pytest

from sparsity_utils.console import InputError
from sparsity_utils.text.overlap import check_disjoint, distinct


def document(seed, size=200):
    return np.random.default_rng(seed).integers(0, 5000, size)


def windows(*documents, length=50, start=0):
    return [(number, text[at : at + length]) for number, text in documents for at in range(start, len(text), length)]


def test_other_documents_pass_also_with_some_text_in_common():
    header = document(9, 60)
    first, second = (np.concatenate([header, document(seed)]) for seed in (1, 2))
    check_disjoint({"calibration": windows((0, first)), "evaluation": windows((0, second), (1, document(3)))})
    check_disjoint({"calibration": windows((0, first)), "evaluation": []})


@pytest.mark.parametrize("length", [50, 77, 200])
@pytest.mark.parametrize("start", [0, 13])
def test_a_document_is_found_wherever_it_was_cut(length, start):
    texts = {
        "calibration": windows((0, document(1)), (7, document(2)), length=length, start=start),
        "evaluation": windows((0, document(3)), (1, document(2))) if length == 50 else [(1, document(2))],
    }
    if length == 50 and start:
        texts["evaluation"] = [(1, document(2))]
    with pytest.raises(InputError, match="Document 7 of the calibration text is also in the evaluation text"):
        check_disjoint(texts)


def test_short_documents_are_compared_whole():
    with pytest.raises(InputError, match="Document 0 of the allocation text is also in the evaluation text"):
        check_disjoint({"allocation": [(0, document(1, 9))], "evaluation": [(5, document(1, 9))]})
    check_disjoint({"allocation": [(0, document(1, 9))], "evaluation": [(5, document(2, 9))]})


def test_windows_that_repeat_earlier_ones_are_left_out():
    rng = np.random.default_rng(0)
    first, second, third = (rng.integers(0, 500, 100).tolist() for _ in range(3))
    copied = [*second[:60], *first[:40]]  # 29 and 9 of its 69 runs of 32 tokens stand there
    touching = [*third[:66], *first[:34]]  # three of 69
    assert list(distinct([first, second, list(first), copied, touching])) == [first, second, touching]
    parts = {str(number): [(0, np.array(window))] for number, window in enumerate((first, second, touching))}
    check_disjoint(parts)
