"""What a library says of a model folder, as one line of a message."""

from __future__ import annotations


def said(error):
    """Return what a library says of a file in a model folder, in one line."""
    text = str(error).strip()
    if "trust_remote_code" in text:
        return (
            "it needs code that comes with the model, which is not run; if you have read that code and trust it, set "
            "model.trust_remote_code=true"
        )
    lines = [line.strip() for line in text.splitlines()]
    if not lines or isinstance(error, (KeyError, AttributeError, ZeroDivisionError, RecursionError)):
        return f"a required setting is missing or wrong ({type(error).__name__}: {text})"
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
