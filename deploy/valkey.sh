#!/bin/sh
# Starts Valkey with a password. The configuration goes in by standard input: a command line can be read by everybody.
set -eu
: "${VALKEY_PASSWORD:?is not set}"
exec valkey-server - <<CONFIG
port ${VALKEY_PORT:-6379}
bind ${VALKEY_BIND:-* -::*}
dir ${VALKEY_DIR:-/data}
requirepass ${VALKEY_PASSWORD}
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
proto-max-bulk-len 1mb
tcp-keepalive 60
timeout 0
enable-debug-command no
enable-protected-configs no
CONFIG
