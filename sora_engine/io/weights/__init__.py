"""Weights out of whatever file people hold, through one seam: `source.WeightSource`."""
