#!/usr/bin/env bash
# Type checks with mypy (strict) and pyright.
#
# The repository root is the package `nvvl`, a name both tools take from a folder. So they look
# through a link of that name, in a temporary folder that also has the settings.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
bin=$(cd "$root" && cd "${VENV:-.venv}/bin" && pwd)
view=$(mktemp -d)
trap 'rm -rf "$view"' EXIT
ln -s "$root" "$view/nvvl"
ln -s "$root/pyproject.toml" "$view/pyproject.toml"
cd "$view"

"$bin/python" -m mypy -p nvvl --exclude /build/ --cache-dir "$root/.mypy_cache"
# Pyright and its node come from pip; without this it asks the network for a newer version.
PYRIGHT_PYTHON_IGNORE_WARNINGS=1 "$bin/pyright" --pythonpath "$bin/python" nvvl
