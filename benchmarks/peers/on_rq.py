import common
import redis
from rq import Queue


def noop():
    common.ran()


def submit(jobs: int) -> None:
    queue = Queue("bench_rq", connection=redis.Redis.from_url(common.URL))
    common.submit(lambda: queue.enqueue(noop, result_ttl=0), jobs)
