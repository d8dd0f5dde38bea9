"""An inference engine for Sora-class video diffusion transformers."""
