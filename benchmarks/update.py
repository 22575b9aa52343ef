"""One whole update (forward, backward, clip, optimizer) of QLoRA models, beside other trainers, on one card in one run.

    python -m benchmarks.update [--shapes 1.5b 7b] [--seconds 165] --out FILE.json     # one H100, under 170 s
    python -m benchmarks.update --trial                                               # a toy, on any machine

NF4 base with random weights, LoRA r=32 on the seven projections, 24 sequences of 256 to 1,024 tokens, 16,384 together,
nine tenths of each trained. Each trainer is a process of its own that holds its model all the time and takes turns with
the others: there and back again, warm-up before each turn, the median of all timed updates. Ours has a row that
recomputes layers, one that does so as far as a card of 24 GiB (1.5B) or 16 (7B) asks for it, and one that doesn't.
Plain transformers chooses the fastest of several micro-batch sizes. Seconds of ours include making the batch from
lists; those of the others do not.

MFU counts three passes of 2 N P (P: the projections' weights) and two of 2 N V D for the trained rows' head, done or
not: a row that recomputes nothing does two of the three. Memory is the allocator's peak, and what the device then holds
for the process, its CUDA context included. FILE.json is written after each row; what no time was left for is listed.
"""

import argparse
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Job, about, leave_when_asked, median, read_json, run_and_leave, shown, table, write_json
from benchmarks.random_model import DEVICE, SHAPES
from benchmarks.update_work import Work, empty, measured, used_gib

SIDES = ("reasoner", "transformers", "trl", "unsloth")
NEEDS = {"transformers": ("peft", "bitsandbytes"), "trl": ("trl", "datasets"), "unsloth": ("unsloth",)}
IMPORTS = {
    "reasoner": ("benchmarks.update_ours",),
    "transformers": ("benchmarks.update_rivals", "peft"),
    "trl": ("benchmarks.update_rivals", "peft", "trl.trainer.sft_trainer"),
    "unsloth": ("benchmarks.update_rivals", "peft", "trl.trainer.sft_trainer"),
}
TURNS = ("first", "second", "variants")
UPDATES = {"first": (2, 3), "second": (1, 2), "variants": (1, 3)}  # of a row: warm-up, timed
VARIED = ("reasoner", "transformers")  # the sides with more rows than their main one
RESERVE_S = 4.0  # for ending the processes


def work_of(shape: str) -> Work:
    """The work at a shape."""
    return Work(shape) if shape != "trial" else Work(shape, tokens=320, num=8, shortest=16, longest=64)


class Mailbox:
    """Signals between the process that directs and one that measures: files in a folder, with a number in them."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def tell(self, what: str, number: float | None = None) -> None:
        """Give a signal."""
        write_json(self.folder / what, number)

    def told(self, what: str) -> bool:
        """Whether it was given."""
        return (self.folder / what).exists()

    def wait(self, what: str) -> Any:
        """Until it is given; its number."""
        while not self.told(what):
            time.sleep(0.02)
        return read_json(self.folder / what)


def make_side(name: str, work: Work, logs: Path) -> Any:
    """The side with its model."""
    if name == "reasoner":
        from benchmarks.update_ours import Ours

        return Ours(work, logs)
    from benchmarks import update_rivals

    return {"transformers": update_rivals.Plain, "trl": update_rivals.TRL, "unsloth": update_rivals.Unsloth}[name](
        work, logs
    )


def import_side(name: str) -> None:
    """What takes long to import, before its turn."""
    for module in IMPORTS[name]:
        import_module(module)


def serve(given: argparse.Namespace) -> None:
    """One side in this process: a row is on disk as soon as it is measured, or the reason why it is not."""
    box = Mailbox(given.work)
    found: dict[str, Any] = {"rows": {}, "context_before_its_turn": False}
    try:
        import_side(given.side)
        box.tell("imported")
        side: Any = None
        own = 0.0  # GiB that this process holds between turns, its context included
        for turn in TURNS:
            used = box.wait(f"go-{turn}")  # by all processes
            others = None if used is None else used - own
            if side is None:
                found["context_before_its_turn"] = DEVICE.type == "cuda" and torch.cuda.is_initialized()
                began = time.monotonic()
                side = make_side(given.side, work_of(given.shape), given.work)
                found["build_s"] = time.monotonic() - began
                rows, variants = side.rows(), side.variants()
            for row in variants if turn == "variants" else rows:
                if time.time() > given.until:
                    found["rows"].setdefault(row.name, {"not_run": "no time left"})
                    continue
                result = measured(row, *UPDATES[turn], others)
                earlier = found["rows"].get(row.name, {})
                both = {**earlier, **{key: value for key, value in result.items() if value is not None}}
                both["seconds"] = earlier.get("seconds", []) + result.get("seconds", [])
                found["rows"][row.name] = both
                write_json(given.work / "found.json", found)
            write_json(given.work / "found.json", found)
            empty()
            if others is not None:
                own = (used_gib() or 0.0) - others
            box.tell(f"done-{turn}")
    except BaseException as error:
        found["error"] = f"{type(error).__name__}: {error}"[:600]
        write_json(given.work / "found.json", found)
        traceback.print_exc()
        raise


def job_of(side: str, shape: str, given: argparse.Namespace, work: Path, until: float) -> Job:
    """The process of a side. Unsloth wants to be imported before what it changes."""
    start = ["-m", "benchmarks.update"]
    if side == "unsloth":
        start = ["-c", "import unsloth, benchmarks.update as update; update.main()"]
    passed = ["--side", side, "--shape", shape, "--work", str(work / f"{shape}-{side}"), "--until", str(until)]
    return Job(f"{shape} {side}", lambda: [*start, *passed], given.logs / f"{shape}-{side}.log", given.seconds + 60)


def missing(side: str) -> str | None:
    """Why a side can't be started."""
    lacking = [package for package in NEEDS.get(side, ()) if find_spec(package) is None]
    return f"{lacking[0]} is not installed" if lacking else None


