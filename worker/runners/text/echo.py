"""Runner of ``text.echo``."""

import time
from collections.abc import Iterator

from contentfactory.jobs.diagnostic import TextEcho
from worker.context import JobContext, Output, Yield
from worker.runners import runs


@runs(TextEcho)
def echo(params: list[TextEcho], context: JobContext) -> Iterator[Yield]:
    """Pause, then give each text back."""
    for job, one in enumerate(params):
        end = time.monotonic() + one.seconds
        while (left := end - time.monotonic()) > 0:
            context.check(job)
            context.progress(job, 1 - left / one.seconds)
            time.sleep(min(left, 0.1))
        text = str(one.text)
        text = text.upper() if one.transform == "upper" else text[::-1] if one.transform == "reverse" else text
        yield Output(job, "text.txt", "text/plain", text.encode(), {"characters": len(text)})
