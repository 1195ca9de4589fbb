"""What a person sees while a session runs: a live table in a terminal, plain lines elsewhere, nothing when quiet.

A view only looks. It never changes a session, and one that can no longer be written to falls silent instead of ending
the run.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from aecontrol.config import SessionConfig
from aecontrol.events import (
    DamageMeasured,
    Decided,
    DriftMeasured,
    Indeterminate,
    InstrumentReady,
    ModelUpdated,
    Paused,
    Perceived,
    Refused,
    ResponseFitted,
    SessionEvent,
    Stopped,
    Voided,
    step_text,
)
from aecontrol.state import State
from aecontrol.types import ScanRegion

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

ROWS = 8  # steps shown in the live table
NOT_MEASURED = "none yet"  # nothing measures damage yet: the ledger charges 0, basis 'none'
_COLUMNS = ("step", "x, y nm", "size nm", "value", "finds", "dose", "damage", "time")
_DISPENSABLE = ("size nm", "damage", "time")
_NARROW = 75  # columns that the whole row needs
_REASON = 24  # columns that a reason needs to be worth showing
_NEXT = {
    "new": "asking the instrument what it is",
    "overview": "planning the overview",
    "ready": "choosing the next place",
    "decided": "checking it against the budget",
    "reserved": "exposing",
    "exposed": "fetching the frame",
    "recorded": "reading the frame",
    "learning": "training the embedding",
    "reembedding": "encoding all sub-scans anew",
}


def region_text(region: ScanRegion) -> str:
    """'(12.5, 7.5) nm, 5 x 5 nm'."""
    (x, y), (width, height) = region.center_nm, region.fov_nm
    turned = f", turned {region.rotation_rad:.3g} rad" if region.rotation_rad else ""
    return f"({x:.1f}, {y:.1f}) nm, {width:.3g} x {height:.3g} nm{turned}"


def amount_text(amount: float) -> str:
    """A charge for people: whole below a million, then 1.23e+06."""
    return f"{amount:.0f}" if amount < 1e6 else f"{amount:.3g}"


def clock_text(seconds: float) -> str:
    """Elapsed time as m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


@dataclass(frozen=True)
class Spent:
    """Charge and budget in the currency that the instrument meters."""

    unit: str
    amount: float
    limit: float | None

    @classmethod
    def of(cls, state: State) -> Spent:
        """Where the ledger stands."""
        charged, budget = state.charged, state.plan.budget
        unit = state.capabilities.unit if state.capabilities else "electrons" if budget.electrons else "pixels"
        if unit == "electrons":
            # a session may be limited in pixels alone; then that is the budget that it runs against
            if budget.electrons is None and budget.pixels is not None:
                return cls("pixels", charged.pixels, budget.pixels)
            return cls(unit, charged.electrons, budget.electrons)
        return cls(unit, charged.pixels, budget.pixels)

    @property
    def share(self) -> float | None:
        """Fraction of the budget; None without a limit."""
        return None if self.limit is None else self.amount / self.limit

    def __str__(self) -> str:
        if self.limit is None:
            return f"{amount_text(self.amount)} {self.unit}, no limit"
        share = f"{100 * self.amount / self.limit:.1f} %"
        return f"{amount_text(self.amount)} of {amount_text(self.limit)} {self.unit} ({share})"


