"""Everything the page says, as plain values: of each run, and of runs against one another."""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from reasoner.compose import leaves
from reasoner.console import duration
from reasoner.evaluate import SetResult
from reasoner.metrics import NAMES
from reasoner.report.chosen import Chosen, choose
from reasoner.report.curves import curves
from reasoner.report.flags import flags
from reasoner.report.source import Row, Source
from reasoner.report.verdict import change, comparison, headline, problems, within

BUDGET = 2_300_000  # bytes of the page for texts and numbers, over all runs; with the page's own code it stays < 3 MB
FOR_COMPLETIONS, FOR_PROBLEMS = 0.6, 0.2  # of it; curves take what is left
EXPORT = "export"  # the row of the artefact: the same weights as the row before it
TIME_PARTS = {
    "generate_s": "sampling",
    "reward_s": "scoring",
    "logprobs_s": "old and reference logprobs",
    "update_s": "forward, backward, optimizer",
    "sync_s": "weights to the engine",
}


def content(sources: Sequence[Source]) -> dict[str, Any]:
    """What the page holds of one run, or of several with the first as the one that the others are compared to."""
    share = BUDGET / len(sources)
    runs = [run_content(source, share) for source in sources]
    against = [compared(sources[0], other, share) for other in sources[1:]]
    return {"runs": runs, "against": against, "names": {k: dict(v) for k, v in NAMES.items()}, "made": _now()}


def run_content(source: Source, budget: float) -> dict[str, Any]:
    """One run's part."""
    measured = [(row, sets) for row, sets in source.results.evaluations if row != EXPORT]
    changes = _changes(measured)
    main = next(iter(measured[-1][1]), "") if measured else ""
    of_main = [found for found in changes if found["set"] == main]
    whole = next((found for found in of_main if found["whole"]), None)
    chosen = choose(source.completions, round(budget * FOR_COMPLETIONS))
    practice = next((found for found in of_main if found["after"] == "grpo" and not found["whole"]), None)
    grpo = source.steps("grpo")
    summary = source.summary
    return {
        "name": source.name,
        "title": source.config.get("name") or source.name,
        "model": source.config.get("model", {}).get("name"),
        "status": summary.get("status", "not finished"),
        "ended_by": summary.get("ended_by"),
        "headline": headline(whole),
        "facts": _facts(source),
        "evaluations": _evaluations(source),
        "changes": changes,
        "flags": [
            *_flags(source, grpo, chosen, practice or (whole if len(of_main) == 1 else None)),
            *_remarks(source),
        ],
        "curves": {stage: curves(source.steps(stage)) for stage in NAMES},
        "completions": _completions(chosen),
        "problems": _problems(measured, main, source, budget * FOR_PROBLEMS),
        "time": _time(source),
        "memory": dict(summary.get("memory_parts") or {}),
        "config": [[key, _said(value)] for key, value in leaves(source.config)],
        "versions": dict(summary.get("versions") or {}),
        "notes": list(summary.get("notes") or []),
    }


def _flags(
    source: Source, grpo: Sequence[Row], chosen: Chosen, accuracy: Mapping[str, Any] | None
) -> list[dict[str, str]]:
    if not grpo:
        return []
    settings = dict(leaves(source.config))
    weights = {
        match[1]: float(weight)
        for key, weight in settings.items()
        if (match := re.fullmatch(r"reward\.parts\.(.+)\.weight", key)) and isinstance(weight, int | float)
    }
    right = settings.get("evaluate.accuracy") or ("accuracy" if "accuracy" in weights else next(iter(weights), None))
    return flags(grpo, chosen.read, accuracy=accuracy, weights=weights, right=right)


def _remarks(source: Source) -> list[dict[str, str]]:
    """What the closing table warns of or notes."""
    titles = {"warning": "The evaluations warn", "note": "How to read the score"}
    said = [line.split(": ", 1) for line in source.results.sentences()]
    return [
        {
            "tone": "bad" if kind == "warning" else "note",
            "title": titles[kind],
            "text": text[0].upper() + text[1:] + ".",
        }
        for kind, text in said
        if kind in titles
    ]


def compared(first: Source, other: Source, budget: float) -> dict[str, Any]:
    """`other` against `first`: accuracy on the same problems, those gained and lost, and the settings that differ."""
    ends = [source.results.evaluations[-1] if source.results.evaluations else None for source in (first, other)]
    found: list[dict[str, Any]] = []
    moved: dict[str, Any] = {}
    if ends[0] and ends[1]:
        for name, new in ends[1][1].items():
            old = ends[0][1].get(name)
            one = change(first.name, other.name, old, new) if old else None
            if old and one:
                found.append(one)
                moved = moved or problems(first.name, other.name, old, new, {**first.asked, **other.asked})
    if moved:
        moved["items"] = within(round(budget * FOR_PROBLEMS / 2), moved["items"])
    settings = [dict(leaves(source.config)) for source in (first, other)]
    keys = [key for key in dict.fromkeys((*settings[0], *settings[1])) if key not in ("out", "resume.dir", "name")]
    absent = object()
    return {
        "name": other.name,
        "headline": comparison(found[0] if found else None),
        "changes": found,
        "problems": moved,
        "settings": [
            [key, *(_said(side.get(key, "-")) for side in settings)]
            for key in keys
            if settings[0].get(key, absent) != settings[1].get(key, absent)
        ],
    }


