"""Files -> a repository on the Hugging Face hub, in one commit: all of them or none. Nothing is sent that is not listed."""

from __future__ import annotations

from pathlib import Path

from .errors import InputError
from .secrets import is_secret

_TEXT_BYTES = 64 * 2**20  # larger files are weights
_OWN = {".gitattributes"}  # which the hub puts into a new repository


def token():
    """Return the token of the environment or of the hub login; raises InputError where there is none."""
    from huggingface_hub import get_token

    found = get_token()
    if found is None:
        raise InputError("no token for the hub; run `hf auth login`, or set HF_TOKEN in the environment")
    return found


def refuse_name(repo):
    """Raise InputError unless `repo` can be the name of a repository: NAME or OWNER/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"{repo!r} is not OWNER/NAME: {' '.join(str(error).split())}") from None


def refuse_secrets(files):
    """Raise InputError where one of the files holds a token or a password. files: as `send` takes them."""
    from huggingface_hub import get_token

    own = get_token()
    for name, content in files.items():
        if isinstance(content, Path) and content.stat().st_size > _TEXT_BYTES:
            continue
        data = content.read_bytes() if isinstance(content, Path) else content
        text = data.decode(errors="replace")
        if is_secret(text) or (own and own in text):
            raise InputError(
                f"{name} contains a token or a password; remove it, and make a new one if others have seen it"
            )


def num_bytes(content):
    return content.stat().st_size if isinstance(content, Path) else len(content)


def send(files, repo, public, message):
    """Put `files` into model repository `repo`, which is made if it is not there; return (its address, the commit).

    files: {name: path or bytes}. public: who may see a new repository; one that is there has to be so already.

    Raises:
        InputError: the hub cannot be reached or refuses, or the repository holds something else; says what to do.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    api, asked = HfApi(token=token(), library_name="qlora"), repo
    try:
        try:
            repo = api.create_repo(repo, private=not public, exist_ok=False).repo_id
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            repo = repo if "/" in repo else f"{api.whoami()['name']}/{repo}"
            _refuse_used(api.model_info(repo), files, public)
        operations = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in sorted(files.items())
        ]
        commit = api.create_commit(repo, operations, commit_message=message)
    except HfHubHTTPError as error:
        raise InputError(_refusal(asked, error)) from None
    except OfflineModeIsEnabled:
        raise InputError("HF_HUB_OFFLINE is set, and a push needs the network; unset it") from None
    except (HTTPError, ConnectionError, RuntimeError) as error:  # RuntimeError: around any other, where a file is sent
        if isinstance(error.__cause__, HfHubHTTPError):
            raise InputError(_refusal(asked, error.__cause__)) from None
        reason = next(iter(str(error.__cause__ or error).splitlines()), "") or type(error).__name__
        raise InputError(f"the hub at {api.endpoint} cannot be reached: {reason}; try again later") from None
    return f"{api.endpoint}/{repo}", commit.oid


def _refuse_used(info, files, public):
    if info.private is not None and info.private == public:
        found, remedy = ("private", "leave --public out") if info.private else ("public", "add --public")
        raise InputError(
            f"{info.id} already exists and is {found}; {remedy}, change that on the hub, or choose another name"
        )
    others = sorted({sibling.rfilename for sibling in info.siblings or ()} - files.keys() - _OWN)
    if others:
        listed = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        raise InputError(f"{info.id} contains files that are not part of this push ({listed}); choose another name")


def _refusal(repo, error):
    status, said = error.response.status_code, error.server_message or next(iter(str(error).splitlines()), "")
    remedy = {
        401: "the token is not valid; run `hf auth login` again",
        403: "the token has no write access there; create one that has, or choose another owner",
        404: "no such owner or repository, or the token has no access to it; choose another name",
        409: "the name is taken by something else; choose another name",
        413: "a file is too large for the hub",
        429: "too many requests; try again later",
    }.get(status, "try again later" if status >= 500 else "see what it says")
    return f"the hub refuses {repo} ({status}: {said}); {remedy}"
