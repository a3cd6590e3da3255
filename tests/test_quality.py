"""The measures of likeness against other implementations, and files of examples."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from PIL import Image, ImageFilter

from fluxfire import spark
from fluxfire.bench import Example, compare, held_out, quality, read_examples
from fluxfire.errors import ExampleError


@pytest.fixture(scope="module")
def picture():
    return spark.examples(n=1)[0].source


def noisy(picture, amount):
    rng = np.random.default_rng(0)
    pixels = np.asarray(picture, np.int64) + rng.integers(-amount, amount + 1, (128, 128, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("amount", [1, 10, 60])
def test_psnr_is_scikit_image_s(picture, amount):
    metrics = pytest.importorskip("skimage.metrics")
    other = noisy(picture, amount)
    expected = metrics.peak_signal_noise_ratio(np.asarray(picture), np.asarray(other))
    assert quality.similarity(other, picture).psnr == pytest.approx(expected, abs=1e-4)


def test_equal_pictures_are_equal_by_every_measure(picture):
    same = quality.similarity(picture, picture.copy())
    assert same.psnr == 100
    assert same.ssim in (None, pytest.approx(1))
    assert same.flip in (None, pytest.approx(0, abs=1e-6))


def test_every_measure_falls_with_the_damage(picture):
    pytest.importorskip("skimage")
    pytest.importorskip("flip_evaluator")
    blurs = [picture.filter(ImageFilter.GaussianBlur(r)) for r in (0.5, 1.5, 4)]
    told = [quality.similarity(b, picture) for b in blurs]
    assert [t.psnr for t in told] == sorted((t.psnr for t in told), reverse=True)
    assert [t.ssim for t in told] == sorted((t.ssim for t in told), reverse=True)
    assert [t.flip for t in told] == sorted(t.flip for t in told)
    assert told[-1].ssim < 0.9
    assert told[-1].flip > 0.05


def test_ssim_is_that_of_the_paper(picture):
    """Wang et al.: Gaussian window of 11, sigma 1.5, K = 0.01 and 0.03; here in float64."""
    pytest.importorskip("skimage")
    from scipy.ndimage import gaussian_filter

    def smooth(x):
        return gaussian_filter(x, 1.5, truncate=3.5, axes=(0, 1))

    other = noisy(picture, 30)
    x, y = (np.asarray(i, np.float64) / 255 for i in (picture, other))
    mx, my = smooth(x), smooth(y)
    vx, vy, cov = smooth(x * x) - mx**2, smooth(y * y) - my**2, smooth(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    ssim = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    expected = ssim[5:-5, 5:-5].mean()  # where the window lies within the picture
    assert quality.similarity(other, picture).ssim == pytest.approx(expected, abs=1e-4)


def test_the_worst_pair_is_found_and_told(picture):
    made = [noisy(picture, a) for a in (2, 40, 5)]
    told = compare(made, [picture] * 3, [True, False, None]).to_dict()
    assert told["worst"] == 1
    assert told["psnr"]["worst"] == told["each"][1]["psnr"] == min(e["psnr"] for e in told["each"])
    assert told["success"] == 0.5
    json.dumps(told)


def test_without_the_extra_psnr_remains(picture, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.setitem(sys.modules, "flip_evaluator", None)
    monkeypatch.setattr(quality, "find_spec", lambda _: None)
    told = compare([picture], [picture]).to_dict()
    assert told["psnr"] == {"mean": 100, "worst": 100, "interval": None}
    assert told["ssim"] is told["flip"] is told["success"] is None
    assert quality.missing() == ["SSIM", "FLIP"]


def test_what_cannot_be_compared_is_refused(picture):
    with pytest.raises(ValueError, match="1 pictures cannot be compared with 2"):
        compare([picture], [picture, picture])
    with pytest.raises(ValueError, match=r"\(64, 128\) cannot be compared"):
        compare([picture.resize((64, 128))], [picture])


def test_held_out_examples_can_be_passed_over():
    whole = held_out(6)
    rest = held_out(2, first=4)
    assert [e.instruction for e in whole[4:]] == [e.instruction for e in rest]
    assert whole[4].check(whole[4].target)
    assert not whole[4].check(whole[4].picture)


def test_a_picture_of_another_size_is_neither_right_nor_wrong():
    (example,) = held_out(1)
    assert example.right(example.target) is True
    assert example.right(example.picture) is False
    assert example.right(example.target.resize((64, 64))) is None
    assert Example("x").right(example.target) is None


def test_examples_are_read_from_a_file(tmp_path, picture):
    picture.save(tmp_path / "a.png")
    lines = [{"image": "a.png", "prompt": "make it night"}, {"prompt": "a red circle"}]
    file = tmp_path / "edits.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    edit, words = read_examples(file)
    assert (edit.instruction, words.instruction) == ("make it night", "a red circle")
    assert np.array_equal(np.asarray(edit.picture), np.asarray(picture))
    assert words.picture is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nonsense", "line 1 is not JSON"),
        ("[1]", "line 1 has no prompt"),
        ('{"prompt": 3}', "line 1 has no prompt"),
        ('{"prompt": "x", "images": "a.png"}', "line 1 has unknown keys: images"),
        ('{"prompt": "x", "image": 5}', "line 1: the image is 5, not a file's name"),
        ('{"prompt": "x", "image": "none.png"}', "line 1: cannot read .*none.png: No such file"),
        ("", "has no examples"),
    ],
)
def test_files_that_cannot_be_used_are_refused_in_words(tmp_path, line, said):
    file = tmp_path / "edits.jsonl"
    file.write_text(line)
    with pytest.raises(ExampleError, match=said):
        read_examples(file)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ExampleError, match="cannot read examples"):
        read_examples(tmp_path / "none.jsonl")


def test_damage_inside_a_small_edit_is_seen_there(picture):
    """A tenth of the picture is edited, and only that is damaged: the rest lifts the whole PSNR."""
    source = Image.new("RGB", (128, 128), (90, 120, 60))
    wanted = source.copy()
    wanted.paste((200, 40, 40), (40, 40, 80, 80))
    made = source.copy()
    made.paste((180, 40, 40), (40, 40, 80, 80))
    near = quality.similarity(made, wanted, (), source)
    region = quality.edited_region(source, wanted)
    rows, columns = np.nonzero(region)
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (32, 88, 32, 88)
    error = np.zeros((128, 128, 3))
    error[40:80, 40:80, 0] = 20 / 255
    expected = -10 * np.log10(np.square(error)[region].mean())
    assert near.edited == pytest.approx(expected, abs=1e-4)
    assert near.psnr - near.edited == pytest.approx(10 * np.log10(128**2 / region.sum()), abs=1e-3)


def test_the_edited_region_follows_the_result_s_size_and_shape():
    source = Image.new("RGB", (300, 200), "navy")
    wanted = Image.new("RGB", (100, 60), "navy")
    wanted.putpixel((0, 0), (255, 255, 255))  # one pixel is noise, not an edit
    assert not quality.edited_region(source, wanted).any()
    assert quality.similarity(wanted, wanted, (), source).edited is None
    wanted.paste("white", (96, 56, 100, 60))  # in the corner, where patches are cut off
    region = quality.edited_region(source, wanted)
    assert region.shape == (60, 100)
    assert region[-1, -1]
    assert not region[:40].any()
    assert quality.similarity(wanted, wanted.copy(), (), source).edited == 100


def test_without_a_source_there_is_no_edited_region(picture):
    assert quality.similarity(picture, picture).edited is None
    told = compare([picture] * 2, [picture] * 2, sources=[None, picture]).to_dict()
    assert told["edited"] is None


def test_every_mean_has_an_interval(picture):
    made = [noisy(picture, a) for a in (2, 40, 5, 9)]
    told = compare(made, [picture] * 4, [True, False, None, True]).to_dict()
    low, high = told["psnr"]["interval"]
    assert told["psnr"]["worst"] <= low < told["psnr"]["mean"] < high
    assert told["success_interval"] == pytest.approx([0.2077, 0.9385], abs=1e-4)  # 2 of 3
    assert compare(made[:1], [picture]).to_dict()["psnr"]["interval"] is None
