import common
from arq import create_pool
from arq.connections import RedisSettings

SETTINGS = RedisSettings.from_dsn(common.URL)


async def noop(ctx):
    common.ran()


class WorkerSettings:
    functions = (noop,)
    redis_settings = SETTINGS
    queue_name = "bench_arq"
    keep_result = 0
    max_jobs = 100
    poll_delay = 0.05
    max_burst_jobs = -1


def submit(jobs: int) -> None:
    pool = None

    async def before():
        nonlocal pool
        pool = await create_pool(SETTINGS, default_queue_name="bench_arq")

    async def after():
        await pool.close()

    common.submit_async(lambda: pool.enqueue_job("noop"), jobs, before, after)
