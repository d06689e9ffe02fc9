"""Augmentation of large pictures against torchvision and Pillow, and the distribution of its draws."""

import itertools
import os

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import ColorJitter, RandomResizedCrop

from tailcal import largeaugment as la
from tailcal.draws import Draws
from tests.test_autoaugment import other_images

ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
SHAPES = [(3, 48, 48), (3, 40, 61), (1, 61, 40)]
ORDERS = list(itertools.permutations(range(3)))
N_DRAWS = 20_000
N_REFERENCE = 5_000
SIGMAS = 5  # of a share or a mean: about one in two million for each one compared, and the draws are seeded


def examples(shape: tuple[int, int, int], n: int, seed: int = 0) -> Tensor:
    """Noise, smooth, black-and-white and constant images in turn, uint8 [n, C, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    c, h, w = shape
    images = torch.randint(256, (n, c, h, w), generator=generator)
    tilt = torch.rand(2, n, c, 1, 1, generator=generator) * 9
    smooth = 127 + 120 * torch.sin(tilt[0] * torch.linspace(0, 1, h)[:, None] + tilt[1] * torch.linspace(0, 1, w))
    images[1::4] = smooth.long()[1::4]
    images[2::4] = images[2::4] // 128 * 255
    images[3::4] = images[3::4, :, :1, :1]
    return images.to(torch.uint8)


def random_boxes(n: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Boxes of every size, from one pixel to the whole image. int64 [n, 4]."""
    generator = np.random.default_rng(seed)
    boxes = [[0, 0, height, width], [height - 1, width - 1, 1, 1], [0, width - 1, height, 1], [3, 0, 1, width]]
    while len(boxes) < n:
        h, w = generator.integers(1, height + 1), generator.integers(1, width + 1)
        boxes.append([generator.integers(0, height - h + 1), generator.integers(0, width - w + 1), h, w])
    return torch.tensor(np.array(boxes[:n]))


def pillow_resized_crop(image: Tensor, box: list[int], size: int) -> Tensor:
    """torchvision's on a Pillow image, along the rows first whatever the version of Pillow."""
    top, left, height, width = box
    cut = F.crop(F.to_pil_image(image), top, left, height, width)
    across = cut.resize((size, height), Image.Resampling.BILINEAR)
    return F.pil_to_tensor(across.resize((size, size), Image.Resampling.BILINEAR))


def jittered(image: Tensor, factors: list[float], order: list[int]) -> Tensor:
    for operation in order:
        image = ADJUST[operation](image, factors[operation])
    return image


def every_jitter() -> la.Jitter:
    """Each order with no, weak, usual and extreme factors, and drawn ones."""
    factors = [[1, 1, 1], [0, 0, 0], [0.6, 0.6, 0.6], [1.4, 1.4, 1.4], [0.6, 1.4, 1], [1.4, 0.6, 0.9], [2, 3, 5]]
    factors += la.draw_jitter(9, Draws(0, 0, torch.Generator())).factors.tolist()
    pairs = list(itertools.product(factors, ORDERS))
    return la.Jitter(torch.tensor([f for f, _ in pairs], dtype=torch.float32), torch.tensor([o for _, o in pairs]))


def levels_apart(a: Tensor, b: Tensor) -> int:
    return (a.int() - b.int()).abs().max().item()


def augmented(images: Tensor, draws: Draws) -> Tensor:
    """Everything, one after the other."""
    n, _, h, w = images.shape
    images = la.resized_crop(images, la.draw_resized_crops(n, h, w, draws), 32)
    images = la.colour_jitter(images, la.draw_jitter(n, draws))
    images = la.grayscale(images, la.draw_chosen(n, draws, 0.2))
    return la.centre_crop(la.gaussian_blur(images, *la.draw_blur(n, draws)), 28)


@pytest.mark.parametrize("size", [8, 32, 48, 75])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_resized_crop_is_pillows_to_the_bit(shape, size):
    images, boxes = examples(shape, 40), random_boxes(40, *shape[1:])
    result = la.resized_crop(images, boxes, size)
    assert result.dtype == torch.uint8
    assert result.is_contiguous()
    for image, box, got in zip(images, boxes.tolist(), result, strict=True):
        assert torch.equal(got, pillow_resized_crop(image, box, size)), box
        assert levels_apart(got, F.resized_crop(image, *box, [size, size], antialias=True)) <= 1, box
        on_pillow = F.pil_to_tensor(F.resized_crop(F.to_pil_image(image), *box, [size, size]))
        assert levels_apart(got, on_pillow) <= 1, box  # 0 before Pillow 13


