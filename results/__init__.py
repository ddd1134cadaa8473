"""Records, statistics, tables and figures; the paper's published numbers as data."""
