"""What the harness costs, compared with a plain reference implementation and with the roofline of the machine."""
