"""RMS normalisation of queries and keys with rotary embedding."""
