"""Shapes of published FFNs that speeds are measured on; importing this loads nothing else."""

# (d, d_ff): the published models of arXiv 2411.02335, and a Llama-2-7B
SHAPES = {
    "0.1B": (768, 1920),
    "0.2B": (1024, 2560),
    "0.4B": (1280, 3200),
    "0.8B": (1536, 3840),
    "1.2B": (1792, 4480),
    "2.4B": (2304, 5760),
    "7B": (4096, 11008),
}
