#!/bin/sh
# Writes .env with a random value for everything that docker-compose.yml asks for. Never touches one that is there.
set -eu
cd "$(dirname "$0")/.."
target="${1:-.env}"
if [ -e "$target" ]; then
    echo "secrets: $target is there already and stays as it is" >&2
    exit 1
fi
umask 077
random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
{
    echo "# Made by deploy/secrets.sh. Keep a copy where your other secrets are: without it the volumes cannot be opened."
    for name in POSTGRES_PASSWORD VALKEY_PASSWORD S3_ACCESS_KEY S3_SECRET_KEY FACTORY_SECRET_KEY FLOWER_PASSWORD GRAFANA_PASSWORD; do
        echo "$name=$(random)"
    done
} >"$target"
echo "secrets: wrote $target"
