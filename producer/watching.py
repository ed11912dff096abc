"""The Celery application of Flower: ``celery -A producer.watching flower``.

It knows the broker and how messages look, and no kind of job: what there is Flower learns from the workers. So it loads neither the
catalogue nor anything that runs a job, and has no task to start.
"""

from celery import Celery

from contentfactory.settings import load_settings
from producer.publish import celery_options

app = Celery("factory", broker=load_settings().broker(), set_as_current=True)
app.conf.update(celery_options(), broker_connection_max_retries=None, broker_channel_error_retry=True)

__all__ = ["app"]
