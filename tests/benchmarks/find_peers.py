"""What a peer finds in one image, run by the peer's own python: see find_precision.py.

    python find_peers.py atomap SCRATCH
    python find_peers.py atomai SCRATCH MODEL

SCRATCH holds ``image.npy`` and, for atomap, ``start.npy`` [n, 2] (x, y; the centre of pixel [0, 0] is (0, 0)); written
is ``found.npz`` with ``at_px`` [n, 2] alike and the CPU seconds ``cpu_s``. MODEL: atomai's network is read from
MODEL.tar; where there is none it is trained first on the images and masks [n, 1, rows, cols] in MODEL.npz.
"""

import sys
import time
import types
import warnings
from pathlib import Path

import numpy as np

warnings.filterwarnings("ignore")
CYCLES, BATCH = 160, 8


def atomap(image, start):
    """Centre of mass, then 2-D Gaussians, as atomap's guide does, from the given starts."""
    from atomap.api import Sublattice

    columns = Sublattice(start, image=image)
    clock = time.process_time()
    columns.find_nearest_neighbors()
    columns.refine_atom_positions_using_center_of_mass(show_progressbar=False)
    columns.refine_atom_positions_using_2d_gaussian(show_progressbar=False)
    return np.array(columns.atom_positions), time.process_time() - clock


def stand_in_for_torchvision():
    """AtomAI asks for names of it that are not used here; the wheel does not import beside torch for CPUs."""
    whole, models, utils = (types.ModuleType(f"torchvision{part}") for part in ("", ".models", ".utils"))
    whole.models, whole.utils, whole.__path__, utils.make_grid = models, utils, [], None
    for name in ("mobilenet_v2", "resnet18", "resnet50", "vgg16"):
        setattr(models, name, None)
    sys.modules.update({module.__name__: module for module in (whole, models, utils)})


def atomai(image, name):
    """AtomAI's U-Net of default size with its own locator."""
    stand_in_for_torchvision()
    import atomai as aoi

    if not Path(f"{name}.tar").exists():
        data = np.load(f"{name}.npz")
        images, masks = data["images"], data["masks"]
        judged = len(images) // 8
        model = aoi.models.Segmentor("Unet", nb_classes=1)
        settings = {"training_cycles": CYCLES, "batch_size": BATCH, "full_epoch": False, "print_loss": CYCLES}
        model.fit(
            images[judged:], masks[judged:], images[:judged], masks[:judged],
            plot_training_history=False, filename=f"{name}_last", **settings,
        )  # fmt: skip
        model.save_model(name)
    model = aoi.load_model(f"{name}.tar")
    aoi.predictors.SegPredictor(model.net, nb_classes=1, verbose=False).run(image[None, :64, :64])
    clock = time.process_time()
    found = aoi.predictors.SegPredictor(model.net, nb_classes=1, verbose=False).run(image[None])[1][0]
    return found[:, 1::-1], time.process_time() - clock


if __name__ == "__main__":
    peer, scratch, *rest = sys.argv[1:]
    picture = np.load(f"{scratch}/image.npy")
    at, cpu = atomap(picture, np.load(f"{scratch}/start.npy")) if peer == "atomap" else atomai(picture, rest[0])
    np.savez(f"{scratch}/found.npz", at_px=at, cpu_s=cpu)
