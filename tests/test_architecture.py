"""The shape of the code, read from syntax trees: who imports whom, each heavy dependency's one home, sizes, trust.

Each rule is a function from source text to what is wrong with it, and is first shown a text that breaks it.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lowest first; a file imports only from its own package and from what stands above it here.
LEVELS = """
    types errors words spared garbage usage init starter config compose world signals disk redact lock intervals
    kernels rewards data
    metrics tracking run_folder console
    models
    checkpoint optimizer_state resume
    rollout update grpo sft evaluate
    results summary report worst_batch peak memory
    assembly rescoring reward stages run pipeline evaluation chat export serve __main__
"""
ORDER = LEVELS.split()
STRANGERS = ("kernels", "rewards", "rollout")  # never import one another

HOMES = {
    "datasets": ["reasoner/data/*"],
    "triton": ["reasoner/kernels/*_triton.py", "reasoner/rollout/*_triton.py"],
    "torch.distributed": ["reasoner/world.py"],
    "hydra": ["reasoner/config.py", "reasoner/compose.py", "reasoner/__main__.py"],
    "omegaconf": ["reasoner/config.py", "reasoner/compose.py", "reasoner/__main__.py"],
    "vllm": ["reasoner/rollout/vllm*.py"],
    "bitsandbytes": ["reasoner/models/*"],
    "wandb": ["reasoner/tracking/*"],
    "trackio": ["reasoner/tracking/*"],
    "tensorboard": ["reasoner/tracking/*"],
    "mlflow": ["reasoner/tracking/*"],
}
ONE_FILE = ("bitsandbytes",)  # at most one of the files of its home

LONG = re.compile(r"\blong because\b")  # on the first line of a file or function: the reason why it is longer


def python_files(folder: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py"))


def read(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def imports(source: str) -> Iterator[str]:
    """Dotted names that a file imports anywhere in it: lazily, for types only, or by a literal name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def module_of(path: Path) -> str:
    """`models` for reasoner/models/policy.py, `types` for reasoner/types.py."""
    return path.parts[1].removesuffix(".py")


def order_problems(path: Path, source: str) -> Iterator[str]:
    me = module_of(path)
    if me not in ORDER:
        yield f"{path}: '{me}' has no place in ORDER: put it where its imports allow"
        return
    for name in imports(source):
        package, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if package != "reasoner" or other in (me, "__version__"):
            continue
        if other not in ORDER or ORDER.index(other) > ORDER.index(me):
            yield f"{path} imports {name}, which is not below it"
        elif me in STRANGERS and other in STRANGERS:
            yield f"{path} imports {name}: {', '.join(STRANGERS)} never import one another"


def home_problems(path: Path, source: str) -> Iterator[str]:
    for name in set(imports(source)):
        for package, homes in HOMES.items():
            at_home = any(fnmatch(str(path), home) for home in homes)
            if (name == package or name.startswith(package + ".")) and not at_home:
                yield f"{path} imports {name}, whose home is {' '.join(homes)}"


def size_problems(path: Path, source: str) -> Iterator[str]:
    device = path.name.endswith("_triton.py")
    max_file, max_function = (600 if path.parts[0] == "tests" else 400), (150 if device else 60)
    lines = source.splitlines()
    if len(lines) > max_file and not LONG.search(lines[0]):
        yield f"{path} has {len(lines)} lines, more than {max_file}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            first_line = "\n".join(lines[node.lineno - 1 : node.body[0].lineno])
            if size > max_function and not LONG.search(first_line):
                yield f"{path}:{node.lineno} {node.name} has {size} lines, more than {max_function}"


PICKLE_READERS = (
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "cloudpickle.load",
    "cloudpickle.loads",
    "torch.load",
)
SAFE = {"trust_remote_code": "False", "weights_only": "True"}
# Between a run and its own reward processes, over pipes that nobody else can reach.
PICKLE_PIPES = (Path("reasoner/rewards/pool.py"), Path("reasoner/rewards/worker.py"))


def trust_problems(path: Path, source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "cloudpickle"):
            yield f"{path}:{node.lineno} imports names of {node.module}: say {node.module}.NAME, so that it is seen"
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in PICKLE_READERS and path not in PICKLE_PIPES:
            yield f"{path}:{node.lineno} {ast.unparse(node)} runs what the file says"
        pairs: list[tuple[object, ast.expr]] = []
        if isinstance(node, ast.Call):
            pairs = [(keyword.arg, keyword.value) for keyword in node.keywords]
        elif isinstance(node, ast.Dict):
            pairs = [(getattr(key, "value", None), value) for key, value in zip(node.keys, node.values, strict=True)]
        for key, value in pairs:
            if key in SAFE and ast.unparse(value) != SAFE[key]:
                yield f"{path}:{value.lineno} {key} is not {SAFE[key]}"


MACHINE_PATH = re.compile(r"(?<![\w.~$)}-])/(?:work|root|home/(?!me/|you/)[\w.-]+)/")  # /home/me/ is an example's
HOSTS = (("pypi", "org"), ("files", "pythonhosted"), ("deb", "debian"), ("registry", "npmjs"))
REGISTRY_HOST = re.compile("|".join(r"\b" + r"\.".join(words) for words in HOSTS))


