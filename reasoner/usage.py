"""What is printed for `--help`: one table of the verbs, their forms and keys. Left out: the settings of a conf, which
`conf=NAME --cfg job` prints."""

from collections.abc import Sequence
from dataclasses import dataclass

PROGRAM = "python -m reasoner"
HEAD = f"usage: {PROGRAM} ..."


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb's forms, each with what it does; the keys that are its own; and the page that tells more."""

    forms: tuple[tuple[str, str], ...]
    keys: tuple[tuple[str, str], ...] = ()
    page: str = "README.md"


RUN = ("run=FOLDER", "a run's folder; a folder of runs (outputs/tiny) means the newest in it")
CHECKPOINT = ("checkpoint=NAME", "base, export, best, last, or a folder of the run's checkpoints/")
VERBS = {
    "train": Verb(
        (
            ("[train] conf=NAME [key=value ...]", "the run that the conf describes"),
            ("resume=RUN_FOLDER [key=value ...]", "go on with a run that stopped"),
        ),
        (
            ("conf=NAME", "a conf of the list, one in ./conf, or a path to a .yaml file"),
            ("key=value", "change a setting: grpo.steps=50 model=smol loss=gspo reward=my_reward.py:score"),
            ("--cfg job", "print every setting with what set it, and stop"),
            ("--multirun", "one run, each in a process of its own, for every value of key=a,b"),
            ("--version", "print the version"),
        ),
    ),
    "reward": Verb(
        (
            ("reward conf=NAME [key=value ...]", "try its rewards on its rows; loads no model"),
            ("reward conf=NAME --sample", "try them on what its model says now"),
            ("reward run=RUN_FOLDER [key=value ...]", "score what a run said again; loads no model"),
        ),
        (
            RUN,
            ("reward=GROUP|FILE:FUNCTION", "other rewards in the place of the run's; reward.parts.NAME... changes one"),
        ),
        "docs/rewards.md",
    ),
    "data": Verb(
        (("data conf=NAME [key=value ...]", "show its rows as the model will see them; loads no model"),),
        page="docs/data.md",
    ),
    "report": Verb(
        (("report run=RUN_FOLDER [run=OTHER ...] [to=FILE.html]", "write its report, or compare runs"),),
        (RUN, ("to=FILE.html", "another file than report.html in the run's folder")),
        "docs/report.md",
    ),
    "eval": Verb(
        (
            ("eval run=RUN_FOLDER [key=value ...]", "measure it: checkpoints=all sets=math500 by=level"),
            ("eval run=A run=B", "compare what two runs kept; loads no model"),
            ("eval conf=NAME [model=NAME]", "measure a model: a folder, a hub id or a group of conf/model"),
        ),
        (
            RUN,
            ("checkpoints=A,B", "which weights: base, export, best, last, all, or folders of the run's checkpoints/"),
            ("rows=A,B", "rows of eval.json to compare, from the files; no model"),
            ("sets=A,B", "sets of the conf, of conf/sets, or heldout"),
            ("by=COLUMN,...", "a table for each value of a column"),
            ("k=1,4,8", "of pass@k and maj@k"),
            ("out=FOLDER", "where the results go, else evals/ in the run's folder"),
        ),
        "docs/evaluate.md",
    ),
    "chat": Verb(
        (("chat run=RUN_FOLDER [key=value ...]", "talk to what it trained"),),
        (
            RUN,
            CHECKPOINT,
            ("temperature=0", "0: the likeliest token each time"),
            ("max_tokens=N", "of an answer, else what the run evaluates with"),
        ),
        "docs/chat.md",
    ),
    "serve": Verb(
        (("serve run=RUN_FOLDER [port=8000]", "answer OpenAI's API on this machine, through vLLM"),),
        (
            RUN,
            ("port=8000, host=127.0.0.1", "where it listens"),
            ("name=NAME", "the model's name in requests, else the conf's"),
            ("--OPTION=VALUE", "handed to vllm serve as it is"),
        ),
        "docs/serve.md",
    ),
    "init": Verb(
        (("init [DIR]", "write a conf, a reward and ten rows to begin with"),),
        page="docs/first_run.md",
    ),
    "export": Verb(
        (
            (
                "export run=RUN_FOLDER to=adapter|merged|gguf|ollama|hub",
                "what it trained as files for other programs, checked",
            ),
        ),
        (
            RUN,
            (
                "to=adapter|merged|gguf|ollama|hub",
                "peft's layout, a whole model, llama.cpp's file, with a Modelfile, a push to the hub",
            ),
            CHECKPOINT,
            ("quant=q4_k_m|q8_0|f16", "of gguf and ollama"),
            ("dtype=auto|bfloat16|float32", "of merged"),
            ("base=trained|original", "merge into the base that was trained, or as it was before NF4"),
            ("repo=NAME, private=true", "of hub: where to, and seen by whom"),
            ("what=adapter|merged|gguf", "of hub: which artefact"),
            ("verify=false, problems=100", "leave out the check; held-out problems that it answers"),
            ("out=FOLDER", "an empty folder, else exports/ in the run's"),
        ),
        "docs/export.md",
    ),
}


def general() -> str:
    """All forms, and what holds for training: the help of the program."""
    forms = [form for verb in VERBS.values() for form in verb.forms]
    return (
        f"{HEAD}\n{_table(forms)}\n\n{_table(VERBS['train'].keys)}\n\n{PROGRAM} VERB --help says more about one of them"
    )


def of(verb: str) -> str:
    """The help of one verb."""
    told = VERBS[verb]
    keys = f"\n\n{_table(told.keys)}" if told.keys else ""
    return f"{HEAD}\n{_table(told.forms)}{keys}\n\nmore: {told.page}"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(left) for left, _ in rows)
    return "\n".join(f"  {left:{width}}  {what}" for left, what in rows)
