"""The command line. Nothing heavy is imported until a command needs it; every error is value, limit, mend.

Exit codes: 0 ended by its own plan; 1 internal error; 2 bad input; 3 stopped early by a safety limit, a latch or an
unmet precondition; 4 instrument or storage fault.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from aecontrol.errors import AecontrolError, BadInput, SafetyStop

app = typer.Typer(
    name="aecontrol",
    help="Autonomous STEM experiments that pay for every step in dose.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
train_app = typer.Typer(help="Train the networks that are shipped as weights.", no_args_is_help=True)
app.add_typer(train_app, name="train")
keys_app = typer.Typer(help="Keys that let controllers and bridges know each other.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")

Json = Annotated[bool, typer.Option("--json", help="one JSON object on stdout; logs go to stderr")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
SessionFolder = Annotated[Path, typer.Argument(metavar="DIR", help="a session folder")]


def main() -> None:
    """Entry point: errors become messages and exit codes."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    try:
        app(standalone_mode=False)
    except AecontrolError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except typer.Abort:
        sys.exit(3)
    except Exception as error:
        usage = getattr(error, "format_message", None)  # typer's own usage errors
        if usage is None:
            raise
        print(f"error: {usage()}", file=sys.stderr)
        sys.exit(2)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="a session's TOML file; see configs/")],
    out: Annotated[Path | None, typer.Option(help="session folder; default runs/NAME-DATE-TIME")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="overrides session.seed")] = None,
    device: Device = "auto",
    json_out: Json = False,
) -> None:
    """Run an autonomous session."""
    from aecontrol.config import load
    from aecontrol.session import Session

    _check_device(device)
    settings = load(config, seed)
    folder = out or Path("runs") / f"{settings.tables.session.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    _carry_out(Session.create(settings, folder), device, json_out)


@app.command()
def resume(folder: SessionFolder, device: Device = "auto", json_out: Json = False) -> None:
    """Go on with a session that was interrupted or killed; a finished one prints its summary."""
    from aecontrol.session import Session

    _check_device(device)
    _carry_out(Session.reopen(folder), device, json_out)


@app.command()
def verify(folder: SessionFolder, device: Device = "auto", json_out: Json = False) -> None:
    """Ask the policy again at every step, and compare both dose ledgers and all stored frames."""
    from aecontrol.verify import verify_session

    result = verify_session(folder)
    if json_out:
        print(json.dumps(result))
    else:
        print(f"{result['identical']} of {result['decisions']} decisions are identical")
        for line in (*result["differences"], *result["notes"]):
            print(f"  {line}")
    raise typer.Exit(0 if not result["differences"] else 1)


@app.command()
def report(folder: SessionFolder) -> None:
    """Write report.html anew from the journal."""
    from aecontrol.report import write_report

    print(write_report(folder))


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="an image file (npz, npy, TIFF, or what RosettaSciIO reads)")],
    key: Annotated[str | None, typer.Option(help="which array of an archive")] = None,
    json_out: Json = False,
) -> None:
    """What is in a microscopy file."""
    from aecontrol.files import read_image

    picture = read_image(file, key)
    facts: dict[str, Any] = {
        "file": str(file),
        "shape": list(picture.array.shape),
        "dtype": str(picture.array.dtype),
        "pixel_size_nm": picture.pixel_size_nm,
        "minimum": float(picture.array.min()),
        "maximum": float(picture.array.max()),
        "labels": None if picture.labels is None else len(picture.labels),
    }
    print(json.dumps(facts) if json_out else "\n".join(f"{name}: {value}" for name, value in facts.items()))


