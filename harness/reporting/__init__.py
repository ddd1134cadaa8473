EXAMPLES = 30
"""Examples of each task in a report, unless another number is asked for."""
