"""Factorised attention: along time alone, or within each frame."""
