"""U-ViT: time, text and patches as tokens, and long skips (arXiv 2209.12152)."""
