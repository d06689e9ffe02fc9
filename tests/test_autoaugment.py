"""Batched AutoAugment and Cutout against torchvision on Pillow images and a loop, and the shares of their draws."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import AutoAugment, AutoAugmentPolicy, _apply_op

from tailcal import autoaugment as aa
from tailcal.draws import Draws

REFERENCE = AutoAugment(AutoAugmentPolicy.CIFAR10)
SHAPES = [(1, 8, 8), (3, 32, 32), (3, 20, 20), (1, 17, 40), (3, 9, 2), (3, 2, 9), (1, 1, 1)]  # 20 x 20: see Equalize
EVERY = [  # every setting of every operation that torchvision knows
    (operation, magnitude, negative)
    for operation in aa.OPERATIONS
    for magnitude in ([None] if operation in aa.WITHOUT_MAGNITUDE else range(aa.MAGNITUDES))
    for negative in ([False, True] if operation in aa.GEOMETRIC + aa.BLENDS else [False])
]
N_DRAWS = 100_000
SIGMAS = 5  # of a binomial share: about one in two million for each share compared, and the draws are seeded


def examples(shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Random, low-contrast, smooth and constant images, uint8 [14, C, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    c, h, w = shape
    noise = torch.randint(256, (4, c, h, w), generator=generator)
    dull = torch.randint(256, (4, c, h, w), generator=generator) // torch.tensor([3, 5, 40, 100]).view(4, 1, 1, 1) + 70
    tilt = torch.rand(2, 4, c, 1, 1, generator=generator) * 6
    smooth = 127 + 120 * torch.sin(tilt[0] * torch.linspace(0, 1, h)[:, None] + tilt[1] * torch.linspace(0, 1, w))
    constant = torch.randint(256, (2, c, 1, 1), generator=generator).expand(2, c, h, w)
    return torch.cat([noise, dull, smooth, constant]).to(torch.uint8)


def to_pillow(image: Tensor) -> Image.Image:
    array = image.numpy()
    return Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))


def from_pillow(image: Image.Image) -> Tensor:
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def every_draw() -> aa.PolicyDraws:
    """Each sub-policy with each way to apply its operations and each pair of signs: 25 x 4 x 4 images."""
    sub, first, second, sign, other = np.indices((25, 2, 2, 2, 2)).reshape(5, -1)
    applied, negative = np.stack([first, second], 1) == 1, np.stack([sign, other], 1) == 1
    return aa.PolicyDraws(torch.from_numpy(sub), torch.from_numpy(applied), torch.from_numpy(negative))


def repeated(shape: tuple[int, int, int], n: int) -> Tensor:
    images = examples(shape)
    return images.repeat(-(-n // len(images)), 1, 1, 1)[:n]


def on(device: str, drawn: aa.PolicyDraws) -> aa.PolicyDraws:
    return aa.PolicyDraws(*(part.to(device) for part in (drawn.sub_policy, drawn.applied, drawn.negative)))


def one_operation(images: Tensor, operation: str, magnitude: int | None, negative: bool, fill: int = 0) -> Tensor:
    """One operation of the policy on every image of the batch."""
    row = aa._row(operation, magnitude, negative)
    return aa._transformed(images, torch.full((len(images),), row, device=images.device), fill)


def test_the_policy_is_the_published_one():
    assert list(aa.CIFAR10_POLICY) == REFERENCE._get_policies(AutoAugmentPolicy.CIFAR10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operation", aa.OPERATIONS)
def test_each_operation_is_pillows_to_the_bit(operation, shape):
    images = examples(shape)
    magnitudes, _ = REFERENCE._augmentation_space(aa.MAGNITUDES, shape[1:])[operation]
    for _, magnitude, negative in (setting for setting in EVERY if setting[0] == operation):
        size = 0.0 if magnitude is None else float(magnitudes[magnitude])
        size = -size if negative else size
        for fill in (0, 128):
            result = one_operation(images, operation, magnitude, negative, fill)
            assert result.dtype == torch.uint8
            for image, got in zip(images, result, strict=True):
                nearest = InterpolationMode.NEAREST, [float(fill)] * len(image)
                assert torch.equal(got, from_pillow(_apply_op(to_pillow(image), operation, size, *nearest))), (
                    magnitude,
                    negative,
                    fill,
                )


def test_equalize_clips_levels_past_white():
    """With 255 to 509 pixels below the brightest value a step is one pixel, and Pillow's table passes 255."""
    image = torch.zeros(1, 1, 20, 20, dtype=torch.uint8)
    image[..., :13] = torch.arange(260).view(20, 13) % 50
    image[..., 13:] = 200
    result = one_operation(image, "Equalize", None, False)
    assert result.max() == 255
    assert torch.equal(result[0], from_pillow(_apply_op(to_pillow(image[0]), "Equalize", 0.0, None, None)))


