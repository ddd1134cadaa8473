"""What the benchmarks share: inputs, the machine's roofline, reference implementations, the page."""
