"""Pictures, tables and pages of results, and the terminal."""
