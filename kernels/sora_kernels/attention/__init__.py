"""Attention inside the segments of a packed batch."""
