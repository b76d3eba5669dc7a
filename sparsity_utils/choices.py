"""What people may choose by name, stated where nothing heavy is imported: the command line answers at once."""

DTYPES = ("float32", "bfloat16", "float16")  # of a model's weights, named as in torch
MEASURED_TOKENS = 50_000  # of a text that `measure` uses at most, unless told otherwise
