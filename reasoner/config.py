"""The schema of every closed setting, with its unit and legal range, and `build` for the open ones (`_target_` nodes).

Finding and composing the YAML is compose.py's part; here a plain mapping becomes a checked, frozen `Config`. Nothing
is set behind the
user's back: a value that can't be honoured is a ConfigError, never an override.
"""

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import field, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from reasoner.errors import ConfigError, MissingExtra

STRICT = ConfigDict(extra="forbid")
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Stage = Literal["evaluate", "sft", "grpo", "export"]
T = TypeVar("T")
Node = dict[str, Any]  # an open `_target_` node, made by build()

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
REFUSED_KEYS = {
    f"rollout.{key}": "training samples from the policy's own distribution: top-p, top-k, min-p and penalties "
    "would hide tokens from the trainer and bias every importance ratio. Remove the key; rollout.temperature is the "
    "only one"
    for key in ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
}


@dataclass(frozen=True, config=STRICT)
class Lora:
    """LoRA, arXiv:2106.09685: W x + (alpha / r) B A x; alpha / sqrt(r) with rslora."""

    r: PositiveInt = 32
    alpha: PositiveFloat = 64
    targets: tuple[str, ...] = PROJECTIONS
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # SFT only; GRPO runs without
    rslora: bool = False


@dataclass(frozen=True, config=STRICT)
class Gguf:
    """Weights from a GGUF file: a path, or a name looked up in ./.models and then in the folder of an installed
    package."""

    file: str
    package: str | None = None


@dataclass(frozen=True, config=STRICT)
class Scratch:
    """A small Llama made from random numbers, with a tokenizer of one token a character of `characters`."""

    characters: str
    hidden_size: PositiveInt = 128
    intermediate_size: PositiveInt = 512
    layers: PositiveInt = 4
    heads: PositiveInt = 4
    kv_heads: PositiveInt = 4


@dataclass(frozen=True, config=STRICT)
class Model:
    name: str  # hub id or local folder; only a label with `gguf` or `scratch`
    revision: str | None = None
    gguf: Gguf | None = None
    scratch: Scratch | None = None
    quantize: Literal["none", "nf4"] = "none"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 for a frozen base on CUDA, else float32
    lora: Lora | None = None  # none: every weight is trained
    max_context: PositiveInt | None = None  # tokens; none: what the model was made for
    eos_token: str | None = None  # where the tokenizer's own is wrong
    pad_token: str | None = None
    # true: layers keep their inputs alone and run again in the backward; offload: and those on the host; auto: as much
    # of that as the worst micro-batch needs to fit
    gradient_checkpointing: bool | Literal["auto", "offload"] = False


@dataclass(frozen=True, config=STRICT)
class Data:
    """Where rows come from and how they become prompts. `sft.data`, `grpo.data` and `evaluate.sets.NAME` say only
    what differs."""

    path: str | None = None  # a file, a folder or a pattern (rows/*.jsonl); comes before `name`
    sheet: str | None = None  # of an Excel file; none: the only one that holds rows
    name: str | None = None  # a hub dataset, reasoning_gym/TASK or reasoning_gym/mixture
    subset: str | None = None  # the hub's "config"
    split: str | None = None
    revision: str | None = None
    streaming: bool = False  # hub: read the first `limit` rows without downloading the others
    options: Node = field(default_factory=dict)  # reasoning_gym: the task's own settings
    size: PositiveInt | None = None  # reasoning_gym: rows drawn before duplicates go
    limit: PositiveInt | None = None  # at most so many rows, the first ones
    map: str | None = None  # file.py:function or module:function, row -> row, or None to drop it
    prompt: str = "{question}"  # columns in braces
    completion: str | None = None  # SFT target; none: the answer
    answer: str = "{answer}"
    answer_pattern: str | None = (
        None  # regular expression whose first group is the answer, or `boxed`: the last \boxed{}
    )
    answer_kind: Literal["number", "latex", "choice", "text"] = "number"
    strip_calculator_marks: bool = True  # GSM8K's <<48/2=24>>
    system: str | None = None
    template: str = "model"  # model (the tokenizer's own), plain, chatml, or a .jinja file
    date: str = "26 Jul 2024"  # the date that a template prints; fixed, so that prompts don't change at midnight
    heldout: Annotated[float, Field(ge=0, allow_inf_nan=False)] = (
        0.1  # rows (>= 1) or a share (< 1) kept for the set `heldout`
    )
    validation: Annotated[float, Field(ge=0, allow_inf_nan=False)] = (
        0  # rows (or a share) of grpo's that only choose its best checkpoint
    )
    overlap: Literal["exact", "ngrams", "masked", "off"] = "exact"
    max_prompt_tokens: PositiveInt = 512
    seed: int = 0  # draws generated rows and the held-out split; apart from the run's seed, so that runs compare