@app.command()
def find(
    image: Annotated[Path, typer.Argument(help="an image file (npz, npy, TIFF, or what RosettaSciIO reads)")],
    what: Annotated[str, typer.Option(help="atoms, or regions: particles, grain boundaries, domain walls")] = "atoms",
    pixel_size_nm: Annotated[float | None, typer.Option(help="side of a pixel, nm; overrides the file's")] = None,
    channel: Annotated[str | None, typer.Option(help="which image of a file that holds several")] = None,
    frame: Annotated[int | None, typer.Option(help="which frame of a stack, from 0")] = None,
    threshold: Annotated[float, typer.Option(help="least confidence of an atom")] = 0.5,
    out: Annotated[Path | None, typer.Option(help="folder for tables and picture; default IMAGE_find")] = None,
    refine: Annotated[bool, typer.Option("--refine/--no-refine", help="fit positions and intensities")] = True,
    weights: Annotated[Path | None, typer.Option(help="another network than the shipped one")] = None,
    device: Device = "auto",
    json_out: Json = False,
) -> None:
    """Find the atoms, or the regions, of a microscopy image: tables, a picture, and how far to trust them."""
    from aecontrol.find import find as carry_out
    from aecontrol.find import summary_lines
    from aecontrol.find_request import Request
    from aecontrol.registry import validate

    asked = {"pixel_size_nm": pixel_size_nm, "channel": channel, "frame": frame, "threshold": threshold}
    request = validate(Request, {**asked, "what": what, "refine": refine, "weights": weights}, "find")
    with _bar("finding", json_out) as progress:
        # nothing is resumed here and no instrument waits: all cores may help
        result = carry_out(image, request, out, _torch_device(device, os.cpu_count() or 1), progress)
    if json_out:
        print(json.dumps(result))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for line in summary_lines(result):
        table.add_row(*line)
    console = Console(highlight=False)
    console.print(table)
    console.print(*result["files"].values(), sep="\n", soft_wrap=True, markup=False)


