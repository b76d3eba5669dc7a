"""Next-token cross-entropy from hidden states without ever holding all logits.

At d = 24 and 1,024 vocabulary entries the logits of one batch are forty times larger than the hidden states, and
writing them four times (logits, log-softmax, its gradient, the logits' gradient) was a third of a training step.
Working through a few hundred tokens at a time keeps them in cache, and one softmax serves the loss and its gradient:
the factor that the gradients share is put on the small matrices.
"""

import torch

from sparsity_utils.models.quick import product

CHUNK_TOKENS = 512  # 2 MB of float32 logits at 1,024 entries


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, scale: float
) -> torch.Tensor:
    """Mean cross-entropy of softmax(scale x hidden @ weight^T) against `targets`, a float32 scalar.

    hidden (tokens, d), weight (vocabulary, d), targets (tokens,). Gradients reach hidden and weight. Products run in
    hidden's dtype; the softmax in float32 (float64 for float64 inputs).
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, scale, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients beside the loss, while the chunk's logits are at hand."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, scale, wants_gradient):
        tokens = hidden.shape[0]
        head = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_gradient else None
        grad_weight = torch.zeros_like(weight) if wants_gradient else None
        for start in range(0, tokens, CHUNK_TOKENS):
            chunk, target = hidden[start : start + CHUNK_TOKENS], targets[start : start + CHUNK_TOKENS, None]
            logits = product(chunk, head).to(total.dtype).mul_(scale)  # (chunk, vocabulary)
            slope = torch.softmax(logits, -1)
            # The largest probability never underflows: log-sum-exp = largest logit - its log.
            log_normaliser = logits.amax(-1, keepdim=True) - slope.amax(-1, keepdim=True).log_()  # (chunk, 1)
            total += (log_normaliser - logits.gather(1, target)).sum()
            if wants_gradient:
                slope.scatter_add_(1, target, slope.new_full(target.shape, -1.0))
                slope = slope.to(hidden.dtype)
                grad_hidden[start : start + CHUNK_TOKENS] = product(slope, head.t())
                grad_weight += product(chunk.t(), slope.t()).t().to(weight.dtype)
        if wants_gradient:
            ctx.save_for_backward(grad_hidden.mul_(scale / tokens), grad_weight.mul_(scale / tokens))
        return total / tokens

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad * grad_hidden, grad * grad_weight, None, None, None
