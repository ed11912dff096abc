import common
from taskiq_redis import RedisStreamBroker

broker = RedisStreamBroker(url=common.URL, queue_name="bench_taskiq")


@broker.task
async def noop() -> None:
    common.ran()


def submit(jobs: int) -> None:
    common.submit_async(lambda: noop.kiq(), jobs, broker.startup, broker.shutdown)