@app.command()
def damage(
    series: Annotated[list[Path], typer.Argument(metavar="SERIES...", help="a stack, a folder of images, or images")],
    pixel_size_nm: Annotated[float | None, typer.Option(help="side of a pixel, nm; overrides the file's")] = None,
    dose_per_frame: Annotated[float | None, typer.Option(help="fluence of one frame, e/A^2")] = None,
    metric: Annotated[str, typer.Option(help="learned, glr, ssim, psnr, resnet18, ...: see the docs")] = "learned",
    channel: Annotated[str | None, typer.Option(help="which image of a file that holds several")] = None,
    limit_nm: Annotated[float | None, typer.Option(help="farthest that a frame moves from one to the next")] = None,
    weights: Annotated[Path | None, typer.Option(help="other weights than the shipped or installed ones")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for maps, tables and figures; default SERIES_damage")] = None,
    device: Device = "auto",
    json_out: Json = False,
) -> None:
    """How much, and where, the frames of a series differ from its first one by damage; and what that may say."""
    from aecontrol.damage_request import Request
    from aecontrol.damage_series import judge, summary_lines
    from aecontrol.registry import validate

    asked = {"pixel_size_nm": pixel_size_nm, "dose_per_frame": dose_per_frame, "metric": metric, "channel": channel}
    request = validate(Request, {**asked, "limit_nm": limit_nm, "weights": weights}, "damage")
    with _bar("comparing", json_out) as progress:
        result = judge(series, request, out, _torch_device(device), progress)
    print(json.dumps(result["contract"]) if json_out else "\n".join(summary_lines(result)))


@app.command()
def simulate(
    config: Annotated[Path, typer.Argument(help="a simulation's TOML file; see configs/simulate_*.toml")],
    out: Annotated[Path, typer.Option(help="file to write: .npz, or .hspy with the extra 'files'")],
    workers: Annotated[int, typer.Option(min=1, help="processes that share a training set's shards (dask)")] = 1,
    device: Device = "auto",
    json_out: Json = False,
) -> None:
    """Render a specimen with its ground truth: one image, a series that the beam damages, or a training set."""
    from aecontrol.simulate import simulate as carry_out

    with _bar("simulating", json_out) as progress:
        made = carry_out(config, out, _torch_device(device), workers, progress)
    if json_out:
        print(json.dumps(made))
        return
    print(f"{made['file']}{' and more' if len(made['files']) > 1 else ''}: {made['shape']}, {made['atoms']} sites")
    for channel, claim in made["validity"].items():
        if claim["note"]:
            print(f"  {channel}: {'' if claim['linear_ok'] else 'linear model not valid: '}{claim['note']}")
    for line in made["assumptions"]:
        print(f"  assumed: {line}")


@app.command()
def gallery(
    out: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("gallery"),
    specimen: Annotated[str | None, typer.Option(help="only this kind")] = None,
    device: Device = "auto",
) -> None:
    """One picture of every specimen: a noisy frame, the ideal image with its atoms, and what is true."""
    from aecontrol.simulate import gallery as draw

    with _bar("drawing", False) as progress:
        made = draw(out, specimen, _torch_device(device), progress)
    for path in made:
        print(path)


@app.command()
def bridge(
    config: Annotated[Path, typer.Argument(help="a bridge's TOML file; see configs/bridge_*.toml")],
    clear_latch: Annotated[
        str | None, typer.Option(help="why the latch of this ledger may go, in a sentence; then serve")
    ] = None,
) -> None:
    """Serve a microscope to controllers over ZMQ, with its own ledger, limits and watchdog, until Ctrl-C."""
    from aecontrol.registry import tool

    logging.getLogger().setLevel(logging.INFO)
    tool("bridge")(config, clear_latch)


@keys_app.command("new")
def keys_new(folder: Annotated[Path, typer.Argument(help="a new folder")]) -> None:
    """Make CURVE keys for a bridge, and one controller, operator and observer."""
    from aecontrol.registry import tool

    for path in tool("new-keys")(folder):
        print(path)


@app.command()
def blank(config: Annotated[Path, typer.Argument(help="a TOML file with the [driver] to reach")]) -> None:
    """Blank the beam of a microscope now, whoever is exposing."""
    from aecontrol.config import load_driver

    driver = load_driver(config)
    if not hasattr(driver, "blank"):
        raise BadInput(f"{config} names no microscope behind a bridge", "give one whose [driver] has kind = 'zmq'")
    driver.blank(config.resolve().parent)
    print("the beam is blanked")


@app.command("check-driver")
def check_driver(
    config: Annotated[Path, typer.Argument(help="a TOML file with the [driver] to check")],
    max_electrons: Annotated[int, typer.Option(min=0, help="electrons that the checks may cost")] = 10_000_000,
    json_out: Json = False,
) -> None:
    """Check any driver against the contract that sessions rely on, with a few small exposures at the field's corner."""
    from aecontrol.config import load_driver
    from aecontrol.registry import tool

    driver, base = load_driver(config), config.resolve().parent
    with tempfile.TemporaryDirectory() as folder:
        results = tool("check-driver")(lambda: driver.build(Path(folder), base, 0), max_electrons)
    failed = [name for name, wrong in results if wrong]
    if json_out:
        print(json.dumps({"checks": [{"check": name, "wrong": wrong} for name, wrong in results]}))
    else:
        for name, wrong in results:
            print(f"{'FAILED' if wrong else 'ok':>6}  {name}{': ' if wrong else ''}{wrong}")
    raise typer.Exit(4 if failed else 0)


@app.command()
def schema() -> None:
    """JSON schema of a session's configuration, with every installed driver, policy and perceiver."""
    from aecontrol.config import json_schema

    print(json.dumps(json_schema(), indent=1))


@app.command()
def doctor(
    probe: Annotated[
        bool, typer.Option("--probe", help="import torch in a child process and say what it can use")
    ] = False,
    json_out: Json = False,
) -> None:
    """What is installed, which weights are there, and how to mend what is missing."""
    from aecontrol.doctor import examine

    facts = examine(probe)
    if json_out:
        print(json.dumps(facts))
        return
    for section, entries in facts.items():
        print(f"{section}:")
        for name, value in entries.items():
            print(f"  {name}: {value}")


@train_app.command("atoms")
def train_atoms_command(
    config: Annotated[Path, typer.Argument(help="a training TOML file; see configs/train_atoms.toml")],
    out: Annotated[Path, typer.Option(help="folder for weights and model card")] = Path("weights"),
    device: Device = "auto",
    json_out: Json = False,
) -> None:
    """Train the atom finder on simulated scenes."""
    from aecontrol.perception.learn_atoms import train_from_toml

    _train(partial(train_from_toml, config), out, device, json_out)


@train_app.command("regions")
def train_regions_command(
    config: Annotated[Path, typer.Argument(help="a training TOML file; see configs/train_regions.toml")],
    out: Annotated[Path, typer.Option(help="folder for weights and model card")] = Path("weights"),
    device: Device = "auto",
    json_out: Json = False,
) -> None:
    """Train the finder of particles, grain boundaries and domain walls on simulated scenes."""
    from aecontrol.perception.learn_regions import train_from_toml

    _train(partial(train_from_toml, config), out, device, json_out)


@train_app.command("damage")
def train_damage_command(
    config: Annotated[Path, typer.Argument(help="a training TOML file; see configs/train_damage.toml")],
    out: Annotated[Path, typer.Option(help="folder for weights and model card")] = Path("weights"),
    device: Device = "auto",
    json_out: Json = False,
) -> None:
    """Train the learned damage metric on simulated pairs of frames."""
    from aecontrol.perception.damage.learn_damage import train_from_toml

    _train(partial(train_from_toml, config), out, device, json_out)


@train_app.command("adapt")
def train_adapt_command(
    sources: Annotated[list[Path], typer.Argument(metavar="SESSION_OR_IMAGE...", help="session folders, image files")],
    out: Annotated[Path, typer.Option(help="new folder for the card, and for the weights if they pass")],
    pixel_size_nm: Annotated[float | None, typer.Option(help="side of the images' pixels, nm")] = None,
    channel: Annotated[str | None, typer.Option(help="which channel of a session, or image of a file")] = None,
    weights: Annotated[Path | None, typer.Option(help="another network than the shipped one to adapt")] = None,
    device: Device = "auto",
    json_out: Json = False,
) -> None:
    """Let the atom finder learn from a session's own frames; refused unless it then sees better there, and no worse
    elsewhere."""
    from aecontrol.adapt import Request, adapt
    from aecontrol.registry import validate

    asked = {"sources": sources, "pixel_size_nm": pixel_size_nm, "channel": channel, "weights": weights}
    request = validate(Request, asked, "adapt")
    _train(partial(adapt, request), out, device, json_out)


def _train(train: Callable[..., dict[str, Any]], out: Path, device: str, json_out: bool) -> None:
    """Train with a progress bar on stderr and print the card, or its metrics."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=None)

        def show(step: int, steps: int, loss: float) -> None:
            bar.update(task, completed=step, total=steps, description=f"training, loss {loss:.4f}")

        card = train(out, _torch_device(device), show)
    print(json.dumps(card) if json_out else f"{out}: {json.dumps(card.get('metrics', card), indent=1)}")


@contextmanager
def _bar(what: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, told of by its yield."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True, quiet=quiet)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _torch_device(device: str, threads: int = 1) -> str:
    from aecontrol.perception.device import resolve

    _check_device(device)
    return resolve(device, threads)


def _check_device(device: str) -> None:
    if device not in ("auto", "cpu", "cuda"):
        raise BadInput(f"--device {device!r} is not known", "use auto, cpu or cuda")


def _carry_out(session: Any, device: str, json_out: bool) -> None:
    """Run or finish a session with the live view, then score, compare, report and summarise."""
    from aecontrol.aftermath import conclude, finished_summary
    from aecontrol.live import LiveView

    started = time.perf_counter()
    try:
        state = session.state
        summary = finished_summary(session.folder) if state.phase == "stopped" else None
        if summary is None:
            with LiveView(session.folder, session.config, quiet=json_out) as view:
                state = session.run(view.observe, device)
                wall = time.perf_counter() - started
                summary = conclude(session.folder, session.config, state, device, wall, view.progress)
    except BadInput:
        if not session.state.keys:
            session.discard()
        raise
    finally:
        session.close()
    if json_out:
        print(json.dumps(summary["contract"]))
    else:
        for line in summary["lines"]:
            print(line)
    if state.paused:
        raise SafetyStop(f"paused: {state.paused}", f"mend it, then `aecontrol resume {session.folder}`")
    if state.stopped is not None and state.stopped.cause == "safety":
        raise SafetyStop(state.stopped.reason, "look at the instrument before a new session")


if __name__ == "__main__":
    main()
