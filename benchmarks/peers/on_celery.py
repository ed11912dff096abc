import common
from celery import Celery

app = Celery("peer", broker=common.URL)
app.conf.update(
    task_ignore_result=True, task_default_queue="bench_celery", worker_prefetch_multiplier=64, broker_connection_retry_on_startup=True,
    worker_hijack_root_logger=False, task_serializer="json", accept_content=["json"],
)  # fmt: skip


@app.task(name="noop")
def noop():
    common.ran()


def submit(jobs: int) -> None:
    with app.producer_pool.acquire(block=True) as producer:
        common.submit(lambda: noop.apply_async(producer=producer), jobs)
