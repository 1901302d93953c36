"""`python -m vaelib` is the `vaelib` command."""

from vaelib.cli import main

main()
