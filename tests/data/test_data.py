"""Data sets: the three sources, their splits and augmentation, and every kind of bad input."""

import gc
import gzip
import multiprocessing
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from hydravit.data import load_dataset
from hydravit.data.augment import Affine
from hydravit.data.idx import read_idx
from hydravit.data.loading import load_batches
from hydravit.preprocessing import Preprocessing


def write_idx(path: Path, array: np.ndarray, *, magic: bytes | None = None, cut: int = 0, extra: bytes = b"") -> None:
    header = magic or bytes([0, 0, 8, array.ndim])
    data = header + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes() + extra
    data = data[: len(data) - cut]
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_image(path: Path, color=(200, 30, 60), size=(20, 14), mode="RGB") -> None:
    write_folder(path.parent)
    Image.new("RGB", size, color).convert(mode).save(path)


def write_folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture
def photos(tmp_path):
    """Two classes, six images each, of several formats and modes."""
    for i in range(6):
        write_image(tmp_path / "cat" / f"{i}.{('png', 'jpg', 'bmp')[i % 3]}", mode=("RGB", "L")[i % 2])
        write_image(tmp_path / "dog" / f"{i}.png", mode=("RGBA", "P", "LA")[i % 3])
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def load_photos(root, split="all", **options):
    return load_dataset(root, split=split, **{"image_size": 16, **options})


# Digits


def test_digits_are_split_by_a_third_of_every_class_and_normalised():
    train, test = (load_dataset("digits", split=split) for split in ("train", "test"))
    assert len(train) + len(test) == 1797 == len(load_dataset("digits", split="all"))
    assert (test.labels.bincount() / (train.labels.bincount() + test.labels.bincount()) - 1 / 3).abs().max() < 0.01
    image, label = train[0]
    assert image.shape == (1, 8, 8) and image.dtype == torch.float32 and type(label) is int
    assert (train.in_channels, train.image_size, len(train.class_names)) == (1, (8, 8), 10)
    pixels = torch.stack([image for image, _ in train])
    assert abs(pixels.mean()) < 0.02 and abs(pixels.std() - 1) < 0.02
    assert len({image.numpy().tobytes() for image in train.images} & {i.numpy().tobytes() for i in test.images}) == 0


def test_the_digits_held_out_never_depend_on_the_seed():
    first, second = (load_dataset("digits", split="test", seed=seed) for seed in (0, 1))
    assert torch.equal(first.images, second.images)


def test_resizing_gives_what_the_preprocessing_gives_for_the_file():
    data = load_dataset("digits", split="test", preprocessing=Preprocessing((16, 16), mean=(0.5,), std=(0.5,)))
    small = load_dataset("digits", split="test", preprocessing=Preprocessing((8, 8), mean=(0.0,), std=(1.0,)))
    file = Image.fromarray((small[3][0][0] * 255).round().byte().numpy())
    assert torch.equal(data[3][0], data.preprocessing(file))


def test_grey_images_become_colour_where_the_model_wants_it():
    data = load_dataset("digits", split="test", preprocessing=Preprocessing(16))
    assert data[0][0].shape == (3, 16, 16)


# Augmentation


def test_augmentation_repeats_with_torchs_random_state_only():
    data = load_dataset("digits", split="train", augment=True)
    state = torch.get_rng_state()
    first = data.__getitems__([1, 2, 3])
    other = data.__getitems__([1, 2, 3])
    torch.set_rng_state(state)
    again = data.__getitems__([1, 2, 3])
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    assert torch.equal(data.image(1), load_dataset("digits", split="train")[1][0])


def test_affine_maps_are_what_they_say():
    images = torch.randn(4, 2, 6, 8)
    torch.testing.assert_close(Affine()(images), images)
    torch.testing.assert_close(Affine(flip=1.0)(images), images.flip(-1))
    assert Affine(zoom=(0.5, 1.5), shift=0.2, rotate=20, flip=0.5)(images).shape == images.shape


# Fashion-MNIST and IDX


