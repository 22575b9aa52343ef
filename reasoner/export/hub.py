"""to=hub: an artefact that passed its proof, pushed with a card written from the run. Private unless told otherwise.

What can't be pushed stays in its folder, and the same command goes on from there. Left out: pull requests, tags,
organisations' settings.
"""

import json
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx, validate_repo_id

from reasoner.disk import replace as replace_file
from reasoner.errors import ConfigError, RunFolderError
from reasoner.export import card
from reasoner.export.request import REPORT, Request, read_report
from reasoner.models.sources import first_line

CARD, ADAPTER_SETTINGS = "README.md", "adapter_config.json"


def check(request: Request) -> None:
    """Raises ConfigError where there is no token or the name is none, before anything is exported."""
    assert request.repo is not None
    try:
        validate_repo_id(request.repo)
    except HFValidationError as error:
        raise ConfigError(f"repo={request.repo}: {first_line(error)}") from None
    if not get_token():
        raise ConfigError("to=hub needs a token that may write: set HF_TOKEN, or log in with `hf auth login`")


def push(request: Request) -> str:
    """The artefact's address, and who may see it. Raises RunFolderError where the hub refuses or can't be reached, with
    what to do."""
    repo, out = str(request.repo), request.out
    told = read_report(out)
    replace_file(out / CARD, card.write(request.run, told, repo).encode())
    api = HfApi()
    try:
        found = api.create_repo(repo, private=request.private, exist_ok=True)
        private = bool(api.model_info(found.repo_id).private)
        if request.private and not private:
            raise ConfigError(
                f"{found.repo_id} is there already and public: private=false pushes to it, repo=OTHER to another; "
                f"the artefact is in {out}"
            )
        api.create_commit(found.repo_id, _files(out), commit_message=f"{told['weights']} of a run of reasoner")
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise RunFolderError(
            f"the hub did not take {repo}: {first_line(error)}; the artefact is kept in {out}, and the same command "
            "pushes it from there"
        ) from None
    kept = "private, as it was" if private and not request.private else "private" if private else "for all to see"
    return f"{found}, {kept}"


def _files(out: Path) -> list[CommitOperationAdd]:
    """What is pushed: all but export.json, which names folders of this machine; the card has its numbers."""
    paths = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name != REPORT]
    return [CommitOperationAdd(path.relative_to(out).as_posix(), _content(path)) for path in paths]


def _content(path: Path) -> str | bytes:
    """The file, or the bytes of an adapter's settings with a local base's name in place of its path."""
    if path.name == ADAPTER_SETTINGS:
        settings = json.loads(path.read_text(encoding="utf-8"))
        base = Path(settings.get("base_model_name_or_path") or "")
        if base.is_absolute():
            return json.dumps({**settings, "base_model_name_or_path": base.name}, indent=2).encode()
    return str(path)