@pytest.mark.parametrize(("shape", "fill"), [((3, 32, 32), 128), ((1, 8, 8), 0), ((3, 20, 24), 255)], ids=str)
def test_the_policy_is_torchvisions_on_every_draw(shape, fill, monkeypatch):
    drawn, reference = every_draw(), AutoAugment(AutoAugmentPolicy.CIFAR10, fill=[float(fill)] * shape[0])
    images = repeated(shape, len(drawn.sub_policy))
    result = aa.autoaugment(images, drawn, fill)
    changed = 0
    for i, image in enumerate(images):
        # torchvision applies an operation if its uniform draw is not above the probability, and negates on a 0
        uniforms, signs = torch.where(drawn.applied[i], 0.0, 2.0), (~drawn.negative[i]).int()
        draws = int(drawn.sub_policy[i]), uniforms, signs
        monkeypatch.setattr(reference, "get_params", lambda _, draws=draws: draws)
        assert torch.equal(result[i], from_pillow(reference(to_pillow(image)))), draws
        changed += not torch.equal(result[i], image)
    assert 150 < changed < 300  # of 400, 100 of which have no operation applied


def test_an_image_alone_is_treated_as_in_its_batch():
    drawn = every_draw()
    images = repeated((3, 32, 32), len(drawn.sub_policy))
    together = aa.autoaugment(images, drawn, 0)
    for i in range(0, len(images), 7):
        one = aa.PolicyDraws(drawn.sub_policy[i : i + 1], drawn.applied[i : i + 1], drawn.negative[i : i + 1])
        assert torch.equal(aa.autoaugment(images[i : i + 1], one, 0)[0], together[i])


def test_the_images_handed_in_are_left_alone():
    images = examples((3, 32, 32))
    for operation, magnitude, negative in EVERY:
        one_operation(images, operation, magnitude, negative)
    aa.cutout(images, torch.zeros(len(images), 2, dtype=torch.int64), 5)
    assert torch.equal(images, examples((3, 32, 32)))


def test_the_same_step_gives_the_same_images():
    images = repeated((3, 32, 32), 64)

    def augmented(step: int) -> Tensor:
        draws = Draws(3, step, torch.Generator())
        changed = aa.autoaugment(images, aa.draw_policies(64, draws), 0)
        return aa.cutout(changed, aa.draw_centres(64, 32, 32, draws), 16)

    first = augmented(5)
    assert torch.equal(first, augmented(5))
    assert not torch.equal(first, augmented(6))


def assert_share(happened: Tensor, probability: float) -> None:
    bound = SIGMAS * (probability * (1 - probability) / len(happened)) ** 0.5
    assert abs(happened.double().mean().item() - probability) <= bound


def test_draws_have_the_published_probabilities():
    drawn = aa.draw_policies(N_DRAWS, Draws(0, 0, torch.Generator()))
    assert drawn.sub_policy.dtype == torch.int64
    assert drawn.applied.dtype == drawn.negative.dtype == torch.bool
    for i, sub_policy in enumerate(aa.CIFAR10_POLICY):
        mine = drawn.sub_policy == i
        assert_share(mine, 1 / 25)
        applied, negative = drawn.applied[mine], drawn.negative[mine]
        (_, first, _), (_, second, _) = sub_policy
        assert_share(applied[:, 0], first)
        assert_share(applied[:, 1], second)
        assert_share(applied.all(1), first * second)  # the slots are drawn apart
        assert_share(negative[:, 0], 0.5)
        assert_share(negative[:, 1], 0.5)
        assert_share(negative.all(1), 0.25)
        assert_share(applied[:, 0] & negative[:, 0], first / 2)


