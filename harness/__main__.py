"""`python -m harness` is `fusellm`."""

from harness.cli import main

main()