@dataclass(frozen=True, config=STRICT)
class RewardPart:
    """One named reward. `fn` is file.py:function, module:function or a name of reasoner.rewards; other keys go to the
    function."""

    fn: str
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    timeout_s: PositiveFloat = 5.0
    options: Node = field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class Reward:
    parts: dict[str, RewardPart]
    workers: Annotated[int, Field(ge=0)] = 0  # processes; 0: one a core, at most 8
    max_failed_share: Share = 0.2  # of a step's completions; above it the run stops


@dataclass(frozen=True, config=STRICT)
class Optim:
    lr: PositiveFloat = 1e-5
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    decay: Literal["constant", "linear", "cosine"] = "constant"
    max_grad_norm: PositiveFloat = 0.5
    optimizer: Node = field(
        default_factory=lambda: {"_target_": "torch.optim.AdamW", "betas": [0.9, 0.99], "weight_decay": 0.0}
    )


@dataclass(frozen=True, config=STRICT)
class Sft:
    steps: PositiveInt = 100
    examples_per_step: PositiveInt = 32
    tokens_per_micro_batch: PositiveInt = 4096
    max_completion_tokens: PositiveInt = 512  # longer worked examples are dropped and counted, never cut
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-4))
    data: Node = field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class Grpo:
    loss: Node
    steps: PositiveInt = 250
    prompts_per_step: PositiveInt = 32
    completions_per_prompt: PositiveInt = 8
    max_completion_tokens: PositiveInt = 512
    tokens_per_micro_batch: PositiveInt = 8192
    inner_steps: PositiveInt = 1  # optimizer steps on one set of samples
    resample: Annotated[int, Field(ge=0)] = 0  # rounds of fresh prompts for groups without signal, each at its price
    ledger: str | None = None  # a file of pass rates, kept across runs: solved and hopeless prompts are drawn less
    advantage: Literal["group", "leave_one_out", "opo"] = "group"
    advantage_scale: Literal["group", "batch", "none"] = "group"
    kl_coef: NonNegative = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k2"
    kl_in: Literal["loss", "reward"] = "loss"
    entropy_coef: NonNegative = 0.0
    mask_cut: bool = False  # completions that hit the limit: masked whole, and not counted
    mismatch: Literal["truncate", "mask", "off"] = "truncate"  # importance weight exp(old - sampling)
    mismatch_level: Literal["token", "sequence"] = "token"
    mismatch_cap: PositiveFloat = 2.0
    max_logprob_gap: PositiveFloat = 0.2  # mean |old - sampling| in nats above which the run stops
    show_every: PositiveInt = 10  # steps between printed samples
    eval_every: PositiveInt | None = None  # steps between evaluations; the best checkpoint of them is what GRPO gives
    eval_problems: PositiveInt | None = 256  # at most so many a set in these evaluations, the first ones
    optim: Optim = field(default_factory=Optim)
    data: Node = field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class Rollout:
    engine: Literal["auto", "vllm", "hf"] = "auto"  # auto: vllm where CUDA and vLLM are there, else hf; it says which
    temperature: PositiveFloat = 1.0
    max_sequences: PositiveInt = 256  # sampled at once
    max_batched_tokens: PositiveInt = 8192  # vllm: tokens in one step of the engine
    kv_gib: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None  # vllm: its cache; none: what is left
    keep_free_gib: NonNegative = 0.5  # vllm: of the GPU, left to the desktop and other programs
    # vllm: hold an NF4 base in 16 bits too while sampling, which is faster; auto: where the cache stays whole beside it
    dequantize: bool | Literal["auto"] = "auto"
    share_base: bool = True  # vllm: sample from the trainer's own base; false: the engine holds a second copy


@dataclass(frozen=True, config=STRICT)
class Evaluate:
    # none (null in a conf that builds on one with sets): the held-out rows of `data`, as the set `heldout`
    sets: Annotated[dict[str, Node], BeforeValidator(lambda sets: {} if sets is None else sets)] = field(
        default_factory=dict
    )
    problems: PositiveInt | None = None  # at most so many a set, the first ones
    samples: Annotated[int, Field(ge=0)] = 8  # a problem, for sampled accuracy and pass@k; 0: greedy only
    temperature: PositiveFloat = 1.0
    max_completion_tokens: PositiveInt | None = None  # none: grpo's
    accuracy: str | None = None  # the reward part that says right (1) or wrong; none: `accuracy`, else the first


@dataclass(frozen=True, config=STRICT)
class Checkpoint:
    every: PositiveInt = 50  # steps; the end of a stage and a signal save too
    keep: PositiveInt = 2  # whole checkpoints


@dataclass(frozen=True, config=STRICT)
class Resume:
    dir: str | None = None
    allow: tuple[str, ...] = ()  # keys that may differ from the run's own


@dataclass(frozen=True, config=STRICT)
class Config:
    name: str
    out: str
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    model: Model
    data: Data
    reward: Reward
    grpo: Grpo
    seed: Annotated[int, Field(ge=0)] = 0
    threads: PositiveInt | None = None  # of torch on the CPU; none: torch's own choice
    sft: Sft = field(default_factory=Sft)
    rollout: Rollout = field(default_factory=Rollout)
    evaluate: Evaluate = field(default_factory=Evaluate)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    resume: Resume = field(default_factory=Resume)
    tracking: tuple[Literal["wandb", "trackio", "tensorboard", "mlflow"], ...] = ()
    track_completions: bool = False  # send trackers the completions of every grpo.show_every-th step too


