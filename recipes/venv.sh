#!/usr/bin/env bash
# Makes the virtual environment of `make`, or keeps the one that is there: recipes/venv.sh VENV [PYTHON]
#
# Without PYTHON it is the command by which this script made VENV, else the one in VENV, else python3. An interpreter that
# setup.py does not support is refused before anything is written; one of another version than VENV has makes VENV anew.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=$1
MADE_BY=$VENV/.made-by # the command

fail() {
  echo "error: $*" >&2
  exit 2
}

# "3.11", with the letters of an unusual build ("3.13t"). Any Python since 2 can say it.
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2] + getattr(sys, "abiflags", ""))' 2> /dev/null; }

PYTHON=${2:-}
if [ -z "$PYTHON" ]; then
  PYTHON=python3
  for known in "$(cat "$MADE_BY" 2> /dev/null)" "$VENV/bin/python"; do
    if version_of "$known" > /dev/null; then PYTHON=$known && break; fi
  done
fi

range=$(sed -n 's/.*python_requires=">=3\.\([0-9]*\),<3\.\([0-9]*\)".*/\1 \2/p' setup.py)
read -r first beyond <<< "$range"
supported="Python 3.$first to 3.$((beyond - 1))"
advice="choose one with make PYTHON=/path/to/python"
for ((minor = beyond - 1; minor >= first; minor--)); do
  if version_of "python3.$minor" > /dev/null; then advice="make PYTHON=python3.$minor uses the one found here" && break; fi
done
asked=$(version_of "$PYTHON") || fail "$PYTHON does not start; vmae needs $supported: $advice"
minor=${asked#3.}
minor=${minor%%[!0-9]*}
if [ "${asked%%.*}" != 3 ] || [ "$minor" -lt "$first" ] || [ "$minor" -ge "$beyond" ]; then
  fail "$PYTHON is Python $asked; vmae needs $supported: $advice"
fi

if [ -e "$VENV" ]; then
  has=$(version_of "$VENV/bin/python") || has="a Python that does not start"
  if [ "$has" = "$asked" ]; then exit 0; fi
  if [ ! -e "$VENV/pyvenv.cfg" ]; then fail "$VENV is in the way, and is no virtual environment: move it, or make VENV=another"; fi
  echo "$VENV has ${has/#3/Python 3}, $PYTHON is Python $asked: making $VENV anew"
  rm -rf "$VENV"
fi
"$PYTHON" -m venv "$VENV" || { rm -rf "$VENV"; fail "$PYTHON cannot make $VENV (Debian: apt-get install python$asked-venv)"; }
echo "$PYTHON" > "$MADE_BY"
