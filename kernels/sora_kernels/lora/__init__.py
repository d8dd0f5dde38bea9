"""Low-rank changes of a linear layer, other ones for other stretches of its rows."""