def test_centres_are_uniform_over_the_pixels():
    centres = aa.draw_centres(N_DRAWS, 3, 5, Draws(0, 0, torch.Generator()))
    assert centres.dtype == torch.int64
    for row in range(3):
        for column in range(5):
            assert_share((centres == torch.tensor([row, column])).all(1), 1 / 15)


@pytest.mark.parametrize("size", [1, 2, 5, 8, 40])
@pytest.mark.parametrize("shape", [(3, 7, 10), (1, 8, 8)], ids=str)
def test_cutout_is_a_clipped_square_of_zeros(shape, size):
    _, h, w = shape
    centres = torch.cartesian_prod(torch.arange(h), torch.arange(w))  # corners and edges among them
    images = repeated(shape, len(centres)).clamp(min=1)
    result = aa.cutout(images, centres, size)
    for image, (row, column), got in zip(images.numpy(), centres.tolist(), result.numpy(), strict=True):
        expected = image.copy()
        top, left = row - size // 2, column - size // 2
        expected[:, max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = 0
        assert np.array_equal(got, expected)
    assert result.dtype == torch.uint8


def test_nothing_reads_a_value_back():
    """Tensors on the meta device have no values, so .item(), boolean indexing and shapes made of data raise."""
    images = examples((3, 32, 32)).to("meta")
    drawn = on("meta", aa.draw_policies(len(images), Draws(0, 0, torch.Generator())))
    with pytest.raises(NotImplementedError):
        images[images > 0]  # or this test would say nothing
    assert aa.autoaugment(images, drawn, 0).shape == images.shape
    assert aa.cutout(images, torch.zeros(len(images), 2, dtype=torch.int64, device="meta"), 16).shape == images.shape


other_images = pytest.mark.parametrize(
    ("images", "says"),
    [
        (torch.zeros(2, 2, 8, 8, dtype=torch.uint8), r"1 or 3 channels, got \[2, 2, 8, 8\]"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"\[B, C, H, W\]"),
        (torch.zeros(2, 3, 8, 8), "must be uint8, got torch.float32"),
    ],
)


@other_images
def test_other_images_are_refused(images, says):
    drawn = aa.draw_policies(2, Draws(0, 0, torch.Generator()))
    with pytest.raises(ValueError, match=says):
        aa.autoaugment(images, drawn, 0)
    with pytest.raises(ValueError, match=says):
        aa.cutout(images, torch.zeros(2, 2, dtype=torch.int64), 4)


def test_a_hole_of_no_size_is_refused():
    with pytest.raises(ValueError, match="1 pixel or more, got 0"):
        aa.cutout(examples((3, 8, 8)), torch.zeros(14, 2, dtype=torch.int64), 0)


@pytest.fixture
def gpu():
    """The training's own settings: deterministic algorithms; and an error for whatever waits for the device."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.use_deterministic_algorithms(True)
    yield "cuda"
    torch.cuda.set_sync_debug_mode("default")
    torch.use_deterministic_algorithms(False)


def test_the_gpu_gives_the_same_images(gpu):
    for shape in SHAPES:
        images = examples(shape)
        for setting in EVERY:
            assert torch.equal(one_operation(images.to(gpu), *setting).cpu(), one_operation(images, *setting))


def test_the_gpu_is_never_waited_for_and_the_step_can_be_captured(gpu):
    drawn = every_draw()
    images = repeated((3, 32, 32), len(drawn.sub_policy))
    centres = aa.draw_centres(len(images), 32, 32, Draws(0, 0, torch.Generator()))
    expected = aa.cutout(aa.autoaugment(images, drawn, 0), centres, 16)
    there = torch.zeros_like(images, device=gpu), on(gpu, drawn), centres.to(gpu)

    def step() -> Tensor:
        aa.draw_policies(64, Draws(0, 0, torch.Generator(gpu)))
        return aa.cutout(aa.autoaugment(there[0], there[1], 0), there[2], 16)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # makes the tables
        torch.cuda.set_sync_debug_mode("error")
        step()
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = aa.cutout(aa.autoaugment(there[0], there[1], 0), there[2], 16)
    there[0].copy_(images)
    graph.replay()
    assert torch.equal(captured.cpu(), expected)
