from __future__ import annotations

import numpy as np
import pytest
import torch

from rcu_ops.video.transform import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    FrameTransform,
    center_crop,
    corner_crops,
    flip,
    multi_scale_crop,
    normalize,
    random_crop,
    resize_short_side,
)
from tests.tolerance import assert_close_to_reference


def frames(t=2, height=20, width=30):
    return torch.randint(256, (t, height, width, 3), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (240, 320, (112, 149)),
        (320, 240, (149, 112)),
        (112, 112, (112, 112)),
        (47, 63, (112, 150)),
        (5, 2000, (112, 44800)),
    ],
)
def test_short_side(height, width, expected):
    resized = resize_short_side(frames(1, height, width), 112)
    assert resized.shape == (1, *expected, 3)
    assert resized.dtype == torch.uint8


def test_resizing_is_antialiased_and_keeps_the_mean():
    """A fine checkerboard becomes even grey; without antialiasing it would alias to black or white."""
    board = (torch.arange(128)[:, None] + torch.arange(128)[None, :]) % 2 * 255
    picture = board.to(torch.uint8)[None, :, :, None].expand(1, 128, 128, 3)
    small = resize_short_side(picture, 16)[:, 2:-2, 2:-2].float()
    assert (small - 127.5).abs().max() <= 2


def test_resizing_leaves_a_plain_picture_plain():
    plain = torch.full((1, 37, 53, 3), 201, dtype=torch.uint8)
    assert (resize_short_side(plain, 24) == 201).all()


def test_crops():
    clip = frames(3, 21, 30)
    assert torch.equal(center_crop(clip, 10), clip[:, 5:15, 10:20])
    assert center_crop(clip, 10).data_ptr() == clip[:, 5:, 10:].data_ptr()
    generator = torch.Generator().manual_seed(0)
    corners = set()
    for _ in range(300):
        crop = random_crop(clip, 19, generator=generator)
        assert crop.shape == (3, 19, 19, 3)
        offset = crop.storage_offset() // 3
        corners.add(divmod(offset, 30))
    assert corners == {(y, x) for y in range(3) for x in range(12)}


def test_flip():
    clip = frames()
    assert torch.equal(flip(clip, probability=1.0), clip.flip(2))
    assert flip(clip, probability=0.0) is clip
    generator = torch.Generator().manual_seed(0)
    flipped = sum(flip(clip, generator=generator) is not clip for _ in range(400))
    assert 150 < flipped < 250


def test_pretrained_networks_see_what_they_were_trained_on():
    """Black and white as every ImageNet network has been given them, in numbers from elsewhere."""
    pictures = torch.stack([torch.zeros(1, 1, 3), torch.full((1, 1, 3), 255.0)]).to(torch.uint8)
    seen = FrameTransform(1)(pictures)[..., 0, 0].T
    expected = torch.tensor([[-2.1179, -2.0357, -1.8044], [2.2489, 2.4286, 2.6400]])
    assert torch.allclose(seen, expected, rtol=0, atol=5.1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalize(dtype):
    clip = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(2, 16, 16, 3)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    out = normalize(clip, dtype=dtype)
    assert out.shape == (3, 2, 16, 16)
    assert out.dtype == dtype
    exact = ((clip.double() / 255 - mean.double()) / std.double()).permute(3, 0, 1, 2)
    eager = ((clip.to(dtype) / 255 - mean.to(dtype)) / std.to(dtype)).permute(3, 0, 1, 2)
    assert_close_to_reference(out, exact, eager)
    with pytest.raises(ValueError, match=r"frames: expected \[T, H, W, 1\], got \[2, 16, 16, 3\]"):
        normalize(clip, mean=[0.5], std=[0.5])


def test_frame_transform_is_the_composition():
    image = np.random.default_rng(0).integers(0, 256, (47, 63, 3), dtype=np.uint8)
    transform = FrameTransform(24)
    out = transform(image)
    by_hand = normalize(center_crop(resize_short_side(torch.from_numpy(image)[None], 24), 24))
    assert torch.equal(out, by_hand)
    assert torch.equal(transform(torch.from_numpy(image)), out)
    assert transform(np.stack([image, image])).shape == (3, 2, 24, 24)


def test_frame_transform_gives_channels_last():
    out = FrameTransform(16, dtype=torch.bfloat16)(np.zeros((20, 30, 3), dtype=np.uint8))
    assert out[None].is_contiguous(memory_format=torch.channels_last_3d)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("height", [1, 8, 111, 112, 113, 500])
def test_frame_transform_takes_any_size(height):
    assert FrameTransform(112)(np.zeros((height, 130, 3), dtype=np.uint8)).shape == (3, 1, 112, 112)


def test_errors():
    with pytest.raises(TypeError, match=r"frames: expected uint8, got torch\.float32"):
        resize_short_side(frames().float(), 8)
    for bad in (frames()[0], frames()[..., :1], frames()[:0]):
        with pytest.raises(ValueError, match=r"frames: expected \[T, H, W, 3\]"):
            resize_short_side(bad, 8)
    with pytest.raises(ValueError, match="size: expected 1 to 20 for frames of 30x20, got 21"):
        center_crop(frames(), 21)
    with pytest.raises(ValueError, match="size"):
        FrameTransform(0)
    with pytest.raises(ValueError, match="size"):
        resize_short_side(frames(), 0)
    with pytest.raises(ValueError, match="probability"):
        flip(frames(), probability=1.5)


def test_corner_crops():
    x = frames(3, 20, 30)
    crops = corner_crops(x, 8, mirror=True)
    assert crops.shape == (10, 3, 8, 8, 3)
    expected = [x[:, :8, :8], x[:, :8, 22:], x[:, 12:, :8], x[:, 12:, 22:], center_crop(x, 8)]
    for crop, mirrored, wanted in zip(crops[:5], crops[5:], expected, strict=True):
        assert torch.equal(crop, wanted)
        assert torch.equal(mirrored, wanted.flip(2))
    assert torch.equal(corner_crops(x, 8), crops[:5])
    with pytest.raises(ValueError, match="size"):
        corner_crops(x, 21)


def test_multi_scale_crop():
    x = frames(2, 40, 60)
    sizes = set()
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        crop = multi_scale_crop(x, 40, generator=generator)
        assert crop.shape == (2, 40, 40, 3)
        assert crop.dtype == torch.uint8
        assert torch.equal(crop, multi_scale_crop(x, 40, generator=torch.Generator().manual_seed(seed)))
        sizes.add(crop.float().mean().item())
    assert len(sizes) > 30
    whole = multi_scale_crop(x, 40, scales=(1000,), generator=torch.Generator().manual_seed(0))
    assert any(torch.equal(whole, crop) for crop in corner_crops(x, 40))
    constant = torch.full((1, 33, 47, 3), 77, dtype=torch.uint8)
    assert (multi_scale_crop(constant, 16) == 77).all()
    with pytest.raises(ValueError, match="scales"):
        multi_scale_crop(x, 8, scales=(1200,))
    with pytest.raises(ValueError, match="size"):
        multi_scale_crop(x, 0)
