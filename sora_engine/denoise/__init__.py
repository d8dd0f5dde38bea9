"""From words and clips to denoised latents: canvases, windows, packed batches, guidance."""
