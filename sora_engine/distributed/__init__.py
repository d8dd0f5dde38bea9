"""One engine over many ranks: sharded tokens, guidance and windows, worker processes, a planner."""
