"""Code for a GPU on the meta device: shapes and devices are checked, small data is kept, bytes are counted."""

import pytest
import torch

from g2rpo_ray.allocations import Allocations, held_bytes, peak_bytes
from g2rpo_ray.without_data import META, without_data


def test_sizes_masks_and_positions_keep_their_data():
    with without_data():
        grid = torch.tensor([[1, 4, 6], [1, 2, 2]], device=META)
        assert grid.prod(-1).tolist() == [24, 4]
        assert [int(height) for _, height, _ in grid] == [4, 2]
        assert torch.arange(5, device=META)[2:].numpy().tolist() == [2, 3, 4]
        mask = torch.zeros(2, 6, dtype=torch.bool, device=META)
        mask[:, 1:3] = True
        assert mask.nonzero().shape == (4, 2)
        assert bool(mask.any())
        assert not mask[:, 3:].any()


def test_a_size_that_depends_on_known_data_is_the_right_one():
    with without_data():
        large, rows = torch.empty(3, 500, 500, device=META), torch.tensor([True, False, True], device=META)
        assert large[rows].shape == (2, 500, 500)
        result = torch.zeros_like(large)
        result[rows] = large[rows]
        assert large.repeat_interleave(torch.tensor([1, 2, 0], device=META), 0).shape == large.shape
        assert large[large > 0].shape == (3 * 500 * 500,)  # unknown: all


def test_what_is_unknown_is_zero_on_the_host():
    with without_data():
        large = torch.rand(300, device=META)
        assert float(large.sum()) == 0
        assert large.cpu().numpy().tolist() == [0] * 300
        copy = torch.ones(300)
        copy.copy_(large)
        assert copy.sum() == 0
        assert large.to("cpu", torch.float16).dtype == torch.float16


def test_wrong_shapes_and_mixed_devices_fail_as_on_a_gpu():
    with without_data():
        large = torch.empty(300, 300, device=META)
        with pytest.raises(RuntimeError, match="must match the size"):
            large + torch.empty(2, 300, device=META)
        with pytest.raises(RuntimeError, match="device"):
            large + torch.ones(300)
        with pytest.raises(RuntimeError, match="expected one dtype"):
            large @ torch.empty(300, 300, dtype=torch.bfloat16, device=META)
        with pytest.raises(RuntimeError, match="expected one dtype"):
            torch.nn.Linear(300, 2, dtype=torch.bfloat16, device=META)(large)
        assert (large + torch.tensor(1.0)).is_meta  # a number may be on the host


def test_bytes_are_counted_by_category_and_device():
    def decode(x):
        return torch.cat([x] * 8)

    before = held_bytes()
    with without_data(), Allocations("units") as allocations:
        run, host = allocations.apart("decode", decode), torch.ones(10**6)
        x = torch.empty(1000, device=META)
        y = x + 1
        del x
        image, z = run(y), y + 1
    assert allocations.peaks == {"units": 8000, "decode": 32000}
    assert held_bytes() - before == 4 * (1000 + 8000 + 1000)
    assert host.sum() == 10**6
    del y, image, z
    assert held_bytes() == before


def test_attention_keeps_no_scores():
    q = torch.empty(1, 2, 1000, 8, device=META, requires_grad=True)

    def run():
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()

    with without_data():
        assert peak_bytes(run) < 5 * 4 * q.numel()
    real = torch.rand(1, 2, 1000, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(real, real, real)
    assert expected.abs().sum() > 0  # it is PyTorch's own again
