"""Profile to runs to tables. Nothing here knows a law, so that a study runs on a bare GPU image."""
