"""`python -m slm` is the `slm` command."""

from slm.cli import main

main()
