"""Numbers on disk become pictures, tables and pages; nothing is computed."""
