"""Small tensors in one buffer."""

import pytest
import torch

from dsd_fast.upload import Pack


def _tensors(scale: int) -> dict[str, torch.Tensor]:
    return {
        "levels": torch.tensor([3, 7, 11]) * scale,
        "flags": torch.tensor([True, False, True]),
        "expanded": torch.tensor(5 * scale).expand(3),
        "weights": torch.rand(3, 2) * scale,
        "none": torch.zeros(0),
    }


def test_pack_is_its_tensors_on_the_device(device: torch.device) -> None:
    tensors = _tensors(1)
    pack = Pack(tensors, device).to(device)
    assert pack.buffer.device.type == device.type
    for name, tensor in tensors.items():
        assert pack[name].dtype == tensor.dtype and torch.equal(pack[name].cpu(), tensor)
        assert pack[name].data_ptr() % 16 == 0 and pack[name].is_contiguous()


def test_pack_takes_over_another_in_place(device: torch.device) -> None:
    pack, other = Pack(_tensors(1), device).to(device), Pack(_tensors(2), device)
    before = pack["levels"]
    pack.copy_(other)
    assert before.tolist() == [6, 14, 22]
    assert torch.equal(pack["weights"].cpu(), other["weights"])
    pack["levels"].zero_()
    assert other["levels"].tolist() == [6, 14, 22]
    with pytest.raises(ValueError, match="pack of the same tensors"):
        pack.copy_(Pack({"levels": torch.zeros(3)}, device))
