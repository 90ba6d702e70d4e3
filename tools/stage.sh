#!/usr/bin/env bash
# Runs one stage of make: says what it does, then how long it took. Its exit status is that of the command.
# Usage: tools/stage.sh "what it does" command argument...
set -uo pipefail
what=$1
shift
printf '== %s\n' "$what"
started=${EPOCHREALTIME/[.,]/}
"$@"
status=$?
tenths=$(((${EPOCHREALTIME/[.,]/} - started) / 100000))
outcome=$([[ $status == 0 ]] && echo done || echo "FAILED (exit status $status)")
printf '== %s: %s in %d.%d s\n' "$what" "$outcome" $((tenths / 10)) $((tenths % 10))
exit $status
