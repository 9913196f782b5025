# Sourced by quickstart.sh and tests/run.sh: makes .venv with the pinned versions, once for each constraints.txt.

# ensure_system_packages COMMAND[:PACKAGE]…: Debian packages of commands, if apt and root are there; else names what is missing.
ensure_system_packages() {
  local missing=() name
  for name in "$@"; do
    PATH="$PATH:/usr/sbin" command -v "${name%%:*}" >/dev/null || missing+=("${name#*:}")
  done
  [ ${#missing[@]} -eq 0 ] && return 0
  if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "installing ${missing[*]}"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null
  else
    echo "missing: ${missing[*]}; please install them with your package manager" >&2
    return 3
  fi
}

# ensure_environment [EXTRA]: .venv with this project and its dependencies (and those of an extra), then activates it.
ensure_environment() {
  local extra="${1:-}" python="${PYTHON:-python3}" stamp
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "$("$python" --version) is too old: Python 3.10 or newer is needed (set PYTHON=/path/to/python3.10)" >&2
    return 3
  }
  if ! [ -e .venv/bin/activate ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # none, or a half-made one
    rm -rf .venv
    "$python" -m venv .venv || {
      rm -rf .venv
      echo "a virtual environment cannot be made: apt-get install python3-venv" >&2
      return 3
    }
  fi
  # shellcheck disable=SC1091
  source .venv/bin/activate
  stamp=".venv/.installed-${extra:-base}-$(cat constraints.txt setup.cfg pyproject.toml | sha256sum | cut -c1-16)"
  [ -e "$stamp" ] && return 0
  echo "installing into .venv (once; a few minutes, most of it PyTorch)"
  export PIP_DISABLE_PIP_VERSION_CHECK=1
  # On a terminal pip shows its bars; in a log it would only fill pages.
  local install=(python -m pip install -c constraints.txt)
  [ -t 1 ] || install+=(-q)
  "${install[@]}" "pip>=24" "setuptools>=70.1"
  # torch first: the others then find it, and DeepSpeed needs it to build.
  "${install[@]}" "$(grep '^torch==' constraints.txt)"
  # compat: by a path. Beside a clone that is named slm, Python would take its folder for the package otherwise.
  "${install[@]}" --config-settings editable_mode=compat -e ".${extra:+[$extra]}"
  touch "$stamp"
}
