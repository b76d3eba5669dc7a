"""Small models and padded batches that metrics are tested on."""

import torch
from tiny_granite import granite

EXACT = 1e-11  # solve down to the jumps, so that both sides name the same neurons


SHAPES = {"relu": (12, 31), "silu": (16, 33), "gelu": (20, 50), "relu2": (12, 37)}  # d, d_ff


def model_for(act, seed=0, **options):
    d, d_ff = SHAPES[act]
    return granite(act, d=d, d_ff=d_ff, layers=2, vocabulary=23, seed=seed, **options)


def padded_batches(seed, rows=(3, 2), lengths=(9, 6), vocabulary=23):
    """Batches of odd shapes; the first padded on the right, the second on the left."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for side, (n, length) in enumerate(zip(rows, lengths, strict=True)):
        mask = torch.ones(n, length, dtype=torch.long)
        if side == 0:
            mask[0, -4:] = 0
        else:
            mask[1, :2] = 0
        ids = torch.randint(vocabulary, (n, length), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def with_own_labels(model, batches):
    """Labels that the dense model itself finds likeliest, so that leaving neurons out costs perplexity."""
    labelled = []
    for batch in batches:
        with torch.no_grad():
            best = model(**batch).logits.argmax(-1)
        labels = torch.full_like(best, -100)
        labels[:, 1:] = best[:, :-1]
        labelled.append({**batch, "labels": labels.masked_fill(batch["attention_mask"] == 0, -100)})
    return labelled
