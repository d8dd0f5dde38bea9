"""Open-Sora's STDiT3: videos by attention within frames and along time (arXiv 2412.20404)."""
