"""The engine: jobs, their turns, their memory, and what is kept of them."""
