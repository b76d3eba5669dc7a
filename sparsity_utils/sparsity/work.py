"""How much of a measurement is done: one bar over all of its passes, with an estimate of what is left.

Work is counted in token passes: 1 is one token through the whole model. How many passes a search takes is not known
before; it is expected, and expected anew whenever a stage begins or a trial ends.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from sparsity_utils.console import share_bar
from sparsity_utils.neurons.find import find_ffns, layer_count

STAGES = ("sample", "calibration", "evaluation")  # of a measurement, in order; those that solve nothing only evaluate
MOST = 0.99  # of the bar, before the end


class Work:
    """The work of one measurement: what is done, and what is expected of each of STAGES."""

    def __init__(self, model: nn.Module, bar: tqdm) -> None:
        ffns, self.bar = find_ffns(model), bar
        self.done, self.stage = 0.0, STAGES[0]
        self.left = dict.fromkeys(STAGES, 0.0)
        self.modules = {model.get_submodule(ffn.owner) if ffn.down is None else ffn.down for ffn in ffns}
        down = sum(ffn.down_weight.numel() for ffn in ffns)
        self.of_an_error = down / layer_count(ffns) / sum(weight.numel() for weight in model.parameters())
        """The work of one error of a layer, W_out times h, for each token."""

    def begin(self, stage: str, left: float) -> None:
        """Go on with `stage`, of which `left` is expected; the stages before it are over."""
        for earlier in STAGES[: STAGES.index(stage)]:
            self.left[earlier] = 0.0
        self.stage, self.left[stage] = stage, left
        self.bar.set_description(f"measuring: {stage}", refresh=False)

    def add(self, amount: float) -> None:
        """`amount` of the present stage is done: the bar shows done / (done + left), and never runs backwards.

        Where more is left than was expected, the bar stands until the work catches up.
        """
        self.done += amount
        self.left[self.stage] = max(self.left[self.stage] - amount, 0.0)
        share = min(self.done / (self.done + sum(self.left.values())), MOST)
        self.bar.update(max(100 * share - self.bar.n, 0.0))

    def ran(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook of `modules`, which tells of each layer: one pass over a large batch can take a minute."""
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(output, Tensor):
            self.add(output.numel() / output.shape[-1] / len(self.modules))


@contextmanager
def work_of(model: nn.Module, shown: bool) -> Iterator[Work]:
    """The work that the block does on `model`, behind a bar where it is `shown` (never in CI)."""
    with share_bar("measuring", shown) as bar, ExitStack() as stack:
        work = Work(model, bar)
        for module in work.modules if not bar.disable else ():
            stack.callback(module.register_forward_hook(work.ran).remove)
        yield work
        bar.update(100 - bar.n)
        bar.refresh()
