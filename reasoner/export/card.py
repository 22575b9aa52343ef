"""The model card that goes to the hub, written from the run's own files: data, rewards, settings, what was measured
before and after, the export's proof, versions, and the base's licence where it says one.

Known secrets are left out, and so are the paths of this machine: of a file its name is told.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx

from reasoner.export.proof import sentence
from reasoner.export.request import ADAPTER, MERGED
from reasoner.redact import Redactor
from reasoner.results import Results
from reasoner.run_folder import EVAL, EVAL_PROBLEMS, read_config, read_rows

SECTIONS = ("seed", "stages", "model", "data", "reward", "sft", "grpo")
LIBRARIES = {ADAPTER: "peft", MERGED: "transformers"}
UNKNOWN = "Not known here. The base's licence is the base's; see where it came from."


def write(run: Path, told: Mapping[str, Any], repo: str) -> str:
    """The card of an artefact of `run`, whose export.json says `told`, as Markdown."""
    config = _shown(read_config(run))
    base = _base(config["model"])
    licence = licence_of(base)
    source = _source(config)
    data = ModelCardData(
        base_model=base,
        base_model_relation="adapter" if told["to"] == ADAPTER else "finetune",
        library_name=LIBRARIES.get(told["to"], "gguf"),
        license=licence,
        datasets=[str(source)] if source == config["data"]["name"] and _is_id(source) else None,
        pipeline_tag="text-generation",
        tags=["reasoner", *(stage for stage in ("sft", "grpo") if stage in config["stages"])],
    )
    if base is None:
        data.base_model_relation = None  # pyright: ignore[reportAttributeAccessIssue]
    parts = [f"---\n{data.to_yaml().strip()}\n---", *_parts(run, config, told, repo, base, licence)]
    return Redactor.from_environment().text("\n\n".join(parts) + "\n")


def _parts(
    run: Path, config: Mapping[str, Any], told: Mapping[str, Any], repo: str, base: str | None, licence: str | None
) -> Iterator[str]:
    stages = [stage.upper() for stage in config["stages"] if stage in ("sft", "grpo")]
    origin = f"[{base}](https://huggingface.co/{base})" if base else f"`{config['model']['name']}`"
    kind = {ADAPTER: "A LoRA adapter for", MERGED: "Made from"}.get(
        told["to"], f"A GGUF file ({told.get('quant')}) made from"
    )
    yield f"# {repo.rpartition('/')[2]}"
    yield f"{kind} {origin}, by {' and then '.join(stages)} with `reasoner`. Weights: `{told['weights']}` of the run."
    yield "## Measured\n\n" + _measured(run)
    yield "## This artefact\n\n" + _proof(told)
    rewards = [f"- `{name}`: `{_reward(part)}`, weight {part['weight']:g}" for name, part in _rewards(config)]
    yield "## Rewards\n\n" + "\n".join(rewards)
    prompt = f"prompt `{config['data']['prompt']}`"
    yield f"## Data\n\n`{_source(config)}`, {prompt}; what `sft.data` and `grpo.data` change is under Settings."
    settings = {name: config[name] for name in SECTIONS if name in config}
    yield "## Settings\n\n```yaml\n" + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip() + "\n```"
    yield "## Versions\n\n" + ", ".join(f"{name} {number}" for name, number in told["versions"].items())
    yield f"## Licence\n\n{f'`{licence}`, as the base.' if licence else UNKNOWN}"


def _source(config: Mapping[str, Any]) -> str | None:
    """Where the rows came from; `data.path` comes before `data.name`, which a conf may still have."""
    return config["data"]["path"] or config["data"]["name"]


def _measured(run: Path) -> str:
    """Before and after, as the run's own table and sentences have it."""
    rows = json.loads((run / EVAL).read_text(encoding="utf-8")) if (run / EVAL).is_file() else []
    if not rows:
        return "This run evaluated nothing."
    lines = list(read_rows(run / EVAL_PROBLEMS))
    cells = [
        f"| {row['row']} | {row['set']} | {row['problems']:,} | {row['greedy_accuracy']:.1%} | "
        f"{row['greedy_low']:.1%} to {row['greedy_high']:.1%} |"
        for row in rows
        if "step" not in row
    ]
    table = "\n".join(("| row | set | problems | greedy | 95% |", "|---|---|---|---|---|", *cells))
    said = "\n".join(f"- {line}" for line in Results.from_files(rows, lines).sentences())
    return f"{table}\n\n{said}".strip()


def _proof(told: Mapping[str, Any]) -> str:
    reader = told["loader"]
    limit = "no limit" if told["limit"] is None else f"the limit is {told['limit']:.2g} nats"
    return f"Loaded again by {reader} and compared with the policy that was trained: {sentence(told)} ({limit})."


def _rewards(config: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return list(config["reward"]["parts"].items())


def _reward(part: Mapping[str, Any]) -> str:
    return str(part.get("fn") or part.get("_target_"))


def _shown(value: Any) -> Any:
    """Without the folders of this machine."""
    if isinstance(value, Mapping):
        return {key: _shown(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_shown(inner) for inner in value]
    if isinstance(value, str) and PurePath(value.partition(":")[0]).is_absolute() and "\n" not in value:
        return PurePath(value).name
    return value


def _is_id(name: Any) -> bool:
    """Whether a name is one of the hub's."""
    parts = str(name or "").split("/")
    return len(parts) == 2 and all(parts) and parts[0] != "reasoning_gym" and not Path(str(name)).exists()


def _base(model: Mapping[str, Any]) -> str | None:
    return model["name"] if not model.get("scratch") and _is_id(model["name"]) else None


def licence_of(base: str | None) -> str | None:
    """What the base's own card says; None where it has none or can't be reached."""
    if base is None:
        return None
    try:
        return ModelCard.load(base).data.get("license")
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError):
        return None