@dataclass(frozen=True)
class Step:
    """One finished step, as it is shown."""

    number: int
    region: ScanRegion
    value: str
    finds: str
    spent: Spent
    damage: str
    seconds: str
    why: str

    @classmethod
    def of(cls, state: State, event: Perceived, total: int, seconds: float) -> Step:
        """The step whose frame has just been read; ``total`` finds so far."""
        record = state.keys[event.key]
        decided = next(d for d in reversed(state.decisions) if d.step == record.step)
        seen = event.observations[0] if record.step and event.observations else None
        if record.step == 0:
            value, finds = ("overview" if event.observations else "not read"), "-"
        elif seen is None:
            value, finds = "not read", "-"
        else:
            value = "-" if seen.value is None else f"{seen.value:.3g}"
            finds = f"{len(seen.found)} (all {total})"
        why = decided.decision.explanation.why
        note = event.note or (seen.note if seen else "")
        damage = state.charged.damage
        return cls(
            number=record.step,
            region=record.region,
            value=value,
            finds=finds,
            spent=Spent.of(state),
            damage=NOT_MEASURED if state.harm is None else f"{damage:.3g}",
            seconds=f"{seconds:.1f} s",
            why=_clean(f"{why}; {note}" if note else why),
        )

    def line(self) -> str:
        """The step as one plain line."""
        head = f"step {self.number}: {region_text(self.region)}"
        facts = f"value {self.value}, finds {self.finds}, {self.spent}, damage {self.damage}, {self.seconds}"
        return f"{head} | {facts} | {self.why}"

    def cells(self) -> tuple[str, ...]:
        """The step as a row of the live table, without the reason."""
        (x, y), (width, height) = self.region.center_nm, self.region.fov_nm
        place, size = f"{x:.1f}, {y:.1f}", f"{width:.3g} x {height:.3g}"
        dose = amount_text(self.spent.amount) if self.spent.share is None else f"{100 * self.spent.share:.1f} %"
        return str(self.number), place, size, self.value, self.finds, dose, self.damage, self.seconds


