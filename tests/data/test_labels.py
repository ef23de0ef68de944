"""A label means the class that it is called, in whatever data and place of the list it comes; or it is refused."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from command_line import TINY, run
from exports import Pairs, export, pictures
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder

import attrbox
from attrbox.data.labels import ClassNames, imagenet_categories, imagenet_synsets, read_labels
from attrbox.data.models.loaded_model import LoadedModel, Preprocess
from attrbox.errors import FileError, InputError, ModelError, TargetError, UnknownNameError
from attrbox.pipeline.report.page import write_report
from attrbox.pipeline.shards import Shard

IMAGENET = ClassNames(imagenet_categories(), 1000)
PREPROCESS = Preprocess(16, 16, (0.0,) * 3, (1.0,) * 3)
NAMES = ("dog", "cat", "polar bear", "ant", "fox")


def model(names=NAMES, classes=5):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, classes))
    return LoadedModel(layers.eval(), "tiny", PREPROCESS, (0.0,) * 3, (1.0,) * 3, names)


def folders(root, *names):
    """A folder for each name, with two pictures."""
    for place, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for shade in (40, 200):
            Image.new("RGB", (16, 16), (40 * (place % 6), shade, 90)).save(root / name / f"{shade}.png")
    return root


def explained(path, data, loaded=None, **options):
    """The classes that a file explains and has for labels, which are the same."""
    loaded = loaded or model()
    export(path, data, ["saliency"], loaded, target="label", overwrite=True, **options)
    with attrbox.open_maps(path) as maps:
        targets = maps.column("target").tolist()
        assert maps.column("label").tolist() == maps.labeled.tolist() == targets
        assert maps.classes == (None if loaded.categories is None else list(loaded.categories))
        images = torch.stack([loaded.preprocess(Image.open(source)) for source in maps.column("source")])
        wanted = attrbox.explain(loaded.model, images, "saliency", target=targets).values
        torch.testing.assert_close(maps["saliency"][:], wanted)
    return targets


@pytest.fixture
def path(tmp_path):
    return tmp_path / "maps.h5"


# --------------------------------------------------------------------------------------------------- names of classes


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("tench", 0),
        ("Tabby", 281),
        ("tiger_cat", 282),
        ("TIGER-CAT", 282),
        ("yellow_ladys_slipper", 986),
        ("yellow lady\u2019s slipper", 986),
        ("jack-o'-lantern", 607),
        ("jack_o_lantern", 607),
        ("black-and-tan coonhound", 165),
        ("crane_bird", 134),
        ("maillot tank suit", 639),
        ("n01440764", 0),
        ("n01514668", 7),
        ("n02086910", 157),
        ("n15075141", 999),
        ("n01514668_cock", 7),
        ("7", 7),
        ("0157", 157),
        ("999", 999),
    ],
)
def test_classes_of_imagenet(text, index):
    assert IMAGENET.index(text) == index
    assert IMAGENET.indices(["8", text]) == [8, index]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crane", r"\[134, 517\] may all be called 'crane': 134 \(crane bird, n02012849\), 517 \(crane, n03126707\)"),
        ("Maillot", r"\[638, 639\]"),
        ("cardigan", r"\[264, 474\]"),
        ("rooster", "No class is called 'rooster'"),
        ("tiger_cats", "Did you mean 'tiger cat'"),
        ("n99999999", "No class is called"),
        ("n01514668x", "No class is called"),
        ("1000", "number from 0 to 999"),
        ("-1", "No class"),
        ("", "No class"),
        ("7.0", "No class"),
    ],
)
def test_what_is_no_class_or_several(text, message):
    with pytest.raises(UnknownNameError, match=message):
        IMAGENET.index(text)
    with pytest.raises(TargetError, match=message):
        IMAGENET.indices(["tench", text])


def test_the_tables_of_imagenet():
    assert list(imagenet_synsets()) == sorted(set(imagenet_synsets()))  # ImageNet's classes are in this order
    assert len(imagenet_synsets()) == len(imagenet_categories()) == 1000
    assert IMAGENET.indices(imagenet_synsets()) == list(range(1000))
    # Of a whole set of names also those can be told that are ambiguous alone.
    order = sorted(range(1000), key=lambda index: imagenet_categories()[index])
    assert IMAGENET.indices([imagenet_categories()[index] for index in order], ordered=True) == order
    assert IMAGENET.indices(["crane", "crane bird"]) == [517, 134]
    assert IMAGENET.indices(["cardigan", "Cardigan"]) == [474, 264]


def test_names_of_custom_models():
    custom = ClassNames(("1", "2", "10", "caf\u00e9", "+", "-", "n01440764"), 7)
    # Decomposed letters, as some file systems write them; a name wins over a number; punctuation alone is a name.
    assert custom.indices(["cafe\u0301", "10", "2", "+", "-"]) == [3, 2, 1, 4, 5]
    assert custom.index("n01440764") == 6
    assert custom.index("6") == 6
    with pytest.raises(UnknownNameError, match="have no names"):
        ClassNames(None, 5).index("cat")
    with pytest.raises(UnknownNameError, match="No class"):
        ClassNames(NAMES, 5).index("n01514668")  # these are not ImageNet's


@pytest.mark.parametrize(
    ("names", "labels", "wanted"),
    [
        (None, ["a", "b", "c"], [0, 1, 2]),  # as many as classes of which nothing else is known
        (None, ["0", "1", "2"], [0, 1, 2]),
        (None, ["1", "2"], [1, 2]),  # numbers are classes, not places
        (None, ["02", "1"], [2, 1]),
        (("plane", "car", "bird"), ["airplane", "bird", "car"], None),  # the names say another order
        (("plane", "car", "ship"), ["airplane", "car", "ship"], [0, 1, 2]),  # one has another name, all are in place
        (("plane", "car", "ship"), ["a", "b", "c"], None),
        (("plane", "car", "ship"), ["a", "car", "c"], None),
        (("plane", "car", "ship"), ["car", "plane"], [1, 0]),
        (None, ["a", "b"], None),
        (None, ["a", "b", "c", "d"], None),
        (None, ["1", "2", "3"], None),  # counted from one
        (None, ["7", "a", "b"], [0, 1, 2]),
    ],
)
def test_the_order_of_labels_counts_only_where_nothing_else_is_known(names, labels, wanted):
    known = ClassNames(names, 3)
    if wanted is None:
        with pytest.raises(TargetError):
            known.indices(labels, ordered=True)
    else:
        assert known.indices(labels, ordered=True) == wanted
    if names is None and not all(label.isdecimal() for label in labels):
        with pytest.raises(TargetError):
            known.indices(labels)  # those of a table have no order


def test_numbers_whose_alphabetical_order_is_another():
    labels = sorted(map(str, range(12)))
    with pytest.raises(TargetError, match="zeros to one length"):
        ClassNames(None, 12).indices(labels, ordered=True)
    assert ClassNames(None, 12).indices(labels) == [int(label) for label in labels]
    assert ClassNames(None, 13).indices(labels, ordered=True) == [int(label) for label in labels]
    assert ClassNames(None, 12).indices([f"{n:02}" for n in range(12)], ordered=True) == list(range(12))


# ------------------------------------------------------------------------------------------- folders, and data of torch


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (("ant", "cat", "dog"), [3, 1, 0]),
        (("Polar_Bear", "fox"), [2, 4]),
        (("0", "3"), [0, 3]),
        (("3", "dog"), [3, 0]),
        (("ant", "cat", "dog", "fox", "polar bear"), [3, 1, 0, 4, 2]),
    ],
)
def test_folders_of_some_classes(tmp_path, path, names, wanted):
    root = folders(tmp_path / "data", *names)
    wanted = [index for index in wanted for _ in range(2)]
    assert explained(path, root) == wanted
    assert explained(path, [root / name for name in names]) == wanted  # the folders one by one
    assert explained(path, str(root), batch_size=3, workers=1) == wanted


def test_data_of_torch_means_the_same_as_its_folders(tmp_path):
    root = folders(tmp_path / "data", "ant", "cat", "dog")
    data = ImageFolder(root, transform=PREPROCESS)
    loaded = model()

    def targets(items, **options):
        export(tmp_path / "maps.h5", items, ["saliency"], loaded, target="label", overwrite=True, **options)
        with attrbox.open_maps(tmp_path / "maps.h5") as maps:
            return maps.column("target").tolist()

    assert targets(data) == [3, 3, 1, 1, 0, 0]
    assert targets(ImageFolder(root)) == [3, 3, 1, 1, 0, 0]  # pictures, preprocessed by the model's own
    assert targets(Subset(data, [5, 0])) == [0, 3]
    assert targets(ConcatDataset([data, Subset(data, [4])])) == [3, 3, 1, 1, 0, 0, 0]
    assert targets(DataLoader(data, batch_size=2), batch_size=None) == [3, 3, 1, 1, 0, 0]
    own = ImageFolder(root, transform=PREPROCESS, target_transform=[4, 2, 0].__getitem__)
    assert targets(own) == [4, 4, 2, 2, 0, 0]  # made by the caller: taken as they are
    other = ImageFolder(folders(tmp_path / "other", "dog", "fox"), transform=PREPROCESS)
    with pytest.raises(InputError, match="call them differently"):
        targets(ConcatDataset([data, other]))
    export(tmp_path / "maps.h5", ConcatDataset([data, other]), ["saliency"], loaded, overwrite=True)
    with attrbox.open_maps(tmp_path / "maps.h5") as maps:
        assert maps.labeled is None  # what they mean cannot be told


class Named(Dataset):
    """Some pictures with labels as `label` makes them; attributes tell what these are called."""

    def __init__(self, label, **attributes):
        self.label = label
        self.__dict__.update(attributes)

    def __len__(self):
        return 4

    def __getitem__(self, row):
        return torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(row)), self.label(row)


@pytest.mark.parametrize(
    ("data", "loaded", "wanted"),
    [
        (Named(lambda row: row), model(), [0, 1, 2, 3]),  # numbers without names are classes
        (Named(lambda row: row % 2, classes=["fox", "ant"]), model(), [4, 3, 4, 3]),
        (Named(lambda row: row % 2, classes=[("fox", "red fox"), ("ant",)]), model(), [4, 3, 4, 3]),
        (Named(lambda row: torch.tensor(row % 2), classes=["fox", "ant"]), model(), [4, 3, 4, 3]),
        (Named(lambda row: row, classes=5), model(), [0, 1, 2, 3]),
        (Named(lambda row: row, classes=list("abcde")), model(None), [0, 1, 2, 3]),
        (
            Named(lambda row: row % 2, features={"label": SimpleNamespace(names=["fox", "ant"])}),
            model(),
            [4, 3, 4, 3],
        ),
        (Named(lambda row: row % 2, classes=["x", "y"], wnids=["n01514668", "n02086910"]), model(None, 1000), [7, 157]),
        (Named(lambda row: ["fox", "ant", "Dog", "3"][row]), model(), [4, 3, 0, 3]),
    ],
)
def test_labels_of_data_sets(path, data, loaded, wanted):
    export(path, data, ["saliency"], loaded, target="label")
    with attrbox.open_maps(path) as maps:
        assert maps.column("target").tolist()[: len(wanted)] == wanted
        assert maps.labeled.tolist()[: len(wanted)] == wanted


@pytest.mark.parametrize(
    ("data", "loaded", "error", "message"),
    [
        (Named(lambda row: row % 2, classes=["fox", "cow"]), model(), TargetError, "1 of 2 cannot be told: 'cow'"),
        (
            Named(lambda row: row % 2, classes=["fox", "ant"]),
            model(None),
            TargetError,
            "5 classes of the model have no",
        ),
        (Named(lambda row: row, classes=list("abcde")), model(), TargetError, "5 of 5 cannot be told"),
        (Named(lambda row: row, classes=list("abcdef")), model(NAMES, 6), ModelError, "6 classes, got 5"),
        (Named(lambda row: "cow"), model(), TargetError, "label of '0'. No class is called 'cow'"),
        (Named(lambda row: None), model(), TargetError, "label of '0'.*labels="),
        (Named(lambda row: 9, classes=["fox", "ant"]), model(), TargetError, "got None"),
    ],
)
def test_labels_of_data_sets_that_mean_no_class(path, data, loaded, error, message):
    with pytest.raises(error, match=message):
        export(path, data, ["saliency"], loaded, target="label")
    assert not path.exists()


def test_1000_classes_without_names_are_imagenets_if_all_labels_are(tmp_path, path):
    loaded = model(None, 1000)
    root = folders(tmp_path / "data", "n01514668", "n02086910")
    export(path, root, ["saliency"], loaded, target="label")
    with attrbox.open_maps(path) as maps:
        assert maps.column("target").tolist() == [7, 7, 157, 157]
        assert maps.classes == list(imagenet_categories())
    for names in (("n01514668", "holiday"), ("a", "b")):
        with pytest.raises(TargetError, match="1000 classes of the model have no names"):
            export(path, folders(tmp_path / names[1], *names), ["saliency"], loaded, target="label", overwrite=True)


def test_classes_without_names_that_are_not_imagenets(tmp_path, path):
    root = folders(tmp_path / "data", "n01514668", "n02086910", "n02123045")
    with pytest.raises(TargetError, match="5 classes of the model have no names"):
        export(path, root, ["saliency"], model(None), target="label")
    assert explained(path, root, model(None, 3)) == [0, 0, 1, 1, 2, 2]  # as many as there are folders
    table = {f"{name}/{shade}": name for name in ("n01514668", "n02086910", "n02123045") for shade in (40, 200)}
    with pytest.raises(TargetError, match="3 classes of the model have no names"):  # a table has no order
        export(path, root, ["saliency"], model(None, 3), target="label", labels=table, overwrite=True)


def test_folders_that_are_no_classes(tmp_path, path):
    root = folders(tmp_path / "data", "holiday", "cat")
    double = model(("cat", "Cat", "fox", "ant", "dog"))
    export(path, root, ["saliency"], double, overwrite=True)
    with attrbox.open_maps(path) as maps:
        assert maps.labeled.tolist() == [-1] * 4  # one of two is no class
    path.unlink()
    with pytest.raises(TargetError, match="'holiday'"):
        export(path, root, ["saliency"], model(), target="label")
    assert not path.exists()
    export(path, root, ["saliency"], model())
    with attrbox.open_maps(path) as maps:  # not the numbers of folders, which would be taken for classes
        assert maps.column("label").tolist() == ["cat", "cat", "holiday", "holiday"]
        assert maps.labeled.tolist() == [1, 1, -1, -1]


def test_images_without_labels(tmp_path, path):
    root = folders(tmp_path / "data", "cat")
    for data in (root / "cat", [root / "cat/40.png"]):
        with pytest.raises(TargetError, match=r"label of '(200|40)'.*folder for each class"):
            export(path, data, ["saliency"], model(), target="label")


# --------------------------------------------------------------------------------------------------- tables of labels


TABLES = {
    "names": "file,label\ndata/a/40.png,fox\na/200.png,polar_bear\nb/40.png,3\nb/200.png,Ant\n",
    "no header, other order, no suffix": "b/200,Ant\nb/40,3\n\na/200,polar-bear\n a/40 , fox \n",
    "quotes and a mark": '\ufeffpath,class\n"a/40.png","fox"\n"a/200.png","polar, bear"\nb/40.png,3\nb/200.png,ant\n',
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_tables(tmp_path, path, table):
    root = folders(tmp_path / "data", "a", "b")
    (tmp_path / "labels.csv").write_text(table, encoding="utf-8")
    loaded = model()  # pictures come in the order of their paths: 200 before 40
    assert explained(path, root, loaded, labels=tmp_path / "labels.csv") == [2, 4, 3, 3]
    assert explained(path, root, loaded, labels={"a/200": "2", "a/40": "fox", "b/200": "ant", "b/40": "3"}) == [
        2,
        4,
        3,
        3,
    ]


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        ("a/40.png,fox\n", InputError, "none for 3 of them: 'a/200'"),
        ("40.png,fox\n200.png,ant\n", InputError, "one entry, '200.png', for 'a/200' and 'b/200'"),
        ("a/40.png,fox\na/40.png,ant\n", FileError, "twice, as 'fox' and 'ant'"),
        ("a/40.png,polar,bear\n", FileError, "two columns.*line 1.*quotes"),
        ("a/40.png\n", FileError, "two columns"),
        ("a/40.png,\n", FileError, "two columns"),
        ("", FileError, "got none"),
        ("file,label\n", FileError, "got none"),
        (b"\xff\xfe\x00", FileError, "Cannot read the labels"),
        ("a/40,fox\na/200,cow\nb/40,fox\nb/200,fox\n", TargetError, "1 of 2 cannot be told: 'cow'"),
    ],
)
def test_tables_that_are_refused(tmp_path, path, table, error, message):
    file = tmp_path / "labels.csv"
    file.write_bytes(table if isinstance(table, bytes) else table.encode())
    root = folders(tmp_path / "data", "a", "b")
    with pytest.raises(error, match=message):
        export(path, root, ["saliency"], model(), target="label", labels=file)
    assert not path.exists()
    with pytest.raises(FileError, match="Cannot read the labels"):
        read_labels(tmp_path / "none.csv")


def test_a_table_labels_data_sets_too(path):
    table = {str(row): name for row, name in enumerate(["fox", "ant", "dog", "1"])}
    export(path, Named(lambda row: 0, classes=["cow"]), ["saliency"], model(), target="label", labels=table)
    with attrbox.open_maps(path) as maps:
        assert maps.column("target").tolist() == [4, 3, 0, 1]


# ---------------------------------------------------------------------------------------------------------- downstream


def test_other_labels_are_not_mixed_into_a_file(tmp_path, path):
    root = folders(tmp_path / "data", "ant", "cat")
    export(path, root, ["saliency"], model(), target="label")
    for change in ({"labels": {"ant/40": "fox", "ant/200": "fox", "cat/40": "fox", "cat/200": "fox"}},):
        with pytest.raises(FileError, match="labels_sha256"):
            export(path, root, ["saliency", "deeplift"], model(), target="label", **change)
    export(path, root, ["saliency", "deeplift"], model(), target="label")
    again = attrbox.recompute(attrbox.open_maps(path), "ant/40", model(), root)
    with attrbox.open_maps(path) as maps:
        torch.testing.assert_close(again["deeplift"], maps["deeplift"]["ant/40"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("labels", "kept"),
    [
        (["fox"] * 4 + [3, 4, "ant", 3, 3, 3], ["fox"] * 4 + ["3", "4", "ant", "3", "3", "3"]),
        ([None] * 4 + [3] * 6, [-1] * 4 + [3] * 6),  # there is no column before there are labels
        ([3] * 4 + [None] * 6, [3] * 4 + [-1] * 6),
        ([3] * 4 + ["fox"] * 6, None),
        ([3] * 4 + [2.5] * 6, None),
    ],
)
def test_labels_of_several_kinds_are_kept_as_they_are_or_refused(path, labels, kept):
    data = Pairs(pictures(), label=labels.__getitem__)
    if kept is None:
        with pytest.raises(InputError, match="label to be of one kind"):
            export(path, data, ["saliency"])
        kept = [3] * 4 + [-1] * 6
    else:
        export(path, data, ["saliency"])
    with attrbox.open_maps(path) as maps:
        assert maps.column("label").tolist() == kept
    assert attrbox.verify(path) == []


def test_files_with_labels_of_several_kinds_are_not_merged(tmp_path):
    for name, label in (("texts", "fox"), ("numbers", 3), ("fractions", 2.5)):
        ids = [f"{name}{row}" for row in range(4)]
        export(tmp_path / f"{name}.h5", Pairs(pictures(4), label=([label] * 4).__getitem__), ["saliency"], ids=ids)
    for pair in (("texts", "numbers"), ("numbers", "texts"), ("numbers", "fractions")):
        with pytest.raises(InputError, match="samples/label' is not alike"):
            attrbox.merge([tmp_path / f"{name}.h5" for name in pair], tmp_path / "merged.h5")


def test_shards_have_the_labels_of_the_whole(tmp_path, path):
    root = folders(tmp_path / "data", "ant", "cat", "dog")
    for name, data in (("folder", root), ("data set", ImageFolder(root, transform=PREPROCESS))):
        whole = path.with_name(f"{name}.h5")
        for index in range(3):
            options = {"target": "label", "batch_size": 2, "shard": Shard(index, 3)}
            export(whole, data, ["saliency"], model(), **options)
        with attrbox.open_maps(whole) as maps:
            assert maps.column("target").tolist() == [3, 3, 1, 1, 0, 0]
            assert maps.labeled.tolist() == [3, 3, 1, 1, 0, 0]


def samples_of_page(path):
    text = write_report(path, path.with_suffix(".html")).read_text()
    return json.loads(re.search(r'<script[^>]* id="data"[^>]*>(.*?)</script>', text, re.DOTALL)[1])["samples"]


def test_reports_name_the_true_the_predicted_and_the_explained_class(tmp_path, path):
    loaded = model()
    root = folders(tmp_path / "data", "ant", "cat", "holiday")
    table = {f"{name}/{shade}": name for name in ("ant", "cat") for shade in (40, 200)}
    table |= {"holiday/40": "fox", "holiday/200": "fox"}
    for options in ({}, {"target": "label", "labels": table}):
        export(path, root, ["saliency"], loaded, overwrite=True, **options)
        with attrbox.open_maps(path) as maps:
            predicted, targets = maps.column("prediction").tolist(), maps.column("target").tolist()
            true = [3, 3, 1, 1, *([4, 4] if options else [-1, -1])]
            assert maps.labeled.tolist() == true
        for row, sample in enumerate(samples_of_page(path)):
            facts = dict(sample["facts"])
            assert facts["predicted"] == f"{NAMES[predicted[row]]} ({predicted[row]})"
            assert facts["explained"] == f"{NAMES[targets[row]]} ({targets[row]})"
            if true[row] < 0:
                assert facts["label"] == "holiday"
                assert "true class" not in facts
                assert not sample["wrong"]
            else:
                assert facts["true class"] == f"{NAMES[true[row]]} ({true[row]})"
                assert sample["wrong"] == (true[row] != predicted[row])
        classes = json.loads(run("inspect", path, "--json").output)["classes"]
        assert classes["true"]["ant (3)"] == 2
        assert classes["misclassified"] == sum(t >= 0 and t != p for t, p in zip(true, predicted, strict=True))
        assert sum(classes["predicted"].values()) == 6
        assert "misclassified: " in run("inspect", path).output


def test_the_command_and_its_config(tmp_path):
    root = folders(tmp_path / "data", "blue", "green")  # of red, green and blue
    out = tmp_path / "maps.h5"
    command = ("export", root, "--model", TINY, "-m", "saliency,random", "--out", out, "--target", "label")
    assert run(*command).exit_code == 0
    with attrbox.open_maps(out) as maps:
        assert maps.column("target").tolist() == [2, 2, 1, 1]
    assert run("evaluate", out, "--trust", "--metrics", "morf").exit_code == 0
    (tmp_path / "labels.csv").write_text("blue/40.png,red\nblue/200.png,2\ngreen/40.png,green\ngreen/200.png,green\n")
    done = run(*command, "--labels", tmp_path / "labels.csv", "--overwrite")
    assert done.exit_code == 0, done.output
    with attrbox.open_maps(out) as maps:
        assert maps.column("target").tolist() == [2, 0, 1, 1]
        config = maps.attributes["config"]
    assert f'labels = "{tmp_path / "labels.csv"}"' in config
    (tmp_path / "config.toml").write_text(config)
    again = run("export", "--config", tmp_path / "config.toml", "--trust", "--json")
    assert json.loads(again.output)["images"] == 0
    (tmp_path / "labels.csv").unlink()  # which measuring does not need
    assert run("evaluate", out, "--trust", "--metrics", "morf").exit_code == 0
    refused = run("export", folders(tmp_path / "other", "blue", "pink"), *command[2:], "--overwrite")
    assert refused.exit_code == 2
    assert "'pink'" in refused.stderr
    with attrbox.open_maps(out) as maps:
        assert maps.column("target").tolist() == [2, 0, 1, 1]
