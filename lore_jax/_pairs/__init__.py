"""The layout of pairs, and reads of a feature table."""
