"""Tell uv where pip looks for packages: uv reads none of pip's configuration.

Usage: PYTHON packaging/pip_settings.py

Prints shell assignments: `export UV_...=...` for each setting of pip that has such a variable, and `uv_flags=(...)`
for those that have none. A variable of uv that is already set wins. What cannot be handed on is named on standard error.
"""

from __future__ import annotations

import ast
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlparse


# uv's variables for one setting of pip, the current one first; any of them in the environment leaves the setting alone.
INDEX = ("UV_DEFAULT_INDEX", "UV_INDEX_URL")
EXTRA_INDEXES = ("UV_INDEX", "UV_EXTRA_INDEX_URL")
FIND_LINKS = ("UV_FIND_LINKS",)
CONSTRAINT = ("UV_CONSTRAINT",)
CERTIFICATES = ("SSL_CERT_FILE",)
TRUSTED = ("UV_INSECURE_HOST",)
TIMEOUT = ("UV_HTTP_TIMEOUT",)
STRATEGY = ("UV_INDEX_STRATEGY",)

# In the order of pip: a later section replaces what an earlier one says.
SECTIONS = ("global", "install", ":env:")


def parse_pip_config(text: str) -> dict[str, str]:
    """Return pip's settings that hold for `pip install`, from the output of `pip config list`."""
    settings: dict[str, str] = {}
    for section in SECTIONS:
        for line in text.splitlines():
            name, is_setting, value = line.partition("=")
            if is_setting and name.startswith(f"{section}."):
                settings[name[len(section) + 1 :]] = str(ast.literal_eval(value))
    return settings


def translate(pip: Mapping[str, str], environ: Mapping[str, str]) -> tuple[dict[str, str], list[str], list[str]]:
    """Return the variables for uv, the flags for what has no variable, and a sentence for each setting left out."""
    variables: dict[str, str] = {}
    flags: list[str] = []
    left_out: list[str] = []

    def put(names: tuple[str, ...], value: str) -> None:
        if value and not any(environ.get(name) for name in names):
            variables[names[0]] = value

    extra = []
    for url in pip.get("extra-index-url", "").split():
        if is_missing_folder(url):
            left_out.append(f"pip's extra-index-url {url} is no folder; it is left out.")
        else:
            extra.append(url)
    put(INDEX, pip.get("index-url", ""))
    put(EXTRA_INDEXES, " ".join(extra))
    if extra:
        # As pip does: the best version of all indexes. uv's own way stops at the first index that has the name, and
        # an index for one package's builds often has old versions of others.
        put(STRATEGY, "unsafe-best-match")
    put(FIND_LINKS, ",".join(pip.get("find-links", "").split()))
    put(CONSTRAINT, " ".join(pip.get("constraint", "").split()))
    put(CERTIFICATES, pip.get("cert", ""))
    put(TRUSTED, " ".join(pip.get("trusted-host", "").split()))
    put(TIMEOUT, pip.get("timeout", "") or pip.get("default-timeout", ""))
    if pip.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        flags.append("--no-index")
    if pip.get("client-cert"):
        put(("SSL_CLIENT_CERT",), pip["client-cert"])
    if pip.get("proxy") and not any(environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        variables |= {"HTTP_PROXY": pip["proxy"], "HTTPS_PROXY": pip["proxy"]}
    return variables, flags, left_out


def is_missing_folder(url: str) -> bool:
    parts = urlparse(url)
    return parts.scheme == "file" and not Path(unquote(parts.path)).is_dir()


def uv_environment(environ: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return what to add to uv's environment and to its arguments, so that it finds the packages that pip finds."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        print("note: pip's settings cannot be read; uv uses its own.", file=sys.stderr)
        return {}, []
    variables, flags, left_out = translate(parse_pip_config(result.stdout), environ)
    for sentence in left_out:
        print(f"note: {sentence}", file=sys.stderr)
    return variables, flags


if __name__ == "__main__":
    variables, flags = uv_environment(os.environ)
    for name, value in variables.items():
        print(f"export {name}={shlex.quote(value)}")
    print(f"uv_flags=({' '.join(map(shlex.quote, flags))})")
