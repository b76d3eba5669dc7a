"""Run a model on sparse kernels, and how fast."""
