"""The command line, by its name or as ``python -m edgeflash``."""

import sys


def main() -> None:
    try:
        from edgeflash.cli import main
    except KeyboardInterrupt:
        print("edgeflash: interrupted before it began", file=sys.stderr)
        sys.exit(2)
    main()


if __name__ == "__main__":
    main()
