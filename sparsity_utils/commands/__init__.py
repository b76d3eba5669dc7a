"""The work behind the command line."""
