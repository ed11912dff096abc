import common
from huey import RedisHuey

huey = RedisHuey("bench", url=common.URL, results=False)


@huey.task()
def noop():
    common.ran()


def submit(jobs: int) -> None:
    common.submit(noop, jobs)
