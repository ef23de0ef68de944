import importlib.util
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from attrbox.data.images import demo_photographs, find_images, open_image
from attrbox.data.loading import load_images
from attrbox.errors import FileError, InputError, PassedOverWarning

RED, WHITE = (255, 0, 0), (255, 255, 255)


def small(image: Image.Image) -> Tensor:
    return to_tensor(image.resize((4, 4)))


def write(
    path: Path, colour: object = RED, mode: str = "RGB", size: tuple[int, int] = (6, 4), **options: object
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)  # type: ignore[arg-type]
    return path


def test_files_and_folders(tmp_path: Path) -> None:
    first = write(tmp_path / "z.png", WHITE)
    write(tmp_path / "folder" / "b.bmp")
    write(tmp_path / "folder" / "a.PNG")
    write(tmp_path / "folder" / "deeper" / "c.webp")
    (tmp_path / "folder" / "notes.txt").write_text("no image")
    images = load_images([first, tmp_path / "folder", first], small)
    assert images.names == ["z", "a", "b", "c"]
    assert images.sources[0] == first
    assert images.values.shape == (4, 3, 4, 4)
    assert images.values[0].min() == 1
    assert images.values[1, 1].max() == 0


def test_a_single_path(tmp_path: Path) -> None:
    assert load_images(write(tmp_path / "a.png"), small).names == ["a"]


def test_names_are_different(tmp_path: Path) -> None:
    files = [write(tmp_path / name) for name in ("cat/1.png", "dog/1.png", "dog/1.bmp", "dog/2.png", "2/1.png")]
    assert load_images(files, small).names == ["cat/1", "dog/1.png", "dog/1.bmp", "2", "2/1"]


def test_cameras_that_were_held_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    path = write(tmp_path / "a.jpg", size=(6, 4), exif=exif)
    assert open_image(path).size == (4, 6)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 51, (51, 51, 51)),
        ("1", 1, WHITE),
        ("I;16", 51 * 257, (51, 51, 51)),
        ("RGBA", (*RED, 255), RED),
        ("RGBA", (0, 0, 0, 0), WHITE),  # transparent pixels lie on white, whatever colour is stored under them
        ("LA", (0, 0), WHITE),
        ("P", 0, (0, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, colour: object, expected: tuple[int, ...]) -> None:
    image = open_image(write(tmp_path / "a.png", colour, mode))
    assert image.mode == "RGB"
    assert image.getpixel((1, 1)) == expected


def test_palette_with_transparency(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", 0, "P", transparency=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(path).getpixel((1, 1)) == WHITE


def test_an_opened_file_is_closed_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png")
    open_image(path)
    os.remove(path)  # a ResourceWarning would fail the test


def test_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    whole = write(tmp_path / "whole.png", size=(64, 64)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "noise.jpg").read_bytes()[:900])
    for name in ("text.png", "empty.jpg", "cut.png", "cut.jpg"):
        with pytest.raises(FileError, match=f"Cannot read .*{name}"):
            load_images(tmp_path / name, small)


def test_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match=r"there is no '.*cat\.png'"):
        find_images([tmp_path / "cat.png"])
    with pytest.raises(FileError, match=r"folder '.*empty'"):
        find_images([tmp_path / "empty"])
    with pytest.raises(InputError, match="at least one"):
        find_images([])


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """Links to images and folders, as data sets are made of, beside one image."""
    write(tmp_path / "store" / "one.png")
    write(tmp_path / "store" / "deep" / "two.png", WHITE)
    folder = tmp_path / "folder"
    write(folder / "three.png")
    return folder


def test_links_are_followed(linked: Path) -> None:
    (linked / "one.png").symlink_to("../store/one.png")
    (linked / "class").symlink_to("../store/deep")
    (linked / "again").symlink_to("../store/deep")  # no loop
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [str(file.relative_to(linked)) for file in find_images([linked])]
    assert found == ["again/two.png", "class/two.png", "one.png", "three.png"]


@pytest.mark.parametrize(
    ("name", "target", "told"),
    [
        ("loop", ".", "'.*/loop' is a link to '.*/folder', in which it lies"),
        ("below/loop", "..", "in which it lies"),
        ("below/loop.png", "../../folder", "in which it lies"),
        ("below/loop", "../../store/back", "in which it lies"),  # which links to the folder
        ("class", "nowhere", "'.*/class' is a link to 'nowhere', which cannot be found"),
        ("class", "class", "cannot be found"),
        ("below/class", "/nowhere/at/all", "cannot be found"),
    ],
)
def test_links_that_lead_nowhere_are_told(linked: Path, name: str, target: str, told: str) -> None:
    (linked / "../store/back").symlink_to(linked)
    (linked / name).parent.mkdir(exist_ok=True)
    (linked / name).symlink_to(target)
    with pytest.warns(PassedOverWarning, match=told) as caught:
        assert find_images([linked]) == [linked / "three.png"]
    assert len(caught) == 1


@pytest.mark.parametrize("target", ["nowhere.png", "gone.png", "/nowhere/at/all.jpg"])
@pytest.mark.parametrize("name", ["gone.png", "below/gone.jpg"])
def test_images_that_are_links_to_nothing(linked: Path, name: str, target: str) -> None:
    (linked / name).parent.mkdir(exist_ok=True)
    (linked / name).symlink_to(target)
    assert linked / name in find_images([linked])
    for paths in ([linked], [linked / name], [linked / "three.png", linked / name]):
        with pytest.raises(FileError, match=f"gone.* is a link to .*{target}.*, which cannot be found"):
            load_images(paths, small)


def test_links_that_mean_no_image_are_nobodys_concern(linked: Path) -> None:
    (linked / "notes.txt").symlink_to("nowhere")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_images([linked]) == [linked / "three.png"]


def test_what_has_the_name_of_an_image_and_is_no_file(linked: Path) -> None:
    os.mkfifo(linked / "pipe.png")
    with pytest.warns(PassedOverWarning, match=r"'.*pipe\.png' is no file"):
        assert find_images([linked]) == [linked / "three.png"]


def test_a_folder_that_cannot_be_listed(linked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listed(folder: Path) -> Iterator[Path]:
        if folder.name == "secret":
            raise PermissionError(13, "Permission denied")
        return original(folder)

    original = Path.iterdir
    (linked / "secret").mkdir()
    monkeypatch.setattr(Path, "iterdir", listed)
    with pytest.raises(FileError, match=r"Cannot list the folder '.*secret' \(Permission denied\)"):
        find_images([linked])


def test_preprocessing_without_a_fixed_size(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.png", size=(6, 4)), write(tmp_path / "b.png", size=(5, 4))]
    with pytest.raises(InputError, match="one shape"):
        load_images(files, to_tensor)


def test_demo_photographs_are_real_and_local() -> None:
    pytest.importorskip("skimage")
    paths = demo_photographs()
    assert len(paths) >= 4
    images = [torch.from_numpy(np.array(open_image(path))).float() for path in paths]
    assert all(min(image.shape[:2]) >= 224 and image.std() > 20 for image in images)


def test_demo_photographs_without_scikit_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileError, match=r"pip install 'attrbox\[demo\]'"):
        demo_photographs()
