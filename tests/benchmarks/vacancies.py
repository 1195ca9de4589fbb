"""Missing sulphur in MoS2: recall and precision without any hint, with the lattice known, and at the Poisson limit.

    python tests/benchmarks/vacancies.py [--counts 50 100 200] [--shares 0.02 0.05 0.1 0.2 0.3] [--seeds 8]

Frames of 8 x 8 nm from the probe-based renderer. ``share``: of S sites that miss something, three quarters of them one
S of two (1S), the others both (2S). "finder": from the image alone, end to end. "no hint" and "hint": the atoms are
given, the occupied columns' true places, each off by its share of noise. The oracle knows every other column, the
background, the spot and the shares exactly and decides by the Poisson likelihood ratio: no method can do better from
the same counts. "best": largest recall at a precision of at least 0.95, the threshold chosen on these frames (among
finds that are more probable than not); then all as reported, at the expected false discovery rate that ships, for the
oracle too. "kind": of the vacancies found, how many are rightly told 1S or 2S.
"2S": recall of 2S vacancies alone.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from aecontrol.perception.finder import AtomFinder, Found
from aecontrol.perception.lattice import LatticeHint
from aecontrol.perception.sites import name_sites
from aecontrol.perception.targets import FALSE_DISCOVERY, report
from aecontrol.types import ScanRegion
from simulators.optics import Optics
from simulators.render import Renderer
from simulators.scan import nominal_positions_nm
from simulators.specimens.base import Specimen
from simulators.specimens.sheets import Mos2, SulphurVacancies

FOV_NM, PIXELS = 8.0, 256
RIM_NM = 0.2
PRECISION = 0.95
GATE_NM = 0.08
TWO_OF = 0.25
BACKGROUND = 1e-5
RENDERER = Renderer(Optics())

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Frame:
    """One frame: counts, the expected counts, S sites [n, 2] px with the atoms ``left`` in each [n], what one S column
    of two atoms adds to the image at each site, and the atoms a finder would report."""

    image: NDArray[np.int64]
    expected: Floats
    xy_px: Floats
    left: NDArray[np.int64]
    found: Found


def frame(seed: int, share: float, counts: float) -> Frame:
    """Frame ``seed`` with ``share`` of its S sites lacking atoms, at ``counts`` per full S column."""
    random = np.random.default_rng([seed, round(1e4 * share), round(counts)])
    whole = Mos2(
        size_nm=(FOV_NM + 1, FOV_NM + 1),
        rotation_deg=11.0 + 17 * seed,
        vacancies=SulphurVacancies(background_fraction=0.0, n_clusters=0),
    ).build(seed)
    sulphur = np.flatnonzero(whole.site == "S")
    _, column = np.unique(whole.column_id[sulphur], return_inverse=True)
    draw = random.random(column.max() + 1)
    lost = np.where(draw < TWO_OF * share, 2, np.where(draw < share, 1, 0))
    order = np.argsort(column, kind="stable")
    place = np.empty(len(sulphur), dtype=np.int64)
    place[order] = np.arange(len(sulphur)) % 2
    alive = whole.alive.copy()
    alive[sulphur[place < lost[column]]] = False
    holed = whole.changed(alive, whole.positions_A)
    expected = _expected(holed, counts)
    image = random.poisson(expected)
    first = np.unique(column, return_index=True)[1]
    corner = 0.5
    scale = FOV_NM / PIXELS
    at = (whole.positions_A[sulphur[first], :2] / 10 - corner) / scale
    left = 2 - lost
    molybdenum = (whole.positions_A[whole.site == "Mo", :2] / 10 - corner) / scale
    return Frame(image, expected, at, left, _found(random, molybdenum, at[left > 0], left[left > 0], counts))


def _expected(specimen: Specimen, counts: float) -> Floats:
    region = ScanRegion(
        center_nm=(FOV_NM / 2 + 0.5, FOV_NM / 2 + 0.5),
        fov_nm=(FOV_NM, FOV_NM),
        shape=(PIXELS, PIXELS),
        dwell_time_s=1e-6,
    )
    fraction = RENDERER.render(specimen, nominal_positions_nm(region)).channels["HAADF"]
    per_pixel = counts / (2 * RENDERER.objects["HAADF"].strength_A2(16)) * (10 * FOV_NM / PIXELS) ** 2
    return np.asarray(per_pixel * (fraction + BACKGROUND), dtype=np.float64)


def _found(random: np.random.Generator, mo: Floats, s: Floats, left: NDArray[np.int64], counts: float) -> Found:
    """What a finder at the physical limit reports: positions off by 1.3 blur / sqrt(N)."""
    at = np.concatenate([mo, s])
    number = counts * np.concatenate([np.full(len(mo), 2.7), left / 2])
    sigma = 1.3 * 0.05 * PIXELS / FOV_NM / np.sqrt(number)
    at = at + random.normal(size=at.shape) * sigma[:, None]
    inside = ((at > 0) & (at < PIXELS)).all(1)
    at, number, sigma = at[inside], number[inside], sigma[inside]
    error = 1.5 * np.sqrt(number)
    return Found(
        x_px=at[:, 0],
        y_px=at[:, 1],
        confidence=np.ones(len(at)),
        sigma_x=sigma,
        sigma_y=sigma,
        intensity=np.maximum(number + error * random.normal(size=len(at)), 1.0),
        sigma_intensity=error,
        disagreement=np.zeros(len(at)),
        spread_nm=np.zeros(len(at)),
        completed=np.zeros(len(at), dtype=bool),
        background=0.0,
        blur_nm=0.05,
    )


@dataclass
class Tally:
    """Scores and truth of everything judged, collected over frames."""

    score: list[Floats] = field(default_factory=list)
    lacking: list[NDArray[np.int64]] = field(default_factory=list)
    reported: list[NDArray[np.bool_]] = field(default_factory=list)
    told: list[NDArray[np.int64]] = field(default_factory=list)

    def add(self, score: Floats, lacking: NDArray[np.int64], told: NDArray[np.int64]) -> None:
        """One frame: per site the score, the atoms lacking, and the number told lacking (0: not reported)."""
        self.score.append(score)
        self.lacking.append(lacking)
        self.told.append(told)

    def line(self) -> str:
        """Recall at the best threshold; recall, precision, F1, right kind and recall of 2S as reported."""
        score, lacking, told = (np.concatenate(x) for x in (self.score, self.lacking, self.told))
        order = np.argsort(-score, kind="stable")
        right = np.cumsum(lacking[order] > 0)
        precise = right / np.arange(1, len(right) + 1) >= PRECISION
        best = right[precise].max(initial=0) / max((lacking > 0).sum(), 1)
        hits = ((lacking > 0) & (told > 0)).sum()
        recall, precision = hits / max((lacking > 0).sum(), 1), hits / max((told > 0).sum(), 1)
        kind = ((lacking > 0) & (told == lacking)).sum() / max(hits, 1)
        double = ((lacking == 2) & (told > 0)).sum() / max((lacking == 2).sum(), 1)
        f1 = 2 * precision * recall / max(precision + recall, 1e-9)
        return f"{best:6.3f} {recall:7.3f} {precision:6.3f} {f1:6.3f} {kind:6.3f} {double:6.3f}"


def oracle(f: Frame, spot: Floats, share: float) -> tuple[Floats, NDArray[np.int64]]:
    """Posterior that a site lacks atoms, all else known, and the most probable number lacking where it is reported.

    ``spot`` [n, w, w]: what one full S column adds in a window about each site.
    """
    half = spot.shape[1] // 2
    padded, counts = (np.pad(a.astype(float), half) for a in (f.expected, f.image))
    log = np.empty((len(f.left), 3))
    for i, ((x, y), left) in enumerate(zip(np.floor(f.xy_px).astype(int), f.left, strict=True)):
        window = (slice(y, y + 2 * half + 1), slice(x, x + 2 * half + 1))
        rest = padded[window] - spot[i] * (left / 2)
        for state in (0, 1, 2):  # atoms lacking
            model = np.maximum(rest + spot[i] * (1 - state / 2), 1e-9)
            log[i, state] = np.where(padded[window] > 0, counts[window] * np.log(model) - model, 0.0).sum()
    log += np.log([1 - share, (1 - TWO_OF) * share, TWO_OF * share])
    p = np.exp(log - log.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    told = np.zeros(len(p), dtype=np.int64)
    rows = list(report(1 - p[:, 0]))
    told[rows] = 1 + (p[rows, 2] > p[rows, 1])
    return 1 - p[:, 0], told


def drawn_spots(f: Frame, counts: float, half: int = 9) -> Floats:
    """What a full S column adds about each site, from the renderer's own image of one column."""
    cell = Mos2(
        size_nm=(FOV_NM + 1, FOV_NM + 1), vacancies=SulphurVacancies(background_fraction=0.0, n_clusters=0)
    ).build(0)
    alone = np.zeros(len(cell.alive), dtype=bool)
    sulphur = np.flatnonzero(cell.site == "S")
    middle = np.argmin(np.hypot(*(cell.positions_A[sulphur, :2] / 10 - FOV_NM / 2 - 0.5).T))
    alone[cell.column_id == cell.column_id[sulphur[middle]]] = True
    picture = _expected(cell.changed(alone, cell.positions_A), counts)
    picture = picture - picture.min()
    at = (cell.positions_A[sulphur[middle], :2] / 10 - 0.5) * PIXELS / FOV_NM
    from scipy.ndimage import map_coordinates

    offset = np.arange(-half, half + 1)
    rows = np.floor(f.xy_px[:, 1])[:, None] + 0.5 + offset - f.xy_px[:, 1:2] + at[1] - 0.5
    cols = np.floor(f.xy_px[:, 0])[:, None] + 0.5 + offset - f.xy_px[:, :1] + at[0] - 0.5
    grid = np.stack(np.broadcast_arrays(rows[:, :, None], cols[:, None, :]))
    return np.asarray(map_coordinates(picture, grid, order=3))


