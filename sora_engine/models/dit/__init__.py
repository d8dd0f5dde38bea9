"""DiT: class-conditional pictures by a diffusion transformer (arXiv 2212.09748)."""
