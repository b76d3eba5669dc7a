"""The documents that notebook 13 continues: prompts of English, of Python source and of sums, and what follows them."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsity_utils.console import check
from sparsity_utils.study.makers.pretrained import middle_windows, pinned
from sparsity_utils.study.opened_models import CorrectionConfig

EXAMPLES = 24  # sums before the one that is asked for


@dataclass(frozen=True)
class Documents:
    """Documents that are continued side by side, of all texts."""

    about: pd.DataFrame  # text, document and, of sums, answer; one row each
    prompts: Tensor  # (documents, prompt)
    fresh: Tensor  # what follows, (documents, prompt)

    def __getitem__(self, rows: Tensor) -> "Documents":
        return Documents(self.about.iloc[rows.tolist()].reset_index(drop=True), self.prompts[rows], self.fresh[rows])

    def to(self, device: torch.device) -> "Documents":
        """On another device."""
        return Documents(self.about, self.prompts.to(device), self.fresh.to(device))


def read_prompts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], settings: CorrectionConfig) -> Documents:
    """The documents of some texts. Raises InputError for a text with too few."""
    parts = {text: prompts_of(tokenizer, text, settings) for text in texts}
    about = [
        pd.DataFrame({"text": text, "document": range(len(prompts)), "answer": answers or None})
        for text, (prompts, _, answers) in parts.items()
    ]
    prompts, fresh, _ = zip(*parts.values(), strict=True)
    return Documents(pd.concat(about, ignore_index=True), torch.cat(prompts), torch.cat(fresh))


def prompts_of(
    tokenizer: PreTrainedTokenizerBase, text: str, settings: CorrectionConfig
) -> tuple[Tensor, Tensor, list[str]]:
    """Prompts, (documents, prompt), and what follows them there, of the same shape; answers, of sums alone.

    What follows sums are other sums.

    Raises InputError for a text with too few documents.
    """
    size, answers = settings.prompt, []
    if text == "arithmetic":
        count = settings.documents
        sums = [_sums(number) for number in range(2 * count)]
        answers = [answer for _, answer in sums[:count]]
        ends = [tokenizer(words, verbose=False)["input_ids"][-size:] for words, _ in sums]
        windows = [first + second for first, second in zip(ends[:count], ends[count:], strict=True)]
        check(
            all(len(window) == 2 * size for window in windows),
            f"{EXAMPLES} sums have fewer than {size} tokens; lower correction.prompt.",
        )
    else:
        source = {"english": "python-prose", "python": "python-source"}[text]
        windows = list(islice(middle_windows(tokenizer, pinned(source), 2 * size), settings.documents))
    check(
        len(windows) == settings.documents,
        f"The {text} text has {len(windows)} documents of {2 * size} tokens, and {settings.documents} are asked for; "
        f"lower correction.documents or correction.prompt.",
    )
    ids = torch.tensor(windows)
    return ids[:, :size], ids[:, size:], answers


def _sums(number: int) -> tuple[str, str]:
    """Sums with their answers, the last one without; and that answer."""
    rng = random.Random(number)
    pairs = [(rng.randint(1, 9), rng.randint(1, 9)) for _ in range(EXAMPLES + 1)]
    *solved, (a, b) = pairs
    return "".join(f"{x} + {y} = {x + y}\n" for x, y in solved) + f"{a} + {b} =", str(a + b)
