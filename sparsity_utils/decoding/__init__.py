"""Run a model on sparse kernels, and measure how fast it is."""
