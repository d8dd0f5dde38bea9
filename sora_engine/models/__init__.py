"""Model families, each with `config.py`, `model.py` and `checkpoint.py`, and loading them."""
