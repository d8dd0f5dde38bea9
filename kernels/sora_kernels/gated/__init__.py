"""Gated residual, then normalisation with adaLN modulation."""
