import base64
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from processing.image_processing_libra import LibraImageProcessor, pad_to_square, read_image

MEAN_COLOR = (122, 116, 104)


@pytest.fixture
def image_processor() -> LibraImageProcessor:
    return LibraImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.fixture
def photo(tmp_path):
    """A PNG of 40 x 20 pixels, the left half red, the right half blue."""
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (20, 0, 40, 20))
    image.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_every_way_to_give_an_image_gives_the_same_pixels(image_processor, photo):
    image = Image.open(photo)
    array = np.asarray(image)
    encoded = base64.b64encode(photo.read_bytes()).decode()
    ways = [photo, str(photo), image, array, torch.from_numpy(array.copy()).permute(2, 0, 1), array / 255]
    ways.append(f"data:image/png;base64,{encoded}")
    expected = image_processor(str(photo), return_tensors="pt")["pixel_values"]
    assert expected.shape == (1, 3, 32, 32)
    for way in ways:
        assert torch.equal(image_processor(way, return_tensors="pt")["pixel_values"], expected)
    batch = image_processor(np.stack([array, array]), return_tensors="pt")["pixel_values"]
    assert torch.equal(batch, expected.repeat(2, 1, 1, 1))


def test_images_are_downloaded(photo):
    handler = partial(SimpleHTTPRequestHandler, directory=photo.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert read_image(f"{address}/photo.png").tobytes() == Image.open(photo).tobytes()
        with pytest.raises(ValueError, match=r"/none\.png: the image cannot be downloaded .*404"):
            read_image(f"{address}/none.png")
        server.shutdown()


def test_long_base64_without_a_header_is_an_image():
    buffer = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(buffer, "PNG")
    assert read_image(base64.b64encode(buffer.getvalue()).decode()).size == (40, 40)


def test_padding_is_the_mean_color_and_centered():
    image = pad_to_square(Image.new("RGB", (9, 4), (1, 2, 3)), MEAN_COLOR)
    assert image.size == (9, 9)
    rows = np.asarray(image)[:, 0].tolist()
    assert rows == [list(MEAN_COLOR)] * 2 + [[1, 2, 3]] * 4 + [list(MEAN_COLOR)] * 3


def test_padded_pixels_are_almost_zero_after_normalization(image_processor, photo):
    pixels = image_processor(photo, return_tensors="pt")["pixel_values"][0]
    assert pixels[:, 0].abs().max() < 0.02  # the mean color, rounded down
    assert pixels[0, 16, 4] > 1.5  # red on the left


@settings(max_examples=25)
@given(
    width=st.integers(1, 60), height=st.integers(1, 60), mode=st.sampled_from(["RGB", "L", "RGBA", "P", "1", "CMYK"])
)
def test_any_size_and_mode(width, height, mode):
    processor = LibraImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pixels = processor(Image.new(mode, (width, height)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16)
    assert pixels.isfinite().all()


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1)])
def test_extreme_shapes(image_processor, size):
    assert image_processor(Image.new("RGB", size), return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)


def test_exif_orientation(tmp_path, photo):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    Image.open(photo).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright = read_image(tmp_path / "turned.jpg")
    assert upright.size == (20, 40)
    top, bottom = upright.getpixel((10, 5)), upright.getpixel((10, 35))
    assert top[0] > 200 > 50 > top[2]
    assert bottom[2] > 200 > 50 > bottom[0]


def test_transparency_is_white(tmp_path):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((1, 1), (10, 20, 30, 255))
    image.save(tmp_path / "clear.png")
    read = read_image(tmp_path / "clear.png")
    assert read.getpixel((0, 0)) == (255, 255, 255)
    assert read.getpixel((1, 1)) == (10, 20, 30)
    palette = Image.new("P", (4, 4), 0)
    palette.info["transparency"] = 0
    assert read_image(palette).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grayscale_is_scaled(tmp_path):
    Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)


