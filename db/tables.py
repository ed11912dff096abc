"""The tables of `db.models` for the hot path: Core's own objects, from which a statement is built in half the time.

The mapped classes carry the ORM's annotations into every column of every statement; nothing here needs them.
"""

from typing import Any

from db import models

Artifact: Any = models.Artifact.__table__
Attempt: Any = models.Attempt.__table__
Batch: Any = models.Batch.__table__
BatchCount: Any = models.BatchCount.__table__
BatchDelta: Any = models.BatchDelta.__table__
Dependency: Any = models.Dependency.__table__
DoomedObject: Any = models.DoomedObject.__table__
Event: Any = models.Event.__table__
Job: Any = models.Job.__table__
Mark: Any = models.Mark.__table__
MicroBatch: Any = models.MicroBatch.__table__
ModelVersion: Any = models.ModelVersion.__table__
Project: Any = models.Project.__table__
Queue: Any = models.Queue.__table__
Share: Any = models.Share.__table__
Worker: Any = models.Worker.__table__
