"""What the harness costs, beside a plain re-implementation of the published algorithm and the machine's own limit."""