def test_the_resized_crop_is_pillows_at_full_size():
    images = examples((3, 256, 256), 4)
    boxes = torch.cat([la.draw_resized_crops(3, 256, 256, Draws(0, 0, torch.Generator())), random_boxes(1, 256, 256)])
    for image, box, got in zip(images, boxes.tolist(), la.resized_crop(images, boxes, 224), strict=True):
        assert torch.equal(got, pillow_resized_crop(image, box, 224)), box


def test_the_resized_crop_is_exact_at_its_strongest_reduction():
    image, box = torch.full((1, 1, 300, 300), 255, dtype=torch.uint8), torch.tensor([[0, 0, 300, 300]])
    image[..., ::7] = 254
    assert torch.equal(la.resized_crop(image, box, 20)[0], pillow_resized_crop(image[0], box[0].tolist(), 20))


def test_a_crop_of_the_output_size_is_a_copy():
    images = examples((3, 48, 48), 8)
    whole = torch.tensor([[0, 0, 48, 48]]).expand(8, 4)
    assert torch.equal(la.resized_crop(images, whole, 48), images)
    part = torch.tensor([[5, 9, 32, 32]]).expand(8, 4)
    assert torch.equal(la.resized_crop(images, part, 32), images[:, :, 5:37, 9:41])


def test_autocast_leaves_resampling_and_blur_alone():
    images, boxes = examples((3, 48, 48), 8), random_boxes(8, 48, 48)
    sigma, chosen = la.draw_blur(8, Draws(0, 0, torch.Generator()), probability=1.0)
    expected = la.resized_crop(images, boxes, 32), la.gaussian_blur(images, sigma, chosen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = la.resized_crop(images, boxes, 32), la.gaussian_blur(images, sigma, chosen)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (256, 256, (0.08, 1.0), (3 / 4, 4 / 3)),
        (200, 333, (0.08, 1.0), (3 / 4, 4 / 3)),
        (500, 100, (0.2, 1.0), (3 / 4, 4 / 3)),
        (40, 40, (0.9, 1.0), (0.5, 3.0)),
        (100, 500, (0.9, 1.0), (0.5, 0.75)),  # nothing fits
        (500, 100, (0.9, 1.0), (0.5, 0.75)),  # nothing fits
        (64, 64, (2.0, 3.0), (3 / 4, 4 / 3)),  # nothing fits, and the image itself is in range
    ],
)
def test_boxes_are_torchvisions_for_the_same_random_numbers(height, width, scale, ratio, monkeypatch):
    n = 300
    boxes = la.draw_resized_crops(n, height, width, Draws(0, 0, torch.Generator()), scale, ratio)
    assert boxes.dtype == torch.int64
    generator = Draws(0, 0, torch.Generator()).generator
    low, high = torch.tensor(ratio).log().tolist()
    share = torch.empty(n, la.ATTEMPTS).uniform_(*scale, generator=generator)
    aspect = torch.empty(n, la.ATTEMPTS).uniform_(low, high, generator=generator)
    place = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    image = torch.empty(1, height, width)
    for i, box in enumerate(boxes.tolist()):
        drawn = iter(torch.stack([share[i], aspect[i]], 1).flatten().tolist())
        places = iter(place[i].tolist())
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "uniform_", lambda self, *_, drawn=drawn: self.fill_(next(drawn)))
            patch.setattr(torch, "randint", lambda _, n, size, p=places: torch.tensor(int(next(p) * n)).expand(size))
            expected = RandomResizedCrop.get_params(image, scale, ratio)
        assert tuple(box) == expected


@pytest.mark.parametrize(("height", "width"), [(256, 256), (180, 256)])
def test_boxes_are_distributed_as_torchvisions(height, width):
    """Means within 5 standard errors, standard deviations within 6 %, of area, aspect ratio and place."""
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    image = torch.empty(1, height, width)
    torch.manual_seed(1)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(N_REFERENCE)])
    ours = la.draw_resized_crops(N_DRAWS, height, width, Draws(0, 0, torch.Generator()), scale, ratio)

    def described(boxes: Tensor) -> list[Tensor]:
        top, left, h, w = boxes.double().T
        return [h * w / (height * width), (w / h).log(), top / height, left / width, h, w]

    for mine, reference in zip(described(ours), described(theirs), strict=True):
        error = (mine.var() / N_DRAWS + reference.var() / N_REFERENCE).sqrt()
        assert abs(mine.mean() - reference.mean()) <= SIGMAS * error
        assert abs(mine.std() / reference.std() - 1) <= 0.06
    top, left, h, w = ours.T
    assert top.min() >= 0 and left.min() >= 0 and h.min() >= 1 and w.min() >= 1
    assert (top + h).max() <= height and (left + w).max() <= width


