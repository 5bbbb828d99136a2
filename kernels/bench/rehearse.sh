#!/usr/bin/env bash
# Python for gpu.sh where there is no card: see rehearse.py.
exec "${REHEARSAL_PYTHON:-python3}" "$(dirname "$0")/rehearse.py" "$@"
