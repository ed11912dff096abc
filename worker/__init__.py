"""Workers: the Celery application, the life of a job, and the runners that make things."""
