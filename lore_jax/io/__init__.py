"""Files: one record format for fits, progress and user states."""
