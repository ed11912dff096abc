"""What takes work in: manifests, accepting, dispatch, the command line and the HTTP API. Never imports `worker`."""
