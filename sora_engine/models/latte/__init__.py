"""Latte: videos by spatial and temporal attention in turn (arXiv 2401.03048)."""
