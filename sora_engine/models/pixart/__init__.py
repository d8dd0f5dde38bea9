"""PixArt-Sigma: pictures of up to 4K from texts (arXiv 2403.04692)."""
