import common
import dramatiq
from dramatiq.brokers.redis import RedisBroker

dramatiq.set_broker(RedisBroker(url=common.URL, namespace="bench-dramatiq"))


@dramatiq.actor(queue_name="noop")
def noop():
    common.ran()


def submit(jobs: int) -> None:
    common.submit(noop.send, jobs)
