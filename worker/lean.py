"""``python -m worker.lean -A APP worker …`` is ``celery -A APP worker …``, and so with ``flower``, without what the command does not need.

Celery loads all of its commands and each plugin of its command line for every one: Flower with a web server in each worker, a shell with its
history and completion in all. That is more than a second of computing a process, and `factory up` starts several at once. What these two
take on their command line and what they do is otherwise the same.
"""

import importlib
import os

from contentfactory.service import LIBRARIES, load_quickly

COMMANDS = {"worker": "celery.bin.worker", "flower": "flower.command"}
"""Modules whose attribute of the same name is the command."""


if __name__ == "__main__":
    load_quickly((*LIBRARIES, "celery.bin.base"))
elif __name__ == "__mp_main__":  # the pool's child
    load_quickly()


def main() -> None:
    """Run the command line."""
    import click
    from celery.app.utils import find_app
    from celery.bin.base import CLIContext

    class Commands(click.Group):
        """The group of `COMMANDS`, each loaded when it is asked for."""

        def list_commands(self, context: click.Context) -> list[str]:
            return list(COMMANDS)

        def get_command(self, context: click.Context, name: str) -> click.Command | None:
            return getattr(importlib.import_module(COMMANDS[name]), name) if name in COMMANDS else None

    @click.group("celery", cls=Commands)
    @click.option("-A", "--app", required=True)
    @click.pass_context
    def group(context: click.Context, app: str) -> None:
        context.obj = CLIContext(app=find_app(app), no_color=bool(os.environ.get("NO_COLOR")), workdir=None)

    group(auto_envvar_prefix="CELERY")


if __name__ == "__main__":
    main()
