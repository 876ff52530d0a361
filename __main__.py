"""Run the command line with ``python -m nvvl``."""

from nvvl.cli import main

main()