def test_unusable_files_are_refused_with_their_name(tmp_path, photo, image_processor):
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.png: the image file is empty"):
        image_processor(tmp_path / "empty.png")
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(ValueError, match=r"notes\.txt: not a readable image"):
        image_processor(str(tmp_path / "notes.txt"))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    with pytest.raises(ValueError, match=r"cut\.jpg: the image data is broken or cut short"):
        image_processor(tmp_path / "cut.jpg")
    with pytest.raises(ValueError, match=r"there is no image file '.*missing\.png'"):
        image_processor(str(tmp_path / "missing.png"))


def test_an_animation_is_refused_but_one_of_its_frames_is_not(tmp_path):
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 128, 255)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=r"moving\.gif: a GIF with 3 frames"):
        read_image(tmp_path / "moving.gif")
    animation = Image.open(tmp_path / "moving.gif")
    animation.seek(1)
    assert read_image(animation.convert("RGB")).size == (8, 8)


def test_a_photo_with_an_auxiliary_picture_is_not_an_animation(tmp_path):
    Image.new("RGB", (8, 8)).save(
        tmp_path / "phone.mpo", format="MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))]
    )
    assert read_image(tmp_path / "phone.mpo").size == (8, 8)


def test_unusable_objects_are_refused_with_their_place(image_processor, photo):
    with pytest.raises(ValueError, match=r"images\[1\]: the image has no pixels \(0 x 5\)"):
        image_processor([photo, Image.new("RGB", (0, 5))])
    with pytest.raises(ValueError, match=r"images\[0\]: the image has no pixels \(array"):
        image_processor([np.zeros((0, 5, 3), dtype=np.uint8)])
    with pytest.raises(ValueError, match=r"float64 pixels must be in \[0, 1\], got values from 0.0 to 255.0"):
        image_processor(np.array([[0.0, 255.0]]))
    with pytest.raises(ValueError, match="got values from nan"):
        image_processor(np.array([[0.0, np.nan]]))
    with pytest.raises(ValueError, match=r"got shape \(5, 5, 2\)"):
        image_processor(np.zeros((5, 5, 2)))
    with pytest.raises(TypeError, match="expected a path, a URL, a PIL image or an array, got bytes"):
        image_processor(b"bytes")


def test_denormalized_and_postprocessed_pixels_are_the_image(image_processor):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pixels = image_processor(noise, return_tensors="pt")["pixel_values"]
    target = image_processor.denormalize(pixels)
    assert target.min() >= -1 - 1e-5
    assert target.max() <= 1 + 1e-5
    assert np.array_equal(np.asarray(image_processor.postprocess(target)[0]), noise)
    white = image_processor.postprocess(torch.full((1, 3, 2, 2), 7.0, dtype=torch.bfloat16))[0]
    assert white.getpixel((0, 0)) == (255, 255, 255)


def test_save_and_load(image_processor, tmp_path, photo):
    image_processor.save_pretrained(tmp_path)
    loaded = LibraImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == image_processor.to_dict()
    before = image_processor(photo, return_tensors="pt")["pixel_values"]
    assert torch.equal(loaded(photo, return_tensors="pt")["pixel_values"], before)


def test_float_and_boolean_pixels():
    """PIL would cut floats off at 255 levels of black; arrays and images of them are read alike."""
    array = np.full((4, 4), 0.5, dtype=np.float32)
    assert read_image(Image.fromarray(array)).getpixel((0, 0)) == read_image(array).getpixel((0, 0)) == (128, 128, 128)
    assert read_image(np.ones((4, 4), dtype=bool)).getpixel((0, 0)) == (255, 255, 255)
    assert read_image(torch.full((3, 8, 8), 0.5, dtype=torch.bfloat16)).getpixel((0, 0)) == (128, 128, 128)
    with pytest.raises(ValueError, match=r"int32 pixels must be in \[0, 255\], got values from 30000"):
        read_image(Image.fromarray(np.full((4, 4), 30000, dtype=np.int32)))
