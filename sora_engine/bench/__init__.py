"""`sora bench`: ops, block, step, decode, whole runs and serving, measured and kept in files."""