def test_what_never_fits_is_the_central_crop():
    def drawn(height: int, width: int, ratio: tuple[float, float]) -> list[list[int]]:
        return la.draw_resized_crops(50, height, width, Draws(0, 0, torch.Generator()), (1, 1), ratio).unique(dim=0)

    assert drawn(100, 500, (1, 1.25)).tolist() == [[0, 187, 100, 125]]
    assert drawn(500, 100, (0.8, 1)).tolist() == [[187, 0, 125, 100]]
    assert drawn(3, 3, (90, 100)).tolist() == [[1, 0, 1, 3]]  # where torchvision's would be empty


@pytest.mark.parametrize("size", [1, 17, 24, 39, 40])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_centre_crop_is_torchvisions(shape, size):
    images = examples(shape, 4)
    assert torch.equal(la.centre_crop(images, size), F.center_crop(images, [size, size]))


@pytest.mark.parametrize("shape", [*SHAPES, (3, 256, 256)], ids=str)
def test_colour_jitter_is_torchvisions_to_the_bit(shape):
    jitter = every_jitter()
    if shape[1] == 256:
        jitter = la.Jitter(jitter.factors[-6:], jitter.order[-6:])
    images = examples(shape, len(jitter.order))
    result = la.colour_jitter(images, jitter)
    assert result.dtype == torch.uint8
    pairs = zip(jitter.factors.tolist(), jitter.order.tolist(), strict=True)
    for image, got, (factors, order) in zip(images, result, pairs, strict=True):
        assert torch.equal(got, jittered(image, factors, order)), (factors, order)
        if factors == [1, 1, 1]:
            assert torch.equal(got, image)


def test_colour_jitter_is_drawn_as_torchvisions():
    jitter = la.draw_jitter(N_DRAWS, Draws(0, 0, torch.Generator()), 0.4, 0.2, 1.5)
    assert jitter.order.dtype == torch.int64
    ranges = ColorJitter(0.4, 0.2, 1.5)
    for factor, bounds in zip(jitter.factors.T, (ranges.brightness, ranges.contrast, ranges.saturation), strict=True):
        low, high = bounds
        assert low <= factor.min() and factor.max() <= np.float32(high)
        assert abs(factor.mean() - (low + high) / 2) <= SIGMAS * (high - low) / (12 * N_DRAWS) ** 0.5
        assert factor.std().item() == pytest.approx((high - low) / 12**0.5, rel=0.03)
    for order in ORDERS:
        assert_share((jitter.order == torch.tensor(order)).all(1), 1 / 6)
    assert abs(np.corrcoef(jitter.factors.T)[np.triu_indices(3, 1)]).max() <= SIGMAS / N_DRAWS**0.5
    assert (la.draw_jitter(9, Draws(0, 0, torch.Generator()), 0, 0, 0).factors == 1).all()


def assert_share(happened: Tensor, probability: float) -> None:
    bound = SIGMAS * (probability * (1 - probability) / len(happened)) ** 0.5
    assert abs(happened.double().mean().item() - probability) <= bound


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_grayscale_is_torchvisions(shape):
    images, chosen = examples(shape, 12), torch.arange(12) % 3 > 0
    for image, grey, got in zip(images, chosen, la.grayscale(images, chosen), strict=True):
        assert torch.equal(got, F.rgb_to_grayscale(image, shape[0]) if grey else image)


@pytest.mark.parametrize("kernel_size", [1, 5, 13, 23, 31])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_blur_is_torchvisions_within_a_level(shape, kernel_size):
    images, chosen = examples(shape, 16), torch.arange(16) % 5 > 0
    sigma = torch.linspace(0.1, 2.0, 16)
    result = la.gaussian_blur(images, sigma, chosen, kernel_size)
    for image, s, blurred, got in zip(images, sigma.tolist(), chosen, result, strict=True):
        expected = F.gaussian_blur(image, [kernel_size] * 2, [s, s]) if blurred else image
        assert levels_apart(got, expected) <= (1 if blurred else 0)
    assert result.dtype == torch.uint8


def test_the_blur_has_no_bias():
    """What two roundings leave is noise, and no shift."""
    images, sigma = examples((3, 64, 64), 16)[::4], torch.linspace(0.5, 2.0, 4)
    result = la.gaussian_blur(images, sigma, torch.ones(4, dtype=torch.bool))
    exact = [F.gaussian_blur(image.double(), [13, 13], [s, s]) for image, s in zip(images, sigma.tolist(), strict=True)]
    difference = result - torch.stack(exact)
    assert abs(difference.mean()) < 0.005
    assert difference.std() < (2 / 12) ** 0.5  # of two roundings, if the second pass did not average the first one's


