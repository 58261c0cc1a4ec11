"""The command line, by its name or as ``python -m edgeflash``."""

import sys


def main() -> None:
    try:
        from edgeflash.cli import main
    except KeyboardInterrupt:
        sys.exit("edgeflash: interrupted before it began")
    main()


if __name__ == "__main__":
    main()