SECTIONS_LIKE_DATA = ("sft.data", "grpo.data", "evaluate.sets")


def validate(values: Mapping[str, Any]) -> Config:
    """A checked Config from a plain mapping. Raises ConfigError that names the key, its value, the rule and the
    nearest right key."""
    try:
        config = TypeAdapter(Config).validate_python(dict(values))
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None
    for where, node in [("data", {}), *_data_nodes(config)]:
        if "validation" in node and where != "grpo.data":
            raise ConfigError(f"{where}.validation chooses nothing: rows are kept to choose by as data.validation")
        rows = data_of(config, node, where).validation
        if rows >= 1 and rows % 1:
            raise ConfigError(f"{where}.validation={rows:g}: give a number of rows, or a share below 1")
    if not config.reward.parts:
        raise ConfigError("reward.parts is empty: name a reward, e.g. reward=my_reward.py:score or reward=math")
    part = config.evaluate.accuracy
    if part is not None and part not in config.reward.parts:
        raise ConfigError(
            f"evaluate.accuracy={part}: there is no such reward part{nearest(part, list(config.reward.parts))}"
        )
    return config


def data_of(config: Config, node: Mapping[str, Any], where: str) -> Data:
    """`data` with what a section says differently; `where` names the section in errors."""
    base = {f.name: getattr(config.data, f.name) for f in fields(config.data)}
    if "name" in node and "path" not in node:
        base["path"] = None
    return checked(Data, {**base, **node}, where)


def checked(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """The values of an open section as one of these dataclasses. Raises ConfigError as `validate` does, with `where`
    before the key.
    """
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        raise ConfigError(_explain(error, prefix=where, root=kind)) from None


def _data_nodes(config: Config) -> list[tuple[str, Mapping[str, Any]]]:
    sets = [(f"evaluate.sets.{name}", node) for name, node in config.evaluate.sets.items()]
    return [("sft.data", config.sft.data), ("grpo.data", config.grpo.data), *sets]


def _explain(error: ValidationError, prefix: str = "", root: type = Config) -> str:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join([prefix, *path] if prefix else path)
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        if key in REFUSED_KEYS:
            return f"{key}={first['input']!r} is refused: {REFUSED_KEYS[key]}"
        return f"unknown key '{key}'{nearest(path[-1], keys_of(root, path[:-1]))}"
    if first["type"] in ("missing", "missing_argument"):
        return f"the key '{key}' is missing: give it in the conf or as {key}=VALUE"
    return f"{key}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def keys_of(root: type, path: list[str]) -> list[str]:
    """The legal keys of the section that `path` leads to, [] where it is open."""
    section: Any = root
    for part in path:
        if not is_dataclass(section):
            return []
        kind = next((f.type for f in fields(section) if f.name == part), None)
        inner = [kind, *getattr(kind, "__args__", ())]
        section = next((k for k in inner if is_dataclass(k)), None) or section
    return [f.name for f in fields(section)] if is_dataclass(section) else []


def nearest(word: str, options: list[str]) -> str:
    """`: did you mean 'steps'?` or the list of options, to end a message with."""
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    if close:
        return f": did you mean '{close[0]}'?"
    return f"; there are: {', '.join(options)}" if options else ""


def build(node: Mapping[str, Any], **extra: Any) -> Any:
    """The object that a `_target_` node describes; a function becomes a partial of itself with the node's values.

    It gets plain lists and dicts, which OmegaConf's own are not: an optimizer keeps them in its state, for one.
    Raises ConfigError if the target can't be found or refuses a value, MissingExtra if its package isn't installed.
    """
    import hydra.utils
    from hydra.errors import InstantiationException

    target = str(node.get("_target_", ""))
    if not target:
        raise ConfigError(
            f"the node {dict(node)} has no _target_: name a class or function, e.g. _target_: reasoner.grpo.losses.Dapo"
        )
    try:
        found = hydra.utils.get_object(target)
    except Exception as error:  # hydra imports the module here: whatever it raises is the user's target being wrong
        missing = getattr(error.__cause__ or error, "name", None)
        if missing in EXTRAS:
            raise MissingExtra(missing, EXTRAS[missing], target) from None
        raise ConfigError(f"_target_: {target} can't be found: {error}".splitlines()[0]) from error
    partial = {"_partial_": True} if inspect.isfunction(found) else {}
    try:
        return hydra.utils.instantiate({"_convert_": "all", **node, **partial}, **extra)
    except InstantiationException as error:
        raise ConfigError(
            f"_target_: {target} refuses its values: {error.__cause__ or error}".splitlines()[0]
        ) from error


EXTRAS = {"bitsandbytes": "gpu", "vllm": "gpu", "triton": "gpu", "reasoning_gym": "gym", "wandb": "wandb"}