def _clean(text: str) -> str:
    """One line of printable characters: what other programs wrote must not steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def _notice(event: SessionEvent) -> str | None:
    """What is worth a line of its own, besides the steps."""
    match event:
        case InstrumentReady():
            c = event.capabilities
            kind = "record" if c.unit == "pixels" else "simulated specimen" if c.simulated else "instrument"
            return f"{kind}: {c.identity}, field {c.field_nm[0]:.3g} x {c.field_nm[1]:.3g} nm, metered in {c.unit}"
        case Refused():
            return f"{step_text(event.step)}: refused by the guard: {event.reason}"
        case DamageMeasured():
            if event.mean is None:
                return f"damage of a reference: {event.reason}"
            return f"damage: the metric shows {event.mean:.3g} ± {event.sd:.2g} since the first frame of the place"
        case ResponseFitted():
            known = zip(event.response.phases, event.response.critical_fluence_e_per_A2, strict=True)
            texts = (f"{name} {sorted(draws)[len(draws) // 2]:.3g}" for name, draws in known)
            return f"critical fluence, e/A^2 (median): {', '.join(texts)}, after {event.measurements} comparisons"
        case DriftMeasured():
            (x, y), sigma = event.shift_nm, event.sigma_nm
            if not event.accepted:
                return f"drift could not be measured: {event.reason}"
            return f"drift: the specimen has moved by ({x:.3f}, {y:.3f}) nm, give or take {sigma:.3f} nm"
        case Voided():
            return f"exposure {event.key[:12]} was refused by the instrument: {event.reason}"
        case Indeterminate():
            return f"exposure {event.key[:12]} was interrupted and is charged in full: {event.reason}"
        case ModelUpdated():
            return f"embedding {event.method} trained on {event.patches} patches"
        case Paused():
            return f"paused: {event.reason}"
        case Stopped():
            return f"stopped ({event.cause}): {event.reason}"
    return None


class LiveView:
    """Context manager around one run: ``observe`` every event, ``progress`` what happens after the last.

    ``quiet``: nothing is written. On a terminal a Rich display is kept until the view is left, and the terminal is
    restored however that happens; elsewhere each step is one line on standard output.
    """

    def __init__(self, folder: Path, config: SessionConfig, quiet: bool, console: Console | None = None) -> None:
        self._title = f"{config.tables.session.name}, seed {config.tables.session.seed}: {folder}"
        self._steps: list[Step] = []
        self._phase, self._notice, self._why = "starting", "", ""
        self._spent: Spent | None = None
        self._found = 0
        self._started = self._last = time.monotonic()
        self._write: Callable[[str], None] | None = None if quiet else _print
        self._console = console
        self._rich = not quiet and (console is not None or _is_terminal())
        self._live: Any = None

    def __enter__(self) -> LiveView:
        """Start the display."""
        if self._rich:
            from rich.live import Live

            self._write = None
            self._live = Live(
                console=self._console,
                get_renderable=self._draw,
                refresh_per_second=6,
                # what other parts print goes above the display instead of through it
                redirect_stdout=True,
                redirect_stderr=True,
                vertical_overflow="crop",
            )
            self._live.start()
        else:
            self._say(self._title)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last picture on the screen and give the terminal back."""
        self._phase = ""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def observe(self, state: State, event: SessionEvent) -> None:
        """Told of every event once it is durable, with the state after it."""
        if self._write is None and self._live is None:
            return
        self._spent = Spent.of(state)
        self._phase = _NEXT.get(state.phase, "")
        if isinstance(event, Decided) and event.decision.kind == "scan":
            place = region_text(event.decision.regions[0])
            self._why = _clean(f"{step_text(event.step)}, {place}: {event.decision.explanation.why}")
        if not self._steps:  # a resumed session has found something before this view was opened
            self._found = len(state.found())
        if text := _notice(event):
            self._notice, self._why = _clean(text), "" if isinstance(event, Stopped | Paused) else self._why
            self._say(self._notice)
        if isinstance(event, Perceived):
            now = time.monotonic()
            self._found = len(state.found())
            self._steps.append(Step.of(state, event, self._found, now - self._last))
            self._last = now
            self._say(self._steps[-1].line())

    def progress(self, text: str) -> None:
        """What happens after the last exposure."""
        self._phase = _clean(text)
        self._say(self._phase)
        if self._live is not None:
            self._live.refresh()

    # ------------------------------------------------------------ plain lines

    def _say(self, text: str) -> None:
        if self._write is None:
            return
        try:
            self._write(text)
        except OSError:  # nobody reads any more (a closed pipe): the session goes on without its view
            self._write = None

    # ------------------------------------------------------------ the display

    def _draw(self) -> RenderableType:
        """The display as it stands; drawn by Rich's own thread."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.spinner import Spinner
        from rich.table import Table
        from rich.text import Text

        spent, elapsed = self._spent, clock_text(time.monotonic() - self._started)
        parts: list[RenderableType] = [_one_line(self._title, "bold")]
        bar = ProgressBar(total=1.0, completed=min((spent and spent.share) or 0.0, 1.0), complete_style="cyan")
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True)
        head.add_row(bar, _one_line(f"{spent or 'nothing charged yet'}   {self._found} found   {elapsed}"))
        parts.append(head)
        if self._steps:
            parts.append(self._table())
        if self._notice:
            parts.append(_one_line(self._notice, "dim"))
        if self._why:
            parts.append(Text(self._why))
        if self._phase:
            parts.append(Spinner("dots", _one_line(self._phase)))
        return Group(*parts)

    def _table(self) -> RenderableType:
        from rich.table import Table

        assert self._live is not None
        size = self._live.console.size
        shown = [k for k, name in enumerate(_COLUMNS) if size.width >= _NARROW or name not in _DISPENSABLE]
        steps = self._steps[-max(1, min(ROWS, size.height - 8)) :]  # the lines around the table need the rest
        cells = [[step.cells()[k] for k in shown] for step in steps]
        # the reasons get what is left over: a long one must not squeeze the numbers
        widths = [max(map(len, column)) for column in zip([_COLUMNS[k] for k in shown], *cells, strict=True)]
        room = size.width - sum(widths) - 2 * len(widths)
        table = Table(box=None, pad_edge=False, header_style="dim")
        for k in shown:
            table.add_column(_COLUMNS[k], justify="right", no_wrap=True)
        if room >= _REASON:
            table.add_column("why this place", no_wrap=True)
        for step, row in zip(steps, cells, strict=True):
            why = step.why if len(step.why) <= room else f"{step.why[: room - 3]}..."
            table.add_row(*map(_one_line, row), *([_one_line(why)] if room >= _REASON else []))
        return table


def _one_line(text: str, style: str = "") -> Text:
    """Text, never markup: brackets in a name or a reason are just brackets."""
    from rich.text import Text

    return Text(_clean(text), style=style, no_wrap=True, overflow="ellipsis")


def _is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def _print(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)
