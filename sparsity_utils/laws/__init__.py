"""This room fits laws, with intervals, to the tables of a study. Nothing here runs a model."""
