"""Experiments: one script per table or figure of a paper, with the models and data they run on."""
