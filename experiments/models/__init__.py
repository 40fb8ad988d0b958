"""Importers that turn published model files into Flax modules, and networks."""
