"""The networks: local, fused without change, stored and read back, able to learn."""

from __future__ import annotations

import pytest
import torch

from aecontrol.perception import nets

KINDS = [("unet", 4), ("msdnet", 12)]


def trained(kind: nets.NetworkKind, size: int, outputs: int = 2) -> torch.nn.Module:
    """A network whose weights and running statistics are not those of a new one."""
    torch.manual_seed(3)
    net = nets.create(kind, size, outputs)
    for _ in range(3):
        net(torch.randn(2, 1, 32, 32))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net.eval()


@pytest.mark.parametrize(("kind", "size"), KINDS)
def test_what_is_stored_is_what_is_read(kind, size):
    members = [trained(kind, size), trained(kind, size)]
    image = torch.randn(1, 1, 40, 36)
    before = [net(image) for net in members]
    loaded, outputs = nets.load(nets.save(members, kind, size, ("a", "b")))
    assert outputs == ("a", "b")
    for net, logits in zip(loaded, before, strict=True):
        torch.testing.assert_close(net(image), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "size"), KINDS)
def test_nothing_beyond_its_reach_matters(kind, size):
    """Exactly: what windows may leave out."""
    net = nets.for_inference(trained(kind, size))
    reach = net.reach_px
    side = 4 * ((2 * reach + 24) // 4)
    image = torch.randn(1, 1, side, side)
    middle = side // 2
    far = image.clone()
    far[..., : middle - reach] += 5.0
    far[..., middle + reach + 1 :] -= 5.0
    assert torch.equal(net(image)[..., middle], net(far)[..., middle])
    near = image.clone()
    near[..., middle + 2] += 5.0
    assert not torch.equal(net(image)[..., middle], net(near)[..., middle])


@pytest.mark.parametrize("data", [b"", b"not a network", nets.save([nets.UNet(4)], "unet", 8, ("a",))])
def test_foreign_bytes_raise(data):
    from safetensors import SafetensorError

    with pytest.raises((SafetensorError, KeyError, ValueError, RuntimeError)):
        nets.load(data)