def test_thirteen_pixels_are_the_whole_gaussian():
    images, chosen = examples((3, 48, 48), 8), torch.ones(8, dtype=torch.bool)
    sigma = torch.full((8,), 2.0)
    assert levels_apart(la.gaussian_blur(images, sigma, chosen), la.gaussian_blur(images, sigma, chosen, 31)) <= 2


def test_a_tiny_sigma_changes_nothing():
    images, chosen = examples((3, 48, 48), 8), torch.ones(8, dtype=torch.bool)
    for sigma in (1e-6, 0.01, 0.1):
        assert torch.equal(la.gaussian_blur(images, torch.full((8,), sigma), chosen), images)


def test_blurs_have_their_share_and_range():
    sigma, chosen = la.draw_blur(N_DRAWS, Draws(0, 0, torch.Generator()))
    assert np.float32(0.1) <= sigma.min() and sigma.max() <= 2.0
    assert abs(sigma.mean() - 1.05) <= SIGMAS * 1.9 / (12 * N_DRAWS) ** 0.5
    assert_share(chosen, 0.5)
    assert_share(la.draw_blur(N_DRAWS, Draws(0, 0, torch.Generator()), probability=0.1)[1], 0.1)
    assert_share(la.draw_chosen(N_DRAWS, Draws(0, 0, torch.Generator()), 0.2), 0.2)


def test_the_same_step_gives_the_same_images():
    images = examples((3, 48, 60), 16)
    first = augmented(images, Draws(3, 5, torch.Generator()))
    assert first.shape == (16, 3, 28, 28)
    assert torch.equal(first, augmented(images, Draws(3, 5, torch.Generator())))
    assert not torch.equal(first, augmented(images, Draws(3, 6, torch.Generator())))


def test_an_image_alone_is_treated_as_in_its_batch():
    images, boxes, jitter = examples((3, 48, 60), 6), random_boxes(6, 48, 60), every_jitter()
    jitter = la.Jitter(jitter.factors[-6:], jitter.order[-6:])
    sigma, chosen = la.draw_blur(6, Draws(0, 0, torch.Generator()), probability=1.0)
    for i, one in enumerate(images.split(1)):
        own = slice(i, i + 1)
        assert torch.equal(la.resized_crop(one, boxes[own], 32), la.resized_crop(images, boxes, 32)[own])
        own_jitter = la.Jitter(jitter.factors[own], jitter.order[own])
        assert torch.equal(la.colour_jitter(one, own_jitter), la.colour_jitter(images, jitter)[own])
        blurred = la.gaussian_blur(one, sigma[own], chosen[own])
        assert torch.equal(blurred, la.gaussian_blur(images, sigma, chosen)[own])


def test_the_images_handed_in_are_left_alone():
    images = examples((3, 48, 48), 16)
    augmented(images, Draws(0, 0, torch.Generator()))
    la.colour_jitter(images, la.draw_jitter(16, Draws(0, 0, torch.Generator())))
    la.gaussian_blur(images, *la.draw_blur(16, Draws(0, 0, torch.Generator())))
    assert torch.equal(images, examples((3, 48, 48), 16))


def test_nothing_reads_a_value_back():
    """Tensors on the meta device have no values, so .item(), boolean indexing and shapes made of data raise."""
    images = examples((3, 48, 60), 4).to("meta")
    with pytest.raises(NotImplementedError):
        images[images > 0]  # or this test would say nothing
    draws = Draws(0, 0, torch.Generator())
    jitter = la.draw_jitter(4, draws)
    assert la.resized_crop(images, random_boxes(4, 48, 60).to("meta"), 32).shape == (4, 3, 32, 32)
    assert la.centre_crop(images, 32).shape == (4, 3, 32, 32)
    assert la.colour_jitter(images, la.Jitter(jitter.factors.to("meta"), jitter.order.to("meta"))).shape == images.shape
    assert la.grayscale(images, la.draw_chosen(4, draws, 0.2).to("meta")).shape == images.shape
    sigma, chosen = la.draw_blur(4, draws)
    assert la.gaussian_blur(images, sigma.to("meta"), chosen.to("meta")).shape == images.shape


