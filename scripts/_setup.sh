# Sourced by scripts/demo, scripts/test and .ci/run, from the repository's root: `set_up EXTRA` leaves an interpreter
# with mpjax[EXTRA] in $venv_python. $PYTHON picks the Python; without it an existing .venv is kept as it is.

venv=.venv
venv_python=$venv/bin/python

step() { printf '» %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Whether $1 is a Python ≥ 3.11 that really runs (a pyenv shim may exist and yet fail).
runs() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
can_make_venv() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }
version() { "$1" -c 'import sys; print(sys.version.split()[0])'; }

# Sets $python to the interpreter that a new environment is made from.
find_python() {
  local candidate without_venv=
  if [ -n "${PYTHON:-}" ]; then
    runs "$PYTHON" || fail "PYTHON=$PYTHON does not run, or is older than Python 3.11"
    can_make_venv "$PYTHON" || fail "PYTHON=$PYTHON lacks venv or ensurepip (on Debian: apt install python3-venv)"
    python=$PYTHON
    return
  fi
  for candidate in python3.13 python3.12 python3.11 python3; do
    runs "$candidate" || continue
    if can_make_venv "$candidate"; then python=$candidate; return; fi
    without_venv=$candidate
  done
  [ -z "$without_venv" ] || fail "$without_venv lacks venv or ensurepip (on Debian: apt install python3-venv)"
  fail "no Python 3.11 or newer found; install one, or set PYTHON to its path"
}

# Makes .venv, unless it is there, whole, and of the version that $PYTHON asks for.
make_venv() {
  if [ -f $venv/.made ] && runs $venv_python && $venv_python -c 'import pip' >/dev/null 2>&1; then
    [ -n "${PYTHON:-}" ] || return 0
    find_python
    [ "$(version "$python")" != "$(version $venv_python)" ] || return 0
  fi
  find_python
  # The interpreter behind a virtual environment, so that $venv may be rebuilt from within itself.
  python=$("$python" -c 'import sys; print(getattr(sys, "_base_executable", None) or sys.executable)')
  step "making $venv with Python $(version "$python")"
  rm -rf $venv
  "$python" -m venv $venv || fail "could not make $venv with $python"
  touch $venv/.made
}

# Installs mpjax[$1] unless pyproject.toml, the checkout's place and the extra are those of the last time.
set_up() {
  local extra=$1 hash name
  make_venv
  hash=$($venv_python -c 'import hashlib, os; text = open("pyproject.toml", "rb").read() + os.getcwd().encode()
print(hashlib.sha256(text).hexdigest())')
  [ "$(cat "$venv/.installed-$extra" 2>/dev/null)" != "$hash" ] || return 0
  step "installing mpjax[$extra] (a minute or two the first time)"
  $venv_python -m pip install --quiet --disable-pip-version-check --editable ".[$extra]" ||
    fail "could not install mpjax[$extra]: see pip's message above"
  for name in experiments test dev; do # each extra holds those before it
    echo "$hash" >"$venv/.installed-$name"
    [ "$name" != "$extra" ] || break
  done
}
