"""`python -m rlhf`: the command `rlhf`."""

from rlhf.cli import main

main()
