"""A certified head in the place of a model's output head, where nothing but the likeliest words is asked for."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

from kernels.head import CertifiedHead
from sparsity_utils.console import InputError
from sparsity_utils.decoding.input_kernels import check_not_trained
from sparsity_utils.neurons.modes import forward_replaced

# transformers' method by which `generate` makes, of its settings, what changes logits
PREPARE = "_get_logits_processor"


@contextmanager
def run_head(model: Any, head: nn.Linear, kernel: CertifiedHead) -> Iterator[None]:
    """Inside the block the head gives the likeliest words, and `model.generate` refuses settings that look at others.

    Beams do, and processors that may put the likeliest word behind another, such as a penalty of repetitions. What
    comes after a choice of the k likeliest sees the same logits.
    """

    def forward(x: Tensor) -> Tensor:
        check_not_trained("The output head", [head], x)
        return kernel(x)

    def prepared(generation_config: GenerationConfig, *args: Any, **given: Any) -> LogitsProcessorList:
        processors = own(generation_config, *args, **given)
        _check_settings(generation_config, processors, kernel.k)
        return processors

    with ExitStack() as stack:
        stack.enter_context(forward_replaced(head, forward))
        if own := getattr(model, PREPARE, None):
            stack.callback(vars(model).pop, PREPARE)
            setattr(model, PREPARE, prepared)
        yield


def _check_settings(config: GenerationConfig, processors: LogitsProcessorList, k: int) -> None:
    """Raises `InputError` unless the next word is the likeliest, or drawn from at most the `k` likeliest."""
    others = [one for one in processors if not isinstance(one, TemperatureLogitsWarper)]
    greedy = not config.do_sample and not others
    from_top = bool(others) and isinstance(others[0], TopKLogitsWarper) and others[0].top_k <= k
    if not (greedy or from_top) or (config.num_beams or 1) > 1:
        names = ", ".join(type(one).__name__ for one in processors) or "none"
        raise InputError(
            f"likeliest={k} computes that many logits: decode greedily or sample with top_k up to {k}, without beams "
            f"and without processors that change logits before that (here: {names}), or leave likeliest out."
        )
