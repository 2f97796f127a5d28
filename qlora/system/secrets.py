"""Recognizes tokens and passwords, so that they are refused in files and never printed."""

from __future__ import annotations

import os
import re

# what a service puts in front of its tokens, and the two places of an address that hold one
_TOKEN = re.compile(
    r"""\b(?: hf_[A-Za-z0-9]{30,} | api_org_[A-Za-z0-9]{30,}    # Hugging Face
      | sk-(?:proj|svcacct|admin|ant)-[\w-]{20,}               # OpenAI, Anthropic; sk-SK-something is a name
      | sk-(?:or-v1-)?(?=[A-Za-z]*[0-9])[A-Za-z0-9]{32,}
      | xox[abeoprs]-[0-9][A-Za-z0-9-]{9,}                     # Slack
      | gh[pousr]_[A-Za-z0-9]{30,} | github_pat_\w{30,} | glpat-[\w-]{20,}
      | (?:AKIA|ASIA)[A-Z0-9]{16}\b | AIza[\w-]{30,}           # AWS, Google
      | eyJ[\w-]{8,}\.eyJ[\w-]{8,}(?:\.[\w-]+)? )
      | -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----
      | (?<=://)[^\s/@:]*:[^\s/@]+(?=@)
      | (?i:(?<=[?&])(?:[a-z_-]*(?:token|signature|credential|api_?key|secret|password)|sig)=[^\s&#'"<>]+)""",
    re.VERBOSE,
)
_NAME = re.compile(
    r"(?:^|[_.\W])(?:token|secret|passw(?:or)?d|passphrase|credentials?|auth|(?:api|access|secret|private)[_-]?key"
    r"|(?:access|secret)[_-]?key[_-]?id)$",
    re.IGNORECASE,
)


def is_secret(text):
    """True if a token, or an address with a password, stands in `text`."""
    return _TOKEN.search(text) is not None


def names_secret(name):
    """True if what is called `name` (of a field or an environment variable) is a token or a password."""
    return _NAME.search(name) is not None


def redacted(text):
    """Return `text` with *** for what looks like a secret, and for the values of the environment's variables so named."""
    values = (value.strip() for name, value in os.environ.items() if names_secret(name))
    ours = {value for value in values if not _is_ordinary(value)}
    for value in sorted(ours, key=len, reverse=True):
        text = text.replace(value, "***")
    return _TOKEN.sub("***", text)


def _is_ordinary(value):
    """True for what messages have to say all the same: something short, a word (PASSWORD=training), the path of a file."""
    word = len(value) < 16 and value.isalpha() and value[1:].islower()
    return len(value) < 8 or word or os.path.exists(value)  # noqa: PTH110 (a Path of 300 letters raises)