def test_the_draws_read_no_value_back(monkeypatch):
    """They need a generator, which the meta device has none of."""

    def refuse(*_: object) -> None:
        raise AssertionError("a value was read back")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    with pytest.raises(AssertionError):
        torch.zeros(1).item()  # or this test would say nothing
    draws = Draws(0, 0, torch.Generator())
    la.draw_resized_crops(4, 48, 60, draws)
    la.draw_jitter(4, draws)
    la.draw_blur(4, draws)


@other_images
def test_other_images_are_refused(images, says):
    chosen, jitter = torch.ones(2, dtype=torch.bool), la.draw_jitter(2, Draws(0, 0, torch.Generator()))
    for call in (
        lambda: la.resized_crop(images, random_boxes(2, 8, 8), 4),
        lambda: la.centre_crop(images, 4),
        lambda: la.colour_jitter(images, jitter),
        lambda: la.grayscale(images, chosen),
        lambda: la.gaussian_blur(images, torch.ones(2), chosen, 3),
    ):
        with pytest.raises(ValueError, match=says):
            call()


def test_other_settings_are_refused():
    images, draws = torch.zeros(2, 3, 16, 20, dtype=torch.uint8), Draws(0, 0, torch.Generator())
    ones = torch.ones(2)
    for call, says in (
        (lambda: la.resized_crop(images, random_boxes(2, 16, 20), 0), "at least 1 and a fifteenth.* 16 x 20 .* got 0"),
        (lambda: la.resized_crop(images, random_boxes(2, 16, 20), 1), "at least 1 and a fifteenth.* 16 x 20 .* got 1"),
        (lambda: la.resized_crop(images, random_boxes(3, 16, 20), 8), r"boxes must be \[2, 4\], got \[3, 4\]"),
        (lambda: la.centre_crop(images, 17), r"in 1\.\.16 for images of 16 x 20 pixels, got 17"),
        (lambda: la.centre_crop(images, 0), r"in 1\.\.16 for images of 16 x 20 pixels, got 0"),
        (lambda: la.gaussian_blur(images, ones, ones > 0, 4), r"odd and in 1\.\.31 for 16 x 20 pixels, got 4"),
        (lambda: la.gaussian_blur(images[..., :4], ones, ones > 0, 9), r"odd and in 1\.\.7 for 16 x 4 pixels, got 9"),
        (lambda: la.gaussian_blur(images, ones, ones > 0, -1), r"got -1"),
        (lambda: la.draw_resized_crops(2, 8, 8, draws, scale=(0, 1)), r"scale must be a range of positive numbers"),
        (lambda: la.draw_resized_crops(2, 8, 8, draws, ratio=(2, 1)), r"ratio must .* got \(2, 1\)"),
        (lambda: la.draw_jitter(2, draws, 0.4, -0.1, 0), r"must not be negative, got \(0.4, -0.1, 0\)"),
        (lambda: la.draw_blur(2, draws, sigma=(0, 1)), r"sigma must be a range of positive numbers, got \(0, 1\)"),
    ):
        with pytest.raises(ValueError, match=says):
            call()


@pytest.fixture
def gpu():
    """The training's own settings: deterministic algorithms; and an error for whatever waits for the device."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield "cuda"
    torch.cuda.set_sync_debug_mode("default")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shape", [*SHAPES, (3, 256, 256)], ids=str)
@pytest.mark.parametrize("tf32", [False, True])
def test_the_gpu_gives_the_same_images(gpu, shape, tf32):
    torch.backends.cuda.matmul.allow_tf32 = tf32
    jitter = every_jitter()
    n = len(jitter.order)
    images, boxes = examples(shape, n), random_boxes(n, *shape[1:])
    sigma, chosen = la.draw_blur(n, Draws(0, 0, torch.Generator()))
    there = images.to(gpu)
    on_gpu = la.Jitter(jitter.factors.to(gpu), jitter.order.to(gpu))
    for size in (31, 75):
        assert torch.equal(la.resized_crop(there, boxes.to(gpu), size).cpu(), la.resized_crop(images, boxes, size))
    assert torch.equal(la.colour_jitter(there, on_gpu).cpu(), la.colour_jitter(images, jitter))
    assert torch.equal(la.grayscale(there, chosen.to(gpu)).cpu(), la.grayscale(images, chosen))
    blurred = la.gaussian_blur(there, sigma.to(gpu), chosen.to(gpu)).cpu()
    assert torch.equal(blurred, la.gaussian_blur(images, sigma, chosen))


def test_the_gpu_is_never_waited_for(gpu):
    images, generator = examples((3, 48, 60), 8).to(gpu), torch.Generator(gpu)
    first = augmented(images, Draws(0, 0, generator))
    torch.cuda.set_sync_debug_mode("error")
    second = augmented(images, Draws(0, 0, generator))
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)