def fashion_folder(folder, n=5, suffix="", **damage):
    for name in ("train", "t10k"):
        write_idx(folder / f"{name}-images-idx3-ubyte{suffix}", np.arange(n * 16).reshape(n, 4, 4) % 256, **damage)
        write_idx(folder / f"{name}-labels-idx1-ubyte{suffix}", np.arange(n) % 10)
    return f"fashion-mnist:{folder}"


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_read_plain_and_gzipped(tmp_path, suffix):
    data = load_dataset(fashion_folder(tmp_path, suffix=suffix), split="all", image_size=4)
    assert len(data) == 10 and data.class_names[9] == "Ankle boot" and data.labels.tolist() == [0, 1, 2, 3, 4] * 2
    pixel = data[1][0][0, 0, 1] * data.preprocessing.std[0] + data.preprocessing.mean[0]
    torch.testing.assert_close(pixel, torch.tensor(17 / 255))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"cut": 3}, "truncated"),
        ({"cut": 90}, "truncated in its header"),
        ({"cut": 96}, "0 bytes are no IDX file"),
        ({"extra": b"12"}, "too long"),
        ({"magic": b"\x89PNG"}, "magic 89504e47"),
        ({"magic": bytes([0, 0, 13, 3])}, "magic 00000d03"),
        ({"magic": bytes([0, 0, 8, 1])}, "magic 00000801"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_bad_idx_files_are_named(tmp_path, suffix, damage, message):
    source = fashion_folder(tmp_path, suffix=suffix, **damage)
    with pytest.raises(ValueError, match=f"train-images-idx3-ubyte{suffix}: {message}"):
        load_dataset(source, split="train")


def test_damaged_gzip_files_are_named(tmp_path):
    path = tmp_path / "labels.gz"
    write_idx(path, np.arange(500) % 7)
    whole = path.read_bytes()
    for damaged in (whole[:-10], whole[:20] + bytes(10) + whole[30:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="labels.gz: damaged gzip"):
            read_idx(path, 1)


def test_fashion_mnist_files_must_agree(tmp_path):
    source = fashion_folder(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.arange(4))
    with pytest.raises(ValueError, match="has 5 images, .* has 4 labels"):
        load_dataset(source, split="train")
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.full(5, 10))
    with pytest.raises(ValueError, match="label 10 is not in 0..9"):
        load_dataset(source, split="train")
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="has no train-labels-idx1-ubyte or"):
        load_dataset(source, split="train")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder; install"):
        load_dataset(f"fashion-mnist:{tmp_path}/nowhere", split="train")


def test_a_folder_of_idx_files_says_how_to_name_it(tmp_path):
    fashion_folder(tmp_path)
    with pytest.raises(ValueError, match="name it 'fashion-mnist:"):
        load_photos(tmp_path)


@pytest.mark.needs("fashion-mnist")
def test_installed_fashion_mnist():
    train, test = (load_dataset("fashion-mnist", split=split) for split in ("train", "test"))
    assert (len(train), len(test), test.image_size) == (60000, 10000, (28, 28))
    assert test.labels.bincount().tolist() == [1000] * 10
    assert abs(test.images.mean()) < 0.02 and abs(test.images.std() - 1) < 0.02


# Folders of images


def test_a_folder_of_class_folders(photos):
    data = load_photos(photos)
    assert len(data) == 12 and data.class_names == ("cat", "dog") and data.labels.tolist() == [0] * 6 + [1] * 6
    for image, _ in data:
        assert image.shape == (3, 16, 16) and image.dtype == torch.float32 and image.isfinite().all()


