"""Normalisation with adaLN modulation."""
