"""The L1 penalty on activations that drives ReLU neurons to zero while a model is trained (arXiv 2603.23198)."""

import torch
from torch import Tensor
from transformers import PreTrainedModel


class ActivationPenalty:
    """weight x the mean over layers and tokens of sum_i |h_i|, of the forward passes since it was last asked for.

    h are the neurons of an FFN as the map down is given them. Passes without gradients are not counted.
    """

    def __init__(self, model: PreTrainedModel, weight: float):
        self.weight, self.sizes = weight, list[Tensor]()
        for layer in model.base_model.layers:
            layer.mlp.down_proj.register_forward_pre_hook(self._note)

    def _note(self, module: torch.nn.Module, args: tuple[Tensor]) -> None:
        if torch.is_grad_enabled():
            self.sizes.append(args[0].abs().sum(-1).mean())

    def taken(self) -> Tensor:
        """The penalty, a scalar with a gradient."""
        mean, self.sizes = torch.stack(self.sizes).mean(), []
        return self.weight * mean
