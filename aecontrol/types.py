"""The vocabulary: frozen values that everything else is written in.

Lengths are nm, times s, fluence electrons per square angstrom (e/A^2), electrons whole numbers. Specimen frame:
origin at the top-left corner of the field, +x right (fast scan axis), +y down (slow axis); a rotation > 0 turns +x
towards +y. Arrays are ``[row, col] = [slow, fast]``. Unknown keys and non-finite numbers are refused.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Place = Annotated[float, Field(ge=-1e9, le=1e9)]
"""A coordinate, nm: within a metre, so that no sum of some is beyond a number's range."""
Side = Annotated[float, Field(gt=1e-15, le=1e9)]
"""A length that is divided by, nm: never so small that a quotient is beyond a number's range."""
Dwell = Annotated[float, Field(gt=0, le=1e4)]
"""A dwell time, s."""
INT64_MAX = 2**63 - 1
Count = Annotated[int, Field(ge=0, le=INT64_MAX)]
PositiveInt = Annotated[int, Field(gt=0, le=INT64_MAX)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Model(BaseModel):
    """Base of every value: frozen, unknown keys refused, NaN and infinity refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ScanRegion(Model):
    """Where and how the beam is scanned: an overview, a sub-scan or a candidate; never a bare (x, y).

    Pixel centres lie at ``(col + 1/2, row + 1/2)`` pixel sizes from the region's own corner, turned by
    ``rotation_rad`` about ``center_nm``. Pixels may be non-square.
    """

    center_nm: tuple[Place, Place] = Field(description="centre (x, y) in the specimen frame, nm")
    fov_nm: tuple[Side, Side] = Field(description="width along the fast axis, height along the slow axis, nm")
    rotation_rad: float = Field(0.0, description="turn of the fast axis from +x towards +y, rad")
    shape: tuple[PositiveInt, PositiveInt] = Field(description="(rows, columns)")
    dwell_time_s: Dwell = Field(description="dwell time per pixel, s")
    signal: Literal["images", "spectra"] = Field(
        "images", description="what is recorded: a number per pixel and detector, or a whole spectrum per pixel"
    )
    shift_nm: tuple[Place, Place] = Field(
        (0.0, 0.0), description="how far drift and stage have moved the specimen in the instrument's field"
    )

    @property
    def sent(self) -> ScanRegion:
        """The region in the instrument's own field: where the beam has to be sent to meet the specimen."""
        center = (self.center_nm[0] + self.shift_nm[0], self.center_nm[1] + self.shift_nm[1])
        return self.model_copy(update={"center_nm": center, "shift_nm": (0.0, 0.0)})

    def first_lines(self, rows: int) -> ScanRegion:
        """The region that its first ``rows`` lines cover."""
        height = self.fov_nm[1] * rows / self.shape[0]
        up = (self.fov_nm[1] - height) / 2
        x, y = self.center_nm
        center = (x + up * math.sin(self.rotation_rad), y - up * math.cos(self.rotation_rad))
        update = {"center_nm": center, "fov_nm": (self.fov_nm[0], height), "shape": (rows, self.shape[1])}
        return self.model_copy(update=update)

    @property
    def pixels(self) -> int:
        """Number of pixels."""
        return self.shape[0] * self.shape[1]

    @property
    def pixel_size_nm(self) -> tuple[float, float]:
        """Pixel size (fast, slow), nm."""
        return self.fov_nm[0] / self.shape[1], self.fov_nm[1] / self.shape[0]

    @property
    def area_nm2(self) -> float:
        """Scanned area, nm^2."""
        return self.fov_nm[0] * self.fov_nm[1]

    def corners_nm(self) -> tuple[tuple[float, float], ...]:
        """The four corners (x, y) in the specimen frame, in scan order, the first pixel's first."""
        c, s = math.cos(self.rotation_rad), math.sin(self.rotation_rad)
        hx, hy = self.fov_nm[0] / 2, self.fov_nm[1] / 2
        return tuple(
            (self.center_nm[0] + c * dx - s * dy, self.center_nm[1] + s * dx + c * dy)
            for dx, dy in ((-hx, -hy), (hx, -hy), (hx, hy), (-hx, hy))
        )


class Charge(Model):
    """What an exposure costs. A *bound* (commanded, upper) and a *measured* charge are the same type, kept in
    differently named fields and never mixed."""

    electrons: Count | None = Field(description="electrons; null where the record's dose is unknown")
    pixels: Count = Field(description="pixels; for a record, pixels revealed for the first time")
    peak_fluence_e_per_A2: NonNegative | None = Field(
        None, description="highest fluence that this exposure adds to any 1 nm tile, e/A^2; null where unknown"
    )
    damage: NonNegative = Field(0.0, description="damage charged, nm^2 of wholly damaged specimen")
    damage_basis: Literal["measured", "model", "none"] = "none"
    seconds: NonNegative = Field(description="beam-on time, s")


class Budget(Model):
    """Hard limits of one session on one specimen; null means unlimited. The guard enforces them."""

    electrons: PositiveInt | None = None
    pixels: PositiveInt | None = None
    peak_fluence_e_per_A2: Positive | None = None
    damage: Positive | None = Field(None, description="nm^2 of wholly damaged specimen; needs [damage]")
    seconds: Positive | None = None


class SpectrumAxis(Model):
    """Energy axis of the spectra that an instrument records; ``channel`` names their array [rows, cols, size]."""

    channel: str = "EELS"
    size: PositiveInt = Field(description="number of energy channels")
    offset_eV: float = Field(description="energy loss of the first channel, eV")
    scale_eV: Positive = Field(description="width of a channel, eV")


class Capabilities(Model):
    """What an instrument says of itself; the controller computes every upper bound from it."""

    identity: str = Field(description="which instrument or record this is")
    simulated: bool = Field(description="True when the images are simulated")
    unit: Literal["electrons", "pixels"] = Field(description="currency in which exposures are metered")
    field_nm: tuple[Positive, Positive] = Field(description="width and height of the reachable field, nm")
    channels: tuple[str, ...] = Field(description="detector channels delivered by every exposure")
    beam_current_pA: Positive | None = Field(None, description="declared probe current; null for a record")
    current_tolerance: NonNegative = Field(0.05, description="relative tolerance of the declared current")
    flyback_s: NonNegative = Field(0.0, description="time between two lines, s")
    beam_on_in_flyback: bool = Field(False, description="True when the beam is not blanked between lines")
    blanker_latency_s: NonNegative = Field(0.0, description="longest time the blanker takes to act, s")
    position_error_nm: NonNegative | None = Field(
        0.0, description="farthest that the beam can be from where it was told to go, drift aside, nm; null: no bound"
    )
    drifts: bool = Field(False, description="True when specimen and beam move against each other without a bound")
    dwell_time_range_s: tuple[Positive, Positive] = Field((1e-8, 1.0), description="shortest and longest dwell, s")
    max_pixels: PositiveInt = Field(4096 * 4096, description="largest frame")
    pixel_size_nm: Positive | None = Field(None, description="a record's own pixel; null when any size can be scanned")
    spectra: SpectrumAxis | None = Field(None, description="null when no spectra can be recorded")
    stage_range_nm: Positive | None = Field(
        None, description="farthest that the stage may be moved from where it was, along x or y; null: no stage"
    )
    blanker: bool = Field(True, description="False when the beam cannot be blanked and must be parked instead")
    notes: tuple[str, ...] = Field(
        (), description="what a reader of the results must know, e.g. assumptions of a model"
    )

    @property
    def beam_error_nm(self) -> float | None:
        """Farthest that the beam can be from where on the specimen it is meant to be, nm; None: no bound."""
        return None if self.drifts else self.position_error_nm

    def held(self, drift_nm: float) -> Capabilities:
        """The instrument while its drift is measured and corrected to within ``drift_nm``: it is one more error."""
        error = None if self.position_error_nm is None else self.position_error_nm + drift_nm
        return self.model_copy(update={"position_error_nm": error, "drifts": False})


class ArrayRef(Model):
    """An array stored beside the journal: pixels never travel inside an event."""

    path: str = Field(description="path relative to the session folder")
    shape: tuple[Count, ...]
    dtype: str
    sha256: Sha256 = Field(description="of the file's bytes")


class InstrumentState(Model):
    """What an instrument says of itself at one moment."""

    beam_on: bool = Field(description="True while electrons can reach the specimen")
    clock_s: NonNegative = Field(description="instrument clock, s")
    stage_nm: tuple[float, float] = Field((0.0, 0.0), description="how far the stage has moved the field, nm")
    parked_nm: tuple[float, float] | None = Field(None, description="where the beam rests between scans, if anywhere")
    beam_current_pA: Positive | None = Field(None, description="probe current now, where it can be measured")
    electrons: Count | None = Field(None, description="delivered so far by an independent meter, where there is one")
    interlock: str = Field("", description="why the beam must stay off (vacuum, high voltage, stage moving); or empty")


class Frame(Model):
    """What one exposure gave: one array per detector channel, and how it was taken."""

    region: ScanRegion
    channels: dict[str, ArrayRef]
    electrons_per_pixel: Positive | None = Field(None, description="mean dose of a pixel, electrons; null if unknown")
    started_s: NonNegative = Field(description="instrument clock at the first pixel, s")
    flags: tuple[str, ...] = Field((), description="e.g. 'nan', 'saturated', 'constant', 'dose = upper bound'")

    @property
    def usable(self) -> bool:
        """False when the frame is kept and charged but must never be fed to a model."""
        return not set(self.flags) & {"nan", "saturated", "constant", "partial"}


class Atom(Model):
    """One located atom, column or vacant site, in the specimen frame."""

    x_nm: float
    y_nm: float
    label: str
    confidence: Annotated[float, Field(ge=0, le=1)]
    sigma_x_nm: NonNegative = 0.0
    sigma_y_nm: NonNegative = 0.0
    intensity: float = 0.0


class Observation(Model):
    """What perception made of a frame (of one window of it, for the overview). Features reach a policy only here."""

    region: ScanRegion
    value: float | None = Field(description="target value, larger is better; null when it cannot be told (yet)")
    variance: NonNegative | None = Field(description="variance of the value")
    fidelity_e_per_A2: Positive | None = Field(None, description="fluence of the frame; null for a record")
    features: dict[str, float] = Field(default_factory=dict, description="named numbers a policy may use")
    latent: tuple[float, ...] = Field((), description="mean latent vector of the patches")
    found: tuple[Atom, ...] = Field((), description="target objects found (empty for overview windows)")
    atoms: ArrayRef | None = Field(None, description="float64 table, columns ATOM_COLUMNS")
    patches: ArrayRef | None = Field(None, description="patches cut around the atoms, [n, size, size]")
    patch_atoms: ArrayRef | None = Field(None, description="row in ``atoms`` of each patch, [n]")
    latents: ArrayRef | None = Field(None, description="latent vectors of the patches, [n, d]")
    model: str = Field(description="version (hash) of the perception model")
    embedding: str | None = Field(None, description="version (hash) of the embedding that made the latents")
    note: str = Field("", description="why perception abstained, if it did")


ATOM_COLUMNS = ("x_nm", "y_nm", "label", "confidence", "sigma_x_nm", "sigma_y_nm", "intensity", "target")
ATOM_LABELS = ("atom", "Mo", "S2", "S1", "S0", "C", "Pt", "edge")
"""Columns and class names of the stored atom tables; ``label`` is an index into ATOM_LABELS, ``target`` the
per-atom target score in [0, 1] that colours the latent scatter."""


class Explanation(Model):
    """Why a decision was taken: journaled with it, shown to the user, compared by ``verify``."""

    policy: str
    why: str
    candidate: int | None = Field(None, description="index of the chosen candidate")
    acquisition: float | None = None
    mean: float | None = None
    sd: float | None = None
    fallback: str | None = Field(None, description="which rung of the fallback ladder was used, and why")
    hyperparameters: dict[str, float] = Field(default_factory=dict)
    mean_map: tuple[float, ...] = Field((), description="posterior mean of every candidate, in candidate order")
    sd_map: tuple[float, ...] = Field((), description="posterior standard deviation of every candidate")


class Scan(Model):
    """Expose these regions next."""

    kind: Literal["scan"] = "scan"
    regions: tuple[ScanRegion, ...] = Field(min_length=1, max_length=1)
    role: Literal["overview", "scan", "drift", "reference"] = "scan"
    explanation: Explanation


class Stop(Model):
    """End the session by its own plan."""

    kind: Literal["stop"] = "stop"
    reason: str
    explanation: Explanation


Decision = Annotated[Scan | Stop, Field(discriminator="kind")]


class OverviewPlan(Model):
    """The first, cheap look at the field. Omitted: no overview is taken."""

    fov_nm: tuple[Side, Side] | None = Field(None, description="default: the whole field")
    center_nm: tuple[Place, Place] | None = Field(None, description="default: the middle of the field")
    shape: tuple[PositiveInt, PositiveInt]
    dwell_time_s: Dwell


class WindowPlan(Model):
    """Windows of one size and dwell time on a grid over the field."""

    fov_nm: tuple[Side, Side]
    shape: tuple[PositiveInt, PositiveInt]
    dwell_time_s: Dwell
    stride_nm: tuple[Side, Side] | None = Field(None, description="grid spacing; default: fov_nm, no overlap")


class ScanPlan(WindowPlan):
    """The sub-scans that a policy chooses from: windows of one kind, or of several, on grids over the field."""

    choices: tuple[WindowPlan, ...] = Field(
        (), description="windows of other sizes and dwell times, for the policy to choose from beside the first kind"
    )

    @property
    def kinds(self) -> tuple[WindowPlan, ...]:
        """All kinds of windows, the first one first."""
        return (self, *self.choices)


class DriftPlan(Model):
    """Follow the specimen as it drifts: a reference region is scanned before everything else and again and again, and
    later exposures go where it has moved to. Omitted: drift is not corrected. The region should show something that a
    lattice does not repeat; each of its scans is charged like any other exposure."""

    center_nm: tuple[Place, Place] = Field(description="centre of the reference region in the specimen frame, nm")
    fov_nm: tuple[Side, Side]
    shape: tuple[PositiveInt, PositiveInt]
    dwell_time_s: Dwell
    every: PositiveInt = Field(1, description="measure before the overview or sub-scan after so many of them")
    limit_nm: Positive = Field(
        description="farthest that the specimen may be from where it is expected (it is taken to move on as it did "
        "between the last two measurements); bounds of fluence count on it. On a lattice, where a shift by a lattice "
        "vector shows nothing, it must be less than half the shortest one"
    )
    margin_nm: NonNegative = Field(
        0.0, description="overview and sub-scans keep this far from the field's edges, to stay in it when it drifts"
    )

    @model_validator(mode="after")
    def _measurable(self) -> DriftPlan:
        if min(self.fov_nm) < 8.0 * self.limit_nm:
            raise ValueError(f"drift.fov_nm must be at least 8 times drift.limit_nm, {8.0 * self.limit_nm:g} nm")
        if min(self.shape) < 32:
            raise ValueError(f"drift.shape {self.shape} must have at least 32 rows and columns")
        return self


class ReferencePlan(Model):
    """A place that is sacrificed to learn what the beam does to one phase of the specimen."""

    center_nm: tuple[Place, Place] = Field(description="centre in the specimen frame, nm")
    phase: str = Field("specimen", description="which phase of the specimen lies there")


class DamagePlan(Model):
    """Measure what the beam does, foretell it, and charge for it. Omitted: damage is neither measured nor charged.

    Every reference place is scanned again and again, ``exposures`` times before the first decision, and the metric says
    how much of it changed since its first frame; so does a sub-scan that is taken once more where one was before. From
    that the response of each phase is fitted, and from the response what an exposure would harm.
    """

    metric: str = Field("learned", description="how frames are compared; it must estimate the damaged fraction")
    references: tuple[ReferencePlan, ...] = Field((), description="sacrificed places; none: the prior is all there is")
    fov_nm: tuple[Side, Side] = Field((4.0, 4.0), description="width and height of a reference place, nm")
    shape: tuple[PositiveInt, PositiveInt] = Field((160, 160), description="(rows, columns) of its frames")
    dwell_time_s: Dwell = Field(1e-5, description="dwell time per pixel of its frames, s")
    exposures: Annotated[int, Field(ge=2, le=100)] = Field(5, description="frames of each place before the session")
    every: Count = Field(0, description="one more frame of the next place after so many sub-scans; 0: never")
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.05, description="most of the electrons of the budget that the first frames of all places may take"
    )
    critical_fluence_e_per_A2: Positive = Field(
        1e3,
        description="first guess: fluence at which 1/e of the matter is still undamaged, e/A^2; right to a factor 50",
    )
    exponent: Annotated[float, Field(ge=1, le=4)] = Field(1.0, description="k in 1 - exp(-(F / F_c)^k)")
    sites_per_nm2: Positive = Field(
        20.0, description="atoms or bond units that break by themselves, per nm^2: what chance adds to the forecast"
    )
    gain: Positive = Field(
        1.0, description="what the metric shows of wholly damaged matter of this material, where that is known"
    )
    gain_sd: Positive | None = Field(
        None, description="standard deviation of the logarithm of that; default: the metric's own, for any material"
    )
    quantile: Annotated[float, Field(ge=0.5, lt=1)] = Field(
        0.95, description="chance with which an exposure harms no more than is reserved for it"
    )
    confidence: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="the session ends once the budget of damage is exceeded with this chance"
    )
    alarm: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        1e-3, description="the session pauses when a measurement this unlikely contradicts the forecast"
    )
    limit_nm: Positive = Field(
        0.1, description="farthest that a later frame may lie from the first; on a lattice less than half its spacing"
    )

    @model_validator(mode="after")
    def _comparable(self) -> DamagePlan:
        if min(self.shape) < 80:
            raise ValueError(f"damage.shape {self.shape} must have at least 80 rows and columns, 4 patches a side")
        return self


