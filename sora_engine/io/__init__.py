"""Files in and out: weights, images, videos, provenance."""
