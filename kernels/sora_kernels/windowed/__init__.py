"""Attention within a 3-D neighbourhood of each token."""