def method(f: Frame, hint: LatticeHint | None) -> tuple[Floats, NDArray[np.int64]]:
    """Score (0 below 1/2) and number told lacking per true S site."""
    score, told = np.zeros(len(f.left)), np.zeros(len(f.left), dtype=np.int64)
    pixel = (FOV_NM / PIXELS, FOV_NM / PIXELS)
    for false_discovery in (1.0, FALSE_DISCOVERY):
        missing = name_sites(f.found, f.image, pixel, hint, false_discovery).missing
        told[:] = 0
        if not len(missing):
            continue
        off, site = cKDTree(f.xy_px).query(np.stack([missing.x_px, missing.y_px], 1))
        near = off * pixel[0] < GATE_NM
        score[site[near]] = missing.confidence[near]
        double = np.array([label.endswith("vacant") or label == "S0" for label in missing.label])
        told[site[near]] = 1 + double[near]
    return score, told


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=float, nargs="+", default=[50.0, 100.0, 200.0])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2, 0.3])
    parser.add_argument("--seeds", type=int, default=8)
    options = parser.parse_args()
    finder = AtomFinder()
    print("counts share method       best | recall precis     F1   kind     2S")
    for counts in options.counts:
        for share in options.shares:
            rows = {name: Tally() for name in ("finder", "no hint", "hint", "oracle")}
            for seed in range(options.seeds):
                f = frame(seed, share, counts)
                edge = RIM_NM * PIXELS / FOV_NM
                inner = np.asarray(((f.xy_px > edge) & (f.xy_px < PIXELS - edge)).all(1))
                lacking = 2 - f.left
                whole = replace(f, found=finder.find(f.image, (FOV_NM / PIXELS, FOV_NM / PIXELS)))
                results = {"finder": method(whole, None), "no hint": method(f, None), "hint": method(f, LatticeHint())}
                seen = np.asarray(((f.xy_px > 0) & (f.xy_px < PIXELS)).all(1))
                inside = Frame(f.image, f.expected, f.xy_px[seen], f.left[seen], f.found)
                p, told = oracle(inside, drawn_spots(inside, counts), share)
                score, number = np.zeros(len(seen)), np.zeros(len(seen), dtype=np.int64)
                score[seen], number[seen] = p, told
                results["oracle"] = score, number
                for name, (s, t) in results.items():
                    rows[name].add(s[inner], lacking[inner], t[inner])
            for name, tally in rows.items():
                print(f"{counts:6.0f} {share:5.2f} {name:8} {tally.line()}", flush=True)


if __name__ == "__main__":
    main()
