"""What speeds are measured on, shapes of published FFNs and ways of decoding; importing this loads nothing else."""

DENSE = ("dense", "all rows")  # ways of decoding that read all weights: transformers, and the kernels skipping nothing

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
