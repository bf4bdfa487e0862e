#!/bin/sh
# Programs that some tests run for real: a browser for the status page, Prometheus for rules and dashboard, Redis for
# the store, libfaketime for the wall clock, and what the arguments name (PROGRAM:PACKAGE). `make test`, `test-adversary`,
# `test-cluster`, `test-updates` and `test-images` call this; without root, or without Debian's packages, those tests skip and say so.
# Ubuntu has no Chromium but as a snap, whose packages here are scripts that say so, and which sees no other's /tmp.
set -eu
missing=
browser=
if grep -qs '^ID=ubuntu$' "${OS_RELEASE:-/etc/os-release}"; then
    if ! command -v google-chrome >/dev/null || ! command -v chromedriver >/dev/null; then
        echo "Ubuntu has no Chromium but a snap: tests of the status page skip without google-chrome and chromedriver" >&2
    fi
else
    browser="chromium:chromium chromedriver:chromium-driver"
fi
for pair in $browser prometheus:prometheus redis-server:redis-server faketime:faketime "$@"; do
    command -v "${pair%%:*}" >/dev/null || missing="$missing ${pair#*:}"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "Not installed, so that some tests skip:$missing" >&2
    exit 0
fi
echo "Installing for the tests:$missing" >&2
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
# shellcheck disable=SC2086 # a list of names
if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends $missing; } >"$log" 2>&1; then
    tail -3 "$log" >&2
    echo "Could not be installed, so that some tests skip:$missing" >&2
fi
