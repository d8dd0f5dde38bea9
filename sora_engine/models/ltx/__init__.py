"""LTX-Video: videos from texts, pictures and frames (arXiv 2501.00103)."""