def _changes(measured: Sequence[tuple[str, Mapping[str, SetResult]]]) -> list[dict[str, Any]]:
    """From the first row to the last (`whole`), then each to the next where there are more than two."""
    pairs = [(measured[0], measured[-1], True)] if len(measured) > 1 else []
    if len(measured) > 2:
        pairs += [(a, b, False) for a, b in pairwise(measured)]
    found = []
    for (before, old), (after, new), whole in pairs:
        for name in new:
            one = change(before, after, old[name], new[name]) if name in old else None
            if one:
                found.append({**one, "whole": whole})
    return found


def _facts(source: Source) -> list[list[str]]:
    """What ran, where and for how long, as label and value."""
    summary, config = source.summary, source.config
    model = config.get("model", {})
    revision = summary.get("model_revision")
    seconds, peak = summary.get("seconds"), summary.get("peak_gib")
    facts = [
        ("model", f"{model.get('name')}{f' at {revision[:10]}' if revision else ''}"),
        ("training", "full weights" if not model.get("lora") else f"LoRA, rank {model['lora'].get('rank', '?')}"),
        ("time", duration(seconds) if seconds is not None else None),
        ("peak memory", f"{peak:.2f} GiB" if peak is not None else None),
        ("card", summary.get("card") or ("CPU" if summary else None)),
        ("seed", config.get("seed")),
        ("commit", (summary.get("commit") or "")[:10] or None),
    ]
    return [[label, str(value)] for label, value in facts if value is not None]


def _evaluations(source: Source) -> list[dict[str, Any]]:
    """The rows of eval.json, each with the policy's step it was measured at."""
    return [{**row, "policy_step": _policy_step(source, row)} for row in source.results.rows]


def _policy_step(source: Source, row: Row) -> int:
    upto = (row["stage_index"], row.get("step", 0))
    return max((one["policy_step"] for one in source.metrics if (one["stage_index"], one["step"]) <= upto), default=0)


def _completions(chosen: Chosen) -> dict[str, Any]:
    """The completions with each prompt once, and by number in their rows."""
    prompts: dict[tuple[str, str, str], int] = {}

    def slim(row: Row) -> Row:
        asked = prompts.setdefault((row["id"], row["prompt"], row["answer"]), len(prompts))
        return {key: value for key, value in row.items() if key not in ("id", "prompt", "answer")} | {"asked": asked}

    items = [slim(row) for row in chosen.shown]
    pairs = [
        {**pair, "early": [slim(row) for row in pair["early"]], "late": [slim(row) for row in pair["late"]]}
        for pair in chosen.pairs
    ]
    return {
        "total": chosen.total,
        "all_steps": chosen.all_steps,
        "read_steps": len(chosen.steps),
        "items": items,
        "pairs": pairs,
        "prompts": [{"id": name, "text": text, "answer": answer} for name, text, answer in prompts],
    }


def _problems(
    measured: Sequence[tuple[str, Mapping[str, SetResult]]], main: str, source: Source, budget: float
) -> list[dict[str, Any]]:
    if len(measured) < 2:
        return []
    (before, old), (after, new) = measured[0], measured[-1]
    names = [name for name in new if name in old]
    found = [problems(before, after, old[name], new[name], source.asked) for name in (main, *names) if name in names]
    unique = list({one["set"]: one for one in found}.values())
    return [{**one, "items": within(round(budget / len(unique)), one["items"])} for one in unique]


def _time(source: Source) -> dict[str, Any]:
    """Seconds by stage, and of the GRPO steps by part."""
    rows = source.steps("grpo")
    parts = {said: sum(row.get(name) or 0.0 for row in rows) for name, said in TIME_PARTS.items()}
    whole = sum(row.get("step_s") or 0.0 for row in rows)
    if rows:
        parts["other"] = max(0.0, whole - sum(parts.values()))
    stages = [[row["stage"], row["seconds"]] for row in source.summary.get("stages", [])]
    total = source.summary.get("seconds")
    if total is not None and stages:
        stages.append(["loading and closing", max(0.0, total - sum(seconds for _, seconds in stages))])
    return {"stages": stages, "parts": [[name, seconds] for name, seconds in parts.items() if seconds > 0]}


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="minutes")
