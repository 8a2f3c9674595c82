#!/usr/bin/env bash
# Builds sdist and wheel in dist/, installs the wheel in an empty environment, and uses it away from the tree.
# PYTHON chooses the interpreter (it needs the package build), PIP_FLAGS are more arguments for pip.
set -euo pipefail
cd "$(dirname "$0")/.."
TREE=$PWD
PYTHON=${PYTHON:-$TREE/.venv/bin/python}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

echo "== build"
rm -rf dist
"$PYTHON" -m build --outdir dist . > "$WORK/build.log" 2>&1 || { cat "$WORK/build.log" >&2; exit 1; }
ls dist

echo "== install in an empty environment"
"$PYTHON" -m venv "$WORK/env"
unset PYTHONPATH
export PATH=$WORK/env/bin:$PATH OMP_NUM_THREADS=1
read -r -a flags <<< "${PIP_FLAGS:-}"
python -m pip install --quiet --disable-pip-version-check -c constraints.txt ${flags[@]+"${flags[@]}"} dist/*.whl

echo "== use away from the tree"
cd "$WORK"
vmae --version
python - "$TREE" << 'END'
import importlib.metadata, importlib.resources, sys
import vmae, vmae_kernels
assert not vmae.__file__.startswith(sys.argv[1]), vmae.__file__
assert importlib.metadata.version("vmae") == vmae.__version__, "two version numbers"
assert importlib.metadata.metadata("vmae")["License-Expression"] == "MIT"
for package in ("vmae", "vmae_kernels"):
    assert importlib.resources.files(package).joinpath("py.typed").is_file(), f"{package} lacks py.typed"
END
vmae --print-completion bash | bash -n
vmae doctor > doctor.txt
vmae masks --output masks.png > masks.txt
# Without the sample clips one line says how to get them. That command is run as it stands.
if vmae samples clips.txt 2> samples.err; then echo "sample clips came from elsewhere" >&2; exit 1; fi
advice=$(grep -o 'pip install [^`]*' samples.err)
echo "$advice"
python -m $advice --quiet
vmae samples clips.txt --frames frames
vmae pretrain --data clips.txt --output run --model vit_tiny --decoder-depth 2 --image-size 64 --num-frames 8 \
  --stride 2 --encoder-ratio 0.75 --batch-size 4 --steps 4 --log-every 1 --workers 0 --device cpu > run.txt 2>&1 ||
  { cat run.txt >&2; exit 1; }
vmae curves run --reference tiny --output curves.png
vmae serve --help > /dev/null
vmae serve --checkpoint run --port 0 > serve.txt 2>&1 &
server=$!
for _ in $(seq 120); do grep -q '^http' serve.txt && break || sleep 0.5; done
python -c "
import re, urllib.request
address = re.search(r'http://[^ ]+', open('serve.txt').read())
assert address, 'serve did not start: ' + open('serve.txt').read()
assert b'<html' in urllib.request.urlopen(address[0]).read()
"
kill "$server"
test -s masks.png && test -s curves.png
echo "the wheel works"
