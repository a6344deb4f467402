"""What must not be shown of options, command lines and URLs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence


HIDDEN = "***"


def is_secret(option: str) -> bool:
    """Whether an option, or an environment variable, holds a token, key or password, by its name."""
    return re.search(r"(token|key|password|secret)$", option.lower()) is not None


def without_logins(text: str) -> str:
    """Hide the login inside of every URL of a text."""
    return re.sub(r"//[^/@\s]*@", f"//{HIDDEN}@", text)


def shown_command(arguments: Sequence[str]) -> str:
    """Return a command line as text, quoted for a shell. The value of an option that holds a secret is `***`.

    `arguments` are the program and its arguments.
    """
    shown = []
    hides_next = False
    for argument in arguments:
        option, separator, _ = argument.partition("=")
        if hides_next and not argument.startswith("--"):
            shown.append(HIDDEN)
        elif separator and is_secret(option):
            shown.append(f"{option}={HIDDEN}")
        else:
            shown.append(without_logins(argument))
        hides_next = argument.startswith("--") and not separator and is_secret(option)
    return shlex.join(shown).replace(f"'{HIDDEN}'", HIDDEN)
