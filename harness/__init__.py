"""The front door: command line, configuration, experiments, artifacts, corpora, training, suites."""
