"""After the last exposure: score the finds against the truth (where one is known), compare, report.

Nothing here can reach the session: it has ended, and the comparisons expose fresh copies of a simulated specimen or of
a record in folders of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from aecontrol.config import SessionConfig, parse
from aecontrol.dose import bound_charge
from aecontrol.durable import write_durable
from aecontrol.events import Decided, step_text
from aecontrol.harm_figure import response_lines
from aecontrol.protocols import HasTruth, Truth
from aecontrol.scoring import recall_curve, score
from aecontrol.session import Session
from aecontrol.state import State
from aecontrol.types import ScanRegion

Progress = Callable[[str], None]


def conclude(
    folder: Path, config: SessionConfig, state: State, device: str, wall_seconds: float, progress: Progress
) -> dict[str, Any]:
    """Score, compare, write ``summary.json`` and ``report.html``; returns the summary.

    ``contract`` is what ``--json`` prints, ``lines`` what a person reads last, ``curve`` and ``comparison`` what the
    report draws. A paused session is summarised without comparisons. Raises as a session does.
    """
    from aecontrol.report import write_report

    truth = known_truth(folder, config)
    unit = "pixels" if state.capabilities is not None and state.capabilities.unit == "pixels" else "electrons"
    contract = contract_of(folder, state, truth, wall_seconds)
    comparison: dict[str, Any] = {}
    if state.stopped is not None and config.tables.compare is not None and truth is not None:
        for kind in config.tables.compare.policies:
            progress(f"comparison: {kind} at the same dose, on a fresh copy")
            comparison[kind] = _compare(folder, config, state, kind, truth, device)
        comparison["oracle"] = {"curve": _oracle(state, truth)}
    summary: dict[str, Any] = {
        "contract": contract,
        "unit": unit,
        "curve": _curve(state, truth),
        "comparison": comparison,
        "electrons_delivered": None if truth is None else truth.electrons_delivered,
        "truth": None if truth is None else {"positions_nm": truth.targets.tolist(), "labels": list(truth.labels)},
    }
    summary["beam"] = beam_damage(state, truth)
    summary["lines"] = _lines(folder, state, summary, unit)
    write_durable(folder / "summary.json", json.dumps(summary).encode())
    progress("report")
    write_report(folder)
    return summary


def known_truth(folder: Path, config: SessionConfig) -> Truth | None:
    """The true target objects, where the instrument knows them."""
    microscope = config.driver.build(folder / "instrument", config.base, config.tables.session.seed)
    try:
        return microscope.truth(config.perceiver.target_kind) if isinstance(microscope, HasTruth) else None
    finally:
        microscope.close()


def contract_of(folder: Path, state: State, truth: Truth | None, wall_seconds: float) -> dict[str, Any]:
    """The machine-readable result of ``run`` and ``resume``."""
    budget, charged = state.plan.budget, state.charged
    metered = state.capabilities is not None and state.capabilities.unit == "electrons"
    found = state.found()
    result = None
    if truth is not None:
        result = score(_positions(state), truth.targets, state.plan.match_nm, [atom.confidence for atom in found])
    steps = [d.wall_s for d in state.decisions if d.step > 0]
    stopped = state.stopped
    return {
        "session": str(folder),
        "steps": state.step,
        "stopped": {
            "kind": stopped.cause if stopped else "paused",
            "reason": stopped.reason if stopped else state.paused,
        },
        "electrons": {"budget": budget.electrons, "spent": charged.electrons} if metered else None,
        "pixels": {"budget": budget.pixels, "spent": charged.pixels},
        "damage": {
            "budget": budget.damage,
            "charged": charged.damage,
            "basis": state.harm.total.basis if state.harm else "none",
        },
        "targets": {
            "found": len(found),
            "true": result.true if result else None,
            "precision": result.precision if result else None,
            "recall": result.recall if result else None,
        },
        "step_seconds": {
            "median": float(np.median(steps)) if steps else None,
            "p95": float(np.percentile(steps, 95)) if steps else None,
        },
        "wall_seconds": wall_seconds,
        "decisions": [_decision(d) for d in state.decisions if d.decision.kind == "scan" and d.step >= 0],
    }


def beam_damage(state: State, truth: Truth | None) -> dict[str, int] | None:
    """What the beam did while the session ran, where the instrument knows: changes by kind, and ``finds``, those of the
    finds that match no true object but a site that an atom left under the beam. None where it is not known."""
    if truth is None or truth.atoms is None:
        return None
    counted = dict.fromkeys(sorted({change.kind for change in truth.changes}), 0)
    for change in truth.changes:
        counted[change.kind] += 1
    emptied = np.array(
        [change.position_nm for change in truth.changes if change.kind in ("removed", "displaced")]
    ).reshape(-1, 2)
    found = _positions(state)
    before, after = (
        score(found, there, state.plan.match_nm).matched
        for there in (truth.targets, np.concatenate([truth.targets, emptied]))
    )
    return {**counted, "finds": after - before}


def _decision(decided: Decided) -> dict[str, Any]:
    assert decided.decision.kind == "scan"
    x, y = decided.decision.regions[0].center_nm
    return {"step": decided.step, "x_nm": x, "y_nm": y}


def _positions(state: State) -> Any:
    return np.array([(atom.x_nm, atom.y_nm) for atom in state.found()], float).reshape(-1, 2)


def _curve(state: State, truth: Truth | None) -> dict[str, list[float]]:
    """Charge after every exposure, with the finds and the true finds so far."""
    charges: list[float] = []
    finds: list[Any] = []
    by_key = {scan.key: scan.observation for scan in state.scans}
    spent = 0
    for key, record in state.keys.items():
        spent += record.charge.pixels if record.charge.electrons is None else record.charge.electrons
        if record.state == "VOID":
            continue
        charges.append(float(spent))
        found = by_key[key].found if key in by_key else ()
        finds.append(np.array([(a.x_nm, a.y_nm) for a in found], float).reshape(-1, 2))
    curve = {"charge": charges, "reported": np.cumsum([len(f) for f in finds]).tolist() if finds else []}
    if truth is not None and len(truth.targets):
        recall = recall_curve(finds, truth.targets, state.plan.match_nm)
        curve["matched"] = (recall * len(truth.targets)).round().tolist()
    return curve


def _compare(folder: Path, config: SessionConfig, state: State, kind: str, truth: Truth, device: str) -> dict[str, Any]:
    """Another policy at the dose of this session, on a fresh copy of the same specimen."""
    compare = config.tables.compare
    assert compare is not None
    raw = {key: value for key, value in config.raw.items() if key not in ("compare", "stop")}
    raw["policy"] = {"kind": kind}
    raw["session"] = {**raw["session"], "seed": state.seed, "learn_patches": 0}
    if not compare.overview:
        raw.pop("overview", None)
    if state.stopped is not None and state.stopped.cause != "budget":  # then the dose is what was spent, not the budget
        spent = state.charged
        raw["budget"] = {"electrons": spent.electrons} if spent.electrons else {"pixels": spent.pixels}
    path = folder / "compare" / kind
    exists = (path / "session.sqlite").exists()
    session = Session.reopen(path) if exists else Session.create(parse(raw, config.base), path)
    try:
        other = session.run(None, device)
    finally:
        session.close()
    contract = contract_of(path, other, truth, 0.0)
    return {"contract": contract, "curve": _curve(other, truth)}


def _oracle(state: State, truth: Truth) -> dict[str, list[float]]:
    """Charge and finds of one who knows the truth and sees every object in a window: most unseen objects first, no
    overview, the same windows and budget. A bound in practice, for the plots; it never takes part in a session."""
    assert state.capabilities is not None
    left = np.ones(len(truth.targets), bool)
    inside = np.array([_inside(region, truth.targets) for region in state.candidates])
    charges = [bound_charge(region, state.capabilities) for region in state.candidates]
    cost = np.array([c.pixels if c.electrons is None else c.electrons for c in charges], float)
    budget = state.plan.budget.pixels if charges[0].electrons is None else state.plan.budget.electrons
    waiting = np.ones(len(cost), bool)
    curve: dict[str, list[float]] = {"charge": [], "matched": []}
    spent = 0.0
    while waiting.any():
        index = int(np.argmax(np.where(waiting, (inside & left).sum(axis=1), -1)))
        spent += cost[index]
        if budget is not None and spent > budget:
            break
        waiting[index], left = False, left & ~inside[index]
        curve["charge"].append(spent)
        curve["matched"].append(float((~left).sum()))
    return curve


def _inside(region: ScanRegion, positions_nm: Any) -> Any:
    """Which positions [n, 2] lie in a region that is not turned (candidates never are)."""
    offset = positions_nm - np.array(region.center_nm)
    half = np.array(region.fov_nm) / 2
    return ((offset >= -half) & (offset < half)).all(axis=1)


def _lines(folder: Path, state: State, summary: dict[str, Any], unit: str) -> list[str]:
    """What a person reads last."""
    contract = summary["contract"]
    stop = contract["stopped"]
    lines = [f"stopped after {contract['steps']} sub-scans ({stop['kind']}): {stop['reason']}"]
    lines.append(_result_line("this session", contract, summary["curve"], unit))
    for kind, other in summary["comparison"].items():
        if kind != "oracle":
            line = _result_line(f"{kind}, fresh copy", other["contract"], other["curve"], unit)
            ours, theirs = _rate(contract, summary["curve"], unit), _rate(other["contract"], other["curve"], unit)
            ratio = f"; this session found {ours / theirs:.2f} times as many per {unit[:-1]}" if theirs else ""
            lines.append(line + ratio)
    if summary["comparison"] and contract["targets"]["true"]:
        lines += _recall_table(summary, unit)
    if state.harm is not None:
        damage = contract["damage"]
        of = "" if damage["budget"] is None else f" of {damage['budget']:.4g}"
        lines.append(f"damage: {damage['charged']:.4g}{of} nm^2 charged (basis {damage['basis']})")
        lines += [f"  {line}" for line in response_lines(state.harm)]
    beam = summary["beam"]
    if beam and len(beam) > 1:
        did = ", ".join(f"{count} {kind}" for kind, count in beam.items() if kind != "finds")
        lines.append(
            f"the beam changed atoms: {did}; {beam['finds']} finds are vacancies of its own making, not true ones"
        )
    for record in state.keys.values():
        if record.state == "INDET":
            kept = "frame kept" if record.digests else "frame lost"
            lines.append(f"{step_text(record.step)}: interrupted exposure, charged in full at its bound, {kept}")
    lines.append(f"report: {folder / 'report.html'}")
    return lines


def _recall_table(summary: dict[str, Any], unit: str) -> list[str]:
    """Recall at quarters of what this session was charged, beside the others and one who knows the truth."""
    true, full = summary["contract"]["targets"]["true"], summary["curve"]["charge"][-1]
    marks = [full * quarter / 4 for quarter in (1, 2, 3, 4)]
    lines = [f"recall once {', '.join(f'{mark:.3g}' for mark in marks)} {unit} were charged:"]
    curves = {"this session": summary["curve"]} | {k: other["curve"] for k, other in summary["comparison"].items()}
    for name, curve in curves.items():
        reached = [[m for c, m in zip(curve["charge"], curve["matched"], strict=True) if c <= mark] for mark in marks]
        lines.append(f"  {name:<14}" + "  ".join(f"{(r[-1] if r else 0) / true:.2f}" for r in reached))
    return lines


def _rate(contract: dict[str, Any], curve: dict[str, Any], unit: str) -> float:
    """True finds per electron or pixel charged."""
    matched = curve.get("matched") or [0.0]
    return float(matched[-1]) / max(int(contract[unit]["spent"]), 1)


def _result_line(name: str, contract: dict[str, Any], curve: dict[str, Any], unit: str) -> str:
    targets = contract["targets"]
    amount = contract["electrons"]["spent"] if unit == "electrons" else contract["pixels"]["spent"]
    budget = contract["electrons"]["budget"] if unit == "electrons" else contract["pixels"]["budget"]
    text = f"{name}: {targets['found']} found"
    if targets["true"] is not None:
        matched = curve.get("matched") or [0]
        precision = "-" if targets["precision"] is None else f"{targets['precision']:.2f}"
        text += f", {matched[-1]:.0f} of {targets['true']} true ones (precision {precision})"
    spent = f"{amount:.4g}" if unit == "electrons" else f"{amount}"
    of = "" if budget is None else f" of {budget:.4g}"
    return f"{text}; {spent}{of} {unit} charged"


def finished_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a session that has been concluded, else None."""
    path = folder / "summary.json"
    if not path.is_file() or not (folder / "report.html").is_file():
        return None
    summary: dict[str, Any] = json.loads(path.read_bytes())
    return None if summary["contract"]["stopped"]["kind"] == "paused" else summary
