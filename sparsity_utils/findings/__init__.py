"""What the notebooks claim, judge and draw."""
