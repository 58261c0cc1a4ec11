"""``python -m edgeflash``: the command line."""

from edgeflash.cli import main

main()
