"""Tables to laws and intervals. Nothing here knows a model."""
