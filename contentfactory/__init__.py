"""What producers and workers of the Contentfactory agree on: kinds of job, states, errors, settings and ids.

Light on purpose: importing it never loads torch, Celery or SQLAlchemy, never connects and never reads the environment.
"""

__version__ = "0.1.0"
