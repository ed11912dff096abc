"""The command ``factory``: starts the application's CLI where it is installed, and otherwise says how to get it."""

import importlib
import sys

HELP = """\
The command line belongs to the application, which runs from a checkout of Contentfactory; this environment holds only the
light package `contentfactory`, which producers use.

    git clone <the repository>  &&  cd contentfactory  &&  make setup  &&  .venv/bin/factory doctor

({reason})
"""


def main() -> None:
    """Run ``producer.cli``; exit with status 3 and instructions where the application or one of its libraries is missing."""
    try:
        cli = importlib.import_module("producer.cli")
    except ModuleNotFoundError as error:
        sys.stderr.write(HELP.format(reason=f"missing: {error.name}"))
        raise SystemExit(3) from None
    cli.app()


if __name__ == "__main__":
    main()
