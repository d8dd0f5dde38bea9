"""A linear layer whose weight stays quantised in memory."""
