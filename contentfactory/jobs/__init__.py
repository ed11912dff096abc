"""Kinds of job, one module a modality. `contentfactory.jobs.spec` holds the registry."""
