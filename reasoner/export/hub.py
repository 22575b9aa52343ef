"""to=hub: an artefact that passed its proof, pushed with a card written from the run. Private unless told otherwise.

What can't be pushed stays in its folder, and the same command goes on from there. Left out: pull requests, tags,
organisations' settings.
"""

import json
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx, validate_repo_id

from reasoner.disk import replace as replace_file
from reasoner.errors import ConfigError, RunFolderError
from reasoner.export import card
from reasoner.export.request import REPORT, Request
from reasoner.models.sources import first_line

CARD = "README.md"


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
    """The artefact's address. Raises RunFolderError where the hub refuses or can't be reached, with what to do."""
    repo, out = str(request.repo), request.out
    told: dict[str, Any] = json.loads((out / REPORT).read_text(encoding="utf-8"))
    replace_file(out / CARD, card.write(request.run, told, repo).encode())
    api = HfApi()
    try:
        found = api.create_repo(repo, private=request.private, exist_ok=True)
        if request.private and not api.model_info(found.repo_id).private:
            raise ConfigError(
                f"{found.repo_id} is there already and public: private=false pushes to it, repo=OTHER to another; "
                f"the artefact is in {out}"
            )
        # export.json names folders of this machine; the card has its numbers.
        api.upload_folder(
            repo_id=found.repo_id,
            folder_path=out,
            commit_message=f"{told['weights']} of a run of reasoner",
            ignore_patterns=[REPORT],
        )
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise RunFolderError(
            f"the hub did not take {repo}: {first_line(error)}; the artefact is kept in {out}, and the same command "
            "pushes it from there"
        ) from None
    return str(found)