class AreaPlan(Model):
    """A rectangle of the specimen with limits of its own: electrons = 0 protects it. What falls within 1 nm of it, or
    so near that the beam's position is uncertain, counts as falling into it."""

    name: str
    center_nm: tuple[Place, Place] = Field(description="centre in the specimen frame, nm")
    fov_nm: tuple[Side, Side]
    phase: str | None = Field(None, description="the specimen's phase here; default: the first reference's")
    weight: NonNegative = Field(1.0, description="how much damage here counts")
    electrons: Count | None = Field(None, description="budget of electrons that fall here")
    peak_fluence_e_per_A2: NonNegative | None = Field(None, description="budget of any 1 nm tile of it, e/A^2")
    damage: NonNegative | None = Field(None, description="budget of damage here, nm^2")
    seconds: NonNegative | None = Field(None, description="budget of the time that the beam is here, s")


class StopRules(Model):
    """When to end before the budget does."""

    max_steps: PositiveInt | None = Field(None, description="sub-scans at most (the overview is not counted)")
    max_found: PositiveInt | None = Field(None, description="end once this many target objects are found")


class Plan(Model):
    """All that the pure core needs to know of the user's wishes."""

    overview: OverviewPlan | None = None
    scan: ScanPlan
    drift: DriftPlan | None = None
    damage: DamagePlan | None = None
    areas: tuple[AreaPlan, ...] = ()
    budget: Budget
    stop: StopRules = StopRules()
    decision_seconds: NonNegative = Field(1.0, description="fixed time charged to each decision, s")
    learn_patches: Count = Field(0, description="train the embedding once this many patches are recorded; 0: never")
    match_nm: Positive = Field(description="two finds closer than this are one object, and the scoring gate, nm")

    @property
    def margin_nm(self) -> float:
        """How far overview and sub-scans keep from the field's edges, nm."""
        return 0.0 if self.drift is None else self.drift.margin_nm
