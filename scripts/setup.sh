# Sourced by the other scripts: makes .venv with the tested versions, once, and activates it.
# A changed pyproject.toml or constraints.txt, or another folder, makes it install again.
CDPATH= cd -- "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    for name in python3.13 python3.12 python3.11 python3.10 python3 python; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    echo "qlora: needs Python 3.10 to 3.13 with venv (Debian, Ubuntu: apt install python3-venv)" >&2
    return 1
}

stamp=$({ pwd && cat pyproject.toml constraints.txt; } | cksum) # the folder too: a virtual environment cannot be moved
if [ "$(cat .venv/.installed 2>/dev/null)" != "$stamp" ]; then
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        python=${PYTHON:-$(find_python)}
        echo "setting up .venv with $("$python" --version); this downloads PyTorch once"
        "$python" -m venv --clear .venv
    fi
    # compiling all of the libraries takes longer than downloading them; what is imported is compiled then, and kept
    pip_install() { .venv/bin/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt "$@"; }
    pip_install torch # first: a range that another package asks for could bring a newer one
    pip_install -e '.[quickstart,dev]'
    echo "$stamp" >.venv/.installed
fi
. .venv/bin/activate
unset PYTHONDONTWRITEBYTECODE
