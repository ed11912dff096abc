#!/bin/sh
# Finds a Python that can make the virtual environment and hands over to scripts/setup.py. Everything lands in .venv.
set -eu
cd "$(dirname "$0")/.."

usable() {
    # A pyenv shim may exist without a version behind it, and Debian splits ensurepip off: so try, do not look.
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' >/dev/null 2>&1
}

# 3.11 first: the pinned versions are tested on it. PYTHON=/path/to/python overrides the search.
for python in ${PYTHON:-python3.11 python3.12 python3.13 python3.14 python3 python /usr/bin/python3}; do
    if usable "$python"; then
        exec "$python" scripts/setup.py "$@"
    fi
done

cat >&2 <<'TEXT'
setup: no suitable Python found. Needed: Python 3.11 to 3.14 with the modules venv and ensurepip.
  Debian, Ubuntu   apt install python3.11 python3.11-venv   (or any newer python3 with its -venv package)
  Fedora           dnf install python3.11
  macOS            brew install python@3.11
Or name one:       make setup PYTHON=/path/to/python3.11
TEXT
exit 1
