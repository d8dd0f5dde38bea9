"""A linear layer whose rows come out the same whatever other rows are beside them."""