def test_a_folder_is_split_the_same_way_every_time(photos):
    train, test = (load_photos(photos, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (8, 4) and not set(train.files) & set(test.files)
    assert load_photos(photos, "test").files == test.files
    assert any(load_photos(photos, "test", seed=seed).files != test.files for seed in range(1, 9))


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation", "Test", "eval", "testing"])
@pytest.mark.parametrize("train", ["train", "Train", "training"])
def test_split_folders_are_used_and_share_their_labels(tmp_path, train, name):
    for split, label in ((train, "b"), (train, "a"), (name, "b")):
        write_image(tmp_path / split / label / "1.png")
    data = {split: load_photos(tmp_path, split) for split in ("train", "test")}
    assert data["train"].class_names == data["test"].class_names == ("a", "b")
    assert data["train"].labels.tolist() == [0, 1] and data["test"].labels.tolist() == [1]
    assert len(load_photos(tmp_path, "all")) == 3


def test_of_two_folders_to_test_with_the_one_called_test_is_used(tmp_path):
    for split in ("train", "val", "test"):
        write_image(tmp_path / split / "a" / f"{split}.png")
    with pytest.warns(UserWarning, match="left out val beside test, train"):
        assert [file.name for file in load_photos(tmp_path, "test").files] == ["test.png"]
    assert len(load_photos(tmp_path, "all")) == 3


def test_a_class_may_be_called_train(tmp_path):
    for label in ("train", "tram"):
        write_image(tmp_path / label / "1.png")
    assert load_photos(tmp_path).class_names == ("train", "tram")


def test_folders_beside_splits_are_no_classes(tmp_path):
    for folder in ("train/a", "train/b", "dev/a"):
        write_image(tmp_path / folder / "1.png")
    with pytest.warns(UserWarning, match="left out dev beside train"):
        assert load_photos(tmp_path, "train").class_names == ("a", "b")
        with pytest.raises(ValueError, match="has no folder test or .* for split 'test'; or take .*/train as the data"):
            load_photos(tmp_path, "test")


def test_a_class_without_images_to_train_on_is_named(tmp_path):
    for folder in ("train/a", "val/a", "val/b"):
        write_image(tmp_path / folder / "1.png")
    assert load_photos(tmp_path, "train").class_names == ("a",)
    for split in ("test", "all"):
        with pytest.raises(ValueError, match="val/b: a class that .*/train has no folder for"):
            load_photos(tmp_path, split)
    assert load_photos(tmp_path, "test", class_names=["b", "a"]).labels.tolist() == [1, 0]


def test_what_is_hidden_does_not_count(photos):
    write_image(photos / ".thumbnails" / "1.png")
    write_image(photos / "cat" / ".thumbnails" / "1.png")
    write_image(photos / "cat" / ".1.png")
    write_image(photos / "__MACOSX" / "cat" / "1.png")
    data = load_photos(photos)
    assert len(data) == 12 and data.class_names == ("cat", "dog")


def test_links_are_followed_and_those_that_lead_nowhere_named(photos, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_image(elsewhere / "more" / "1.png")
    (photos / "cat" / "more").symlink_to(elsewhere / "more")
    (photos / "bird").symlink_to(elsewhere / "more")
    assert len(load_photos(photos)) == 14
    for target in ("nowhere.png", "lost.png"):
        (photos / "cat" / "lost.png").symlink_to(target)
        with pytest.raises(ValueError, match=rf"lost.png: cannot .* \(a link to {target}, which leads nowhere\)"):
            load_photos(photos)
        with pytest.warns(UserWarning, match="skipped 1 unreadable .*lost.png"):
            assert len(load_photos(photos, skip_corrupt=True)) == 14
        (photos / "cat" / "lost.png").unlink()
    (photos / "fish").symlink_to("fish")
    with pytest.raises(ValueError, match="fish: a link to fish, which leads nowhere"):
        load_photos(photos)
    (photos / "fish").unlink()
    (photos / "cat" / "again").symlink_to("..")
    with pytest.raises(ValueError, match=r"cat/again: a link to \.\., a folder that it lies in"):
        load_photos(photos)


def test_labels_follow_the_models_classes(photos):
    data = load_photos(photos, class_names=["wolf", "dog", "cat"])
    assert data.class_names == ("wolf", "dog", "cat") and data.labels.tolist() == [2] * 6 + [1] * 6
    with pytest.raises(ValueError, match="1 of its 2 classes are unknown to the model, e.g. 'dog'"):
        load_photos(photos, class_names=["cat"])
    with pytest.raises(ValueError, match="10 of its 10 classes are unknown"):
        load_dataset("digits", split="test", class_names=["cat"])


def damage(photos: Path, kind: str) -> Path:
    path = photos / "cat" / "bad.png"
    if kind == "empty":
        path.touch()
    elif kind == "foreign":
        path.write_text("this is no image")
    elif kind == "truncated":
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:900])
    elif kind == "range":
        path = path.with_suffix(".tif")
        Image.new("F", (9, 9)).save(path)
    return path


def test_photos_that_come_later_leave_the_others_where_they_are(tmp_path):
    for label in ("cat", "dog"):
        for i in range(30):
            write_image(tmp_path / label / f"{i}.png")
    before = {str(file) for file in load_photos(tmp_path, "test").files}
    write_image(tmp_path / "cat" / "another.png")
    after = {str(file) for file in load_photos(tmp_path, "test").files}
    assert len(before) == len(after) == 20 and len(before - after) <= 1


@pytest.mark.parametrize("kind", ["empty", "foreign", "truncated", "range"])
def test_bad_images_are_named_or_skipped_and_counted(photos, kind):
    path = damage(photos, kind)
    with pytest.raises(ValueError, match=f"{path.name}: cannot be read as an image"):
        list(load_photos(photos))
    with pytest.warns(UserWarning, match=f"skipped 1 unreadable .*{path.name}"):
        data = load_photos(photos, skip_corrupt=True)
    assert len(list(data)) == 12 and [name for name, _ in data.skipped] == [str(path)]


def test_a_fault_of_the_augmentation_is_not_one_of_the_image(photos):
    data = load_photos(photos)

    def fails(image):
        raise ValueError("bits must be between 1 and 8")

    data.transform = fails
    message = re.escape("0.png: the augmentation of this image failed (ValueError: bits must be between 1 and 8)")
    with pytest.raises(RuntimeError, match=message):
        data[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_are_the_same_line_with_workers(photos, workers):
    (photos / "dog" / "0.png").write_bytes((photos / "dog" / "0.png").read_bytes()[:60])
    data = load_photos(photos)
    for dataset in (data, torch.utils.data.Subset(data, range(12)), Items(data)):
        with pytest.raises(ValueError) as raised:
            list(load_batches(dataset, batch_size=4, num_workers=workers))
        assert re.fullmatch(r".*/dog/0.png: cannot be read as an image \(.*\)", str(raised.value))


@pytest.mark.parametrize("raised", ["by the data", "by the loop"])
def test_workers_end_with_the_loop_whatever_keeps_its_error(photos, monkeypatch, raised):
    """Not five seconds later by a signal, which is what a collected iterator of torch's does."""
    if raised == "by the data":
        (photos / "dog" / "0.png").write_bytes((photos / "dog" / "0.png").read_bytes()[:60])
    killed = []
    monkeypatch.setattr("multiprocessing.process.BaseProcess.terminate", lambda process: killed.append(process))
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 60.0)

    def loop():
        batches = load_batches(load_photos(photos), batch_size=2, num_workers=2)
        try:
            for _ in batches:
                if raised == "by the loop":
                    raise ValueError("the loop's own")
        except ValueError as error:
            return error  # whose traceback holds this frame, which holds the batches

    error = loop()
    error.itself = error  # a cycle
    if raised == "by the data":
        assert multiprocessing.active_children() == []
    del error
    gc.collect()
    assert multiprocessing.active_children() == [] and not killed


class Items(torch.utils.data.Dataset):
    """A data set that gives single items only."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_upright_as_their_exif_data_say(tmp_path, orientation, channels):
    """A camera stores the pixels as its sensor lay; viewers turn them, and so does every command."""
    upright = Image.fromarray((torch.rand(16, 16, 3) * 255).byte().numpy())
    turned = upright.copy()
    turned.getexif()[0x0112] = {6: 8, 8: 6}.get(orientation, orientation)  # the turn that a viewer undoes
    turned = ImageOps.exif_transpose(turned)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned.save(write_folder(tmp_path / "cat") / "1.png", exif=exif)
    half = (0.5,) * channels
    data = load_dataset(tmp_path, split="all", preprocessing=Preprocessing(16, mean=half, std=half, crop=1.0))
    assert torch.equal(data[0][0], data.preprocessing(upright))
    assert torch.equal(data.preprocessing(Image.open(data.files[0])), data.preprocessing(upright))


def test_damaged_exif_data_leave_the_pixels_alone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.effect_noise((16, 16), 60).convert("RGB")
    image.save(write_folder(tmp_path / "cat") / "1.webp", lossless=True, exif=exif.tobytes().replace(b"MM", b"XX"))
    data = load_dataset(tmp_path, split="all", preprocessing=Preprocessing(16, crop=1.0))
    assert torch.equal(data[0][0], data.preprocessing(image))


def test_an_image_that_goes_away_later_is_named(photos):
    data = load_photos(photos)
    data.files[0].unlink()
    with pytest.raises(ValueError, match="0.png: cannot be read"):
        data[0]


def test_bad_folders(tmp_path, photos):
    def fails(match, root, **options):
        with pytest.raises(ValueError, match=match):
            load_photos(root, **options)

    file = photos / "cat" / "0.png"
    fails("0.png: is a file, not a folder", file)
    fails("nowhere: no such folder", tmp_path / "nowhere")
    fails("neither digits, fashion-mnist nor a folder", "cifar10")
    fails("cat: no class folders", photos / "cat")
    fails("split must be one of train, test, all, not 'val'", photos, split="val")
    fails("give it or preprocessing, not both", photos, preprocessing=Preprocessing(16))
    (photos / "empty").mkdir()
    fails("empty: class folder without images", photos)
    data = load_photos(photos, skip_corrupt=True)
    assert len(data) == 12 and data.class_names == ("cat", "dog", "empty")
    only = tmp_path / "only"
    write_image(only / "test" / "cat" / "1.png")
    fails("only: has no folder train or training for split 'train'", only, split="train")
    nothing = tmp_path / "nothing"
    (nothing / "cat").mkdir(parents=True)
    fails("nothing: no readable images", nothing, skip_corrupt=True)


def test_a_folder_that_may_not_be_read_is_named(photos, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", refuse)  # tests may run as root, whom no mode stops
    with pytest.raises(ValueError, match=r"cannot be read \(Permission denied\)"):
        load_photos(photos)
