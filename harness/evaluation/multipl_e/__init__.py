"""MultiPL-E (Cassano et al. 2023, arXiv 2208.08227) in ten languages: generation, execution and scores."""