def text_problems(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if MACHINE_PATH.search(line):
            yield f"{path}:{number} names a path of one machine: {line.strip()[:80]}"
        if REGISTRY_HOST.search(line):
            yield f"{path}:{number} names a registry's host: {line.strip()[:80]}"


def all_problems(rule, *folders: str) -> list[str]:
    return [problem for folder in folders for path in python_files(folder) for problem in rule(path, read(path))]


BROKEN = [
    (order_problems, "reasoner/errors.py", "from reasoner.config import Config", "not below it"),
    (order_problems, "reasoner/data/rows.py", "def f():\n    from reasoner import pipeline", "not below it"),
    (order_problems, "reasoner/models/policy.py", "from reasoner.nowhere import x", "not below it"),
    (
        order_problems,
        "reasoner/rollout/hf.py",
        "from reasoner.kernels.linear_logprobs import x",
        "never import one another",
    ),
    (order_problems, "reasoner/helpers.py", "", "no place in ORDER"),
    (home_problems, "reasoner/rewards/math.py", "def f():\n    import datasets", "whose home"),
    (home_problems, "reasoner/kernels/linear_logprobs.py", "import triton.language as tl", "whose home"),
    (home_problems, "reasoner/update.py", "import torch\ntorch.distributed.barrier()", "whose home"),
    (home_problems, "reasoner/update.py", "from torch import distributed", "whose home"),
    (home_problems, "reasoner/evaluate.py", "from omegaconf import OmegaConf", "whose home"),
    (home_problems, "reasoner/rollout/hf.py", "import_module('vllm.lora')", "whose home"),
    (size_problems, "reasoner/update.py", "x = 1\n" * 401, "more than 400"),
    (size_problems, "tests/test_update.py", "x = 1\n" * 601, "more than 600"),
    (size_problems, "reasoner/update.py", "def f():\n" + "    x = 1\n" * 60, "more than 60"),
    (size_problems, "reasoner/kernels/a_triton.py", "def f():\n" + "    x = 1\n" * 150, "more than 150"),
    (trust_problems, "reasoner/checkpoint.py", "import pickle\npickle.load(f)", "runs what"),
    (trust_problems, "reasoner/checkpoint.py", "from pickle import load", "so that it is seen"),
    (trust_problems, "reasoner/checkpoint.py", "torch.load(f)", "runs what"),
    (trust_problems, "reasoner/models/loading.py", "load(x, weights_only=" + "False)", "is not True"),
    (trust_problems, "reasoner/models/loading.py", "f(trust_remote_code=True)", "is not False"),
    (trust_problems, "reasoner/models/loading.py", "f(**{'trust_remote_code': model.trust})", "is not False"),
    (text_problems, "README.md", "see /ro" + "ot/notes", "path of one machine"),
    (text_problems, "README.md", "cd '/ho" + "me/someone/x'", "path of one machine"),
    (text_problems, "Makefile", "pip install -i https://py" + "pi.org/simple", "registry's host"),
]
SOUND = [
    (order_problems, "reasoner/pipeline.py", "from reasoner import __version__, disk\nfrom reasoner.sft import x"),
    (home_problems, "reasoner/rollout/vllm_weights.py", "import vllm.lora"),
    (home_problems, "reasoner/data/hub.py", "from datasets import load_dataset"),
    (size_problems, "reasoner/update.py", "# long because one table is best read whole\n" + "x = 1\n" * 500),
    (size_problems, "reasoner/update.py", "def f():  # long because of a table\n" + "    x = 1\n" * 70),
    (trust_problems, "reasoner/models/sources.py", "f(trust_remote_code=False, weights_only=True)\npickle.dumps(x)"),
    (text_problems, "README.md", "outputs/work/x and a/home/b/ and /home/me/my_reward.py"),
]


@pytest.mark.parametrize(("rule", "path", "source", "problem"), BROKEN)
def test_each_rule_sees_what_breaks_it(rule, path, source, problem):
    assert problem in "\n".join(rule(Path(path), source))


@pytest.mark.parametrize(("rule", "path", "source"), SOUND)
def test_each_rule_lets_sound_code_pass(rule, path, source):
    assert list(rule(Path(path), source)) == []


def test_a_file_imports_only_from_below():
    package = [path for path in python_files("reasoner") if path != Path("reasoner/__init__.py")]
    assert [problem for path in package for problem in order_problems(path, read(path))] == []
    modules = {module_of(path) for path in package}
    assert [name for name in ORDER if name not in modules] == [], "ORDER names what is not there"


def test_each_heavy_dependency_has_one_home():
    assert all_problems(home_problems, "reasoner") == []
    for package in ONE_FILE:
        users = [
            str(path) for path in python_files("reasoner") if package in {n.split(".")[0] for n in imports(read(path))}
        ]
        assert len(users) <= 1, f"{package} is imported by {users}"


def test_files_and_functions_stay_small():
    assert all_problems(size_problems, "reasoner", "tests", "examples", "benchmarks") == []


def test_g7_no_pickle_is_read_and_no_remote_code_trusted():
    assert all_problems(trust_problems, "reasoner", "examples", "benchmarks") == []
    confs = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "conf").rglob("*.yaml"))
    assert "trust_remote_code" not in confs


def test_no_file_names_a_machine_or_a_registry():
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    tracked = [Path(name) for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert Path("pyproject.toml") in tracked
    texts = {path: (ROOT / path).read_text(encoding="utf-8", errors="replace") for path in tracked}
    assert [problem for path, text in texts.items() for problem in text_problems(path, text)] == []


REWARD_MODULES = [
    ".".join(path.with_suffix("").parts) for path in python_files("reasoner/rewards") if path.stem != "__init__"
]


@pytest.mark.parametrize(
    "modules", [["reasoner"], ["reasoner.rewards.base"], REWARD_MODULES], ids=["reasoner", "base", "rewards"]
)
def test_light_imports_load_nothing_heavy(modules):
    """A reward process starts in a fraction of a second because no reward loads torch."""
    heavy = [
        "torch",
        "transformers",
        "datasets",
        "peft",
        "hydra",
        "vllm",
        "bitsandbytes",
        "triton",
        "wandb",
        "mlflow",
        "trackio",
    ]
    script = f"import sys, {', '.join(modules)}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
