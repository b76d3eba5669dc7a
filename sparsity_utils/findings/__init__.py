"""What the notebooks claim, judge and draw. In a notebook, the first import of it has tables shown in words."""

from sparsity_utils.findings.tables import show_in_words

show_in_words()
