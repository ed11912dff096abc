"""How a worker's parent tells its child to give resumable work back: by a file. Light: the parent loads no more than it must."""

import os
import socket
from pathlib import Path

from contentfactory.settings import Settings


def drain_file(settings: Settings) -> Path:
    """The file that says 'give resumable work back', made by the worker's parent when it is told to stop."""
    return settings.run_dir / f"drain-{os.environ.get('FACTORY_WORKER_NAME', socket.gethostname())}"
