"""The command ``factory``. Each command imports what it needs when it runs, so that ``factory --help`` answers at once."""

from typing import Annotated

import typer

import contentfactory
from producer.cli import batch, jobs, models, system
from producer.cli.batch import run
from producer.cli.submit import submit
from producer.cli.tune import tune

app = typer.Typer(
    name="factory",
    help="The batch API for your own GPUs: text, images, speech, music and video by your own models.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(contentfactory.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


app.command("up")(system.up)
app.command("down")(system.down)
app.command("run")(run)
app.command(
    "submit", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)(submit)
app.add_typer(batch.app, name="batch", help="Batches: plan, run, watch, pause, resume, cancel, prioritise, retry, deliver.")
app.add_typer(jobs.app, name="jobs", help="Single jobs: list, show, logs, cancel, retry, prioritise.")
app.add_typer(models.app, name="models", help="Models: list, add, show.")
app.add_typer(models.datasets, name="datasets", help="Data sets: list, add.")
app.add_typer(system.queues, name="queues", help="Queues: list, pause, resume, drain.")
app.add_typer(system.kinds, name="kinds", help="Kinds of job: list, show.")
app.add_typer(system.projects, name="projects", help="Projects: list, pause, resume, weight.")
app.command("tune")(tune)
app.command("doctor")(system.doctor)
app.command("sweep")(system.sweep)

__all__ = ["app"]