def turns(shapes: Sequence[str], sides: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """(shape, turn, side) in their order: there and back again for each shape, then what is less important."""
    for shape in shapes:
        for turn, order in (("first", sides), ("second", sides[::-1])):
            yield from ((shape, turn, side) for side in order)
    pairs = [(shape, side) for shape in shapes for side in VARIED if side in sides]
    yield from ((shape, "variants", side) for shape, side in pairs)


def take_turn(job: Job, box: Mailbox, turn: str) -> dict[str, Any]:
    """Let a process measure, and read what it found so far."""
    box.tell(f"go-{turn}", used_gib())
    while not box.told(f"done-{turn}") and not job.done():
        time.sleep(0.05)
    return read_json(box.folder / "found.json") or {"rows": {}}


def run_all(given: argparse.Namespace) -> dict[str, Any]:
    """Every side of every shape; the result so far is on disk after each turn."""
    shapes = ["trial"] if given.trial else given.shapes
    command = f"python -m benchmarks.update --shapes {' '.join(shapes)} --seconds {given.seconds:g}"
    result: dict[str, Any] = {**about(command, given.commit), "shapes": {}}
    began = time.monotonic()
    work, until = Path(tempfile.mkdtemp(prefix="update-")), time.time() + given.seconds - RESERVE_S
    leave_when_asked()
    if DEVICE.type == "cuda":
        torch.cuda.init()
        torch.zeros(1, device=DEVICE)  # this process' own context is there before any measure
    absent = {side: why for side in given.sides if (why := missing(side))}
    sides = [side for side in given.sides if side not in absent]
    jobs = {(shape, side): job_of(side, shape, given, work, until) for shape in shapes for side in sides}
    for shape in shapes:
        task = work_of(shape)
        result["shapes"][shape] = {
            "tokens": task.tokens,
            "lengths": task.lengths,
            "trained": task.num_trained,
            "useful_tflop": task.useful_flop / 1e12,
            "sides": {side: {"not_run": absent[side]} for side in absent},
        }
    try:
        for job in jobs.values():
            job.start()
        planned = list(turns(shapes, sides))
        for number, (shape, turn, side) in enumerate(planned):
            job, box = jobs[shape, side], Mailbox(work / f"{shape}-{side}")
            if job.done():
                continue
            found = take_turn(job, box, turn)
            if job.done() and (problem := job.problem()):
                found["error"] = found.get("error") or problem
            if (shape, side) not in {(one[0], one[2]) for one in planned[number + 1 :]}:
                job.kill()  # its memory is for those that go on
                assert job.process is not None
                job.process.wait()
            result["shapes"][shape]["sides"][side] = found
            result["seconds"] = time.monotonic() - began
            finish(result)
            if given.out:
                write_json(given.out, result)
            print(f"[{result['seconds']:.0f} s] {shape} {side}: {turn} {found.get('error', '')}", flush=True)
    finally:
        for job in jobs.values():
            job.kill()
    return result


def finish(result: dict[str, Any]) -> None:
    """Medians, MFU and ratios of every row so far."""
    for shape, part in result["shapes"].items():
        work = work_of(shape)
        for side in part["sides"].values():
            for row in side.get("rows", {}).values():
                if (middle := median(row.get("seconds", []))) is not None:
                    row["ms"], row["mfu"] = 1e3 * middle, work.mfu(middle)


def tables(result: dict[str, Any]) -> str:
    """A table for each shape."""
    parts = []
    for shape, part in result["shapes"].items():
        title = f"{shape}, {part['tokens']:,} tokens"
        rows = []
        for side, found in part["sides"].items():
            why = found.get("not_run") or found.get("error")
            if why and not found.get("rows"):
                rows.append([side, why[:120], *["-"] * 7])
            for name, row in found.get("rows", {}).items():
                if "ms" not in row:
                    rows.append([name, row.get("not_run", "-"), *["-"] * 7])
                    continue
                mfu = row.get("mfu")
                speed = [shown(mfu and 100 * mfu, 1), shown(part["tokens"] / row["ms"] * 1e3, 0)]
                memory = [shown(row.get(f"{where}_gib")) for where in ("allocator", "device")]
                rest = [row.get("micro_batch", "-"), shown(row.get("loss"), 3), str(len(row["seconds"]))]
                rows.append([name, shown(row["ms"], 1), *speed, *memory, *rest])
        head = [title, "ms", "MFU %", "tokens/s", "GiB allocated", "GiB on the device", "micro-batch", "loss", "runs"]
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="nothing is written without it")
    parser.add_argument(
        "--shapes", nargs="+", choices=[one for one in SHAPES if one != "trial"], default=["1.5b", "7b"]
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--seconds", type=float, default=165)
    parser.add_argument("--logs", type=Path, default=Path("outputs/update-logs"))
    parser.add_argument("--commit", help="where the checkout has no history")
    parser.add_argument("--trial", action="store_true", help="toy sizes")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if DEVICE.type == "cpu" and not given.trial and not given.side:
        parser.error("needs a CUDA GPU; --trial runs anywhere")
    return given


def main() -> None:
    """A side, or all of them."""
    given = read_arguments()
    if given.side:
        run_and_leave(lambda: serve(given))
    print(tables(run_all(given)))


if __name__ == "__main__":
    main()
