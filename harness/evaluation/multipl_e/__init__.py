"""MultiPL-E (Cassano et al. 2023, arXiv 2208.08227) on ten languages: what is executed, and how it is scored."""
