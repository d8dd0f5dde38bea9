"""Stand-ins for what a machine lacks, so that code meets it before it meets the real thing."""
