"""Everything that is claimed of a GPU, measured by one command in at most nine minutes.

    python benchmarks/cuda.py [--minutes 9] [--only PART ...] [--out cuda.json] [--tiny] [--json]

Parts, in this order:

- ``identity``: ``native`` through the runner equals ``model.generate``, logits included, at true shapes;
- ``kernels``: fusion against the bandwidth of memory, measured by a copy;
- ``tiles``: the same kernels cut otherwise, each checked against float64;
- ``costs``: encoder, prefill, tokens and memory of operating points, as ratios to native;
- ``starved``: memory that runs out for real;
- ``budgets``: calibration, predictions, deadlines and memory budgets of the real loop;
- ``batching``: requests a second in batches, few tokens beside native;
- ``recipe``: how fast the reference model's training data are drawn.

Models have the released shapes and random weights, so nothing is downloaded. Every row is written to ``--out`` when it
is there; a second run keeps it and makes those that were skipped or failed. A part that has no time left says so for
each row; one that fails does not end the others. Medians are of ten, with quartiles. The file is refused if it was
measured on another card, driver or version.

On a machine without network that lacks packages: ``benchmarks/cuda.sh WHEELS``.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

if __name__ == "cuda":
    # Another benchmark of this folder runs, and torch looks for NVIDIA's package of that name, which it can do without.
    raise ModuleNotFoundError("benchmarks/cuda.py is not the package cuda", name="cuda")
ROOT = Path(__file__).resolve().parents[1]
# Not this folder: this file has the name of a package of NVIDIA's that torch and triton may want.
sys.path[:] = [
    str(ROOT),
    *(path for path in sys.path if Path(path or ".").resolve() not in (ROOT / "benchmarks", ROOT)),
]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402

from benchmarks.gpu import batching, budgets, costs, identity, kernels, recipe, starved, table, tiles  # noqa: E402
from benchmarks.gpu.book import Book, Desk, tidy  # noqa: E402
from benchmarks.gpu.models import Scale, forget  # noqa: E402
from benchmarks.gpu.timing import SAME, header  # noqa: E402

Part = Callable[[Desk, Scale], None]
PARTS: dict[str, tuple[Part, float]] = {
    "identity": (identity.run, 0.07),
    "kernels": (kernels.run, 0.15),
    "tiles": (tiles.run, 0.23),
    "costs": (costs.run, 0.42),
    "starved": (starved.run, 0.50),
    "budgets": (budgets.run, 0.94),
    "batching": (batching.run, 0.98),
    "recipe": (recipe.run, 1.0),
}
"""What runs, and the share of the time by which it ends: what one part leaves, the next ones have."""
GRACE_S = 15.0
"""How long after its time the whole may still be at its last row."""


def measure(book: Book, scale: Scale, minutes: float, only: Sequence[str]) -> None:
    """Run the parts, each until its share of the time is over."""
    began = time.monotonic()
    chosen = {name: part for name, part in PARTS.items() if not only or name in only}
    for name, (run, share) in chosen.items():
        ends = began + 60 * minutes * (share if len(chosen) == len(PARTS) else 1.0)
        desk = Desk(book, name, ends, hurry=0.0 if scale.tiny else 1.0)
        book.part(name)["failed"].pop("part", None)
        try:
            run(desk, scale)
        except Exception as error:
            said = (str(error).splitlines() or [""])[0][:300]
            book.put(name, "failed", "part", f"{type(error).__name__}: {said}")
            desk.say(f"failed, {type(error).__name__}: {said}")
            del error
        tidy()
    forget()


@contextmanager
def ended_in_time(minutes: float, book: Book) -> Iterator[None]:
    """End the process when a row does not come back: what was measured is in the file, and is printed."""

    def end() -> None:
        print(*table.lines(book.found), "", "the last row did not end in time", sep="\n", flush=True)
        os._exit(3)

    timer = threading.Timer(60 * minutes + GRACE_S, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="most that it takes")
    parser.add_argument("--only", action="append", choices=PARTS, default=[], metavar="PART", help="once or more")
    parser.add_argument("--out", type=Path, default=Path("cuda.json"))
    parser.add_argument("--fresh", action="store_true", help="forget what --out has")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU: whether it runs, not how fast")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("no GPU that torch can use; --tiny runs it on the CPU at a tiny shape")
    if not options.minutes > 0:
        parser.error(f"--minutes is {options.minutes:g}; expected more than 0")
    if options.tiny:
        torch.set_num_threads(1)  # more of them wait for one another longer than tiny shapes take
    device = torch.device("cpu" if options.tiny else "cuda:0")
    if options.fresh:
        options.out.unlink(missing_ok=True)
    book = Book(options.out, header(device, options.tiny), SAME)
    with ended_in_time(options.minutes, book):
        measure(book, Scale(device, options.tiny), options.minutes, options.only)
    if options.json:
        print(json.dumps({**book.found, "shortfalls": table.shortfalls(book.found)}))
    else:
        print(*table.lines(book.found), sep="\n")
    return 1 if any(part["failed"] for part in book.found["parts"].values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
