"""Build, train and open models."""
