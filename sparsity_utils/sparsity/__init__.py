"""Model and text to numbers: thresholds, activation ratios, losses, patterns."""
